"""`pochade quantize`: a float bundle becomes a small one."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pochade.cli.options import add_verbosity
from pochade.cli.progress import ProgressBar
from pochade.errors import InputRefusedError, MissingExtraError, UsageError
from pochade.sizes import read_bytes

if TYPE_CHECKING:
    from pochade.quant.scheme import Scheme

SCHEME_NAMES = ("int8", "int4")
ROUNDINGS = ("rtn", "search", "hqq", "gptq")
REFINEMENTS = (
    "block_size",
    "rounding",
    "low_rank",
    "attention_products",
    "codec_products",
    "encoder_products",
    "codec_layers",
    "calibration",
    "keep",
)
"""Options that mean nothing by themselves."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "quantize",
        help="make a float bundle small",
        description="Make a small bundle of a float one and measure what that costs: by a scheme, or with the bits "
        "that a search finds for a size or a fidelity. Needs pochade[quant].",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="bundle folder or installed name")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE", help="folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
    add_scheme_options(parser)
    add_verbosity(parser)
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Quantize."""
    try:
        from pochade.quant.bundle import quantize_bundle
    except ImportError as error:
        raise MissingExtraError(f'quantize needs more packages ({error}): pip install "pochade[cpu,quant]"') from None
    from pochade.runtime.locate import resolve

    chosen = read_scheme(arguments)
    if chosen is None:
        raise UsageError("say how: --scheme int8, --scheme int4, --target-size SIZE, --min-snr DB or --bits FILE")
    scheme, options = chosen
    with ProgressBar(quiet=bool(arguments.quiet)) as bar:
        source = resolve(arguments.bundle)
        quantize_bundle(source, arguments.output, scheme, overwrite=arguments.overwrite, progress=bar.update, **options)
    print(arguments.output)
    return 0


def add_scheme_options(parser: argparse.ArgumentParser) -> None:
    """How to quantize, and what refines it."""
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--scheme", choices=SCHEME_NAMES, help="the same bits everywhere, more where it is known to matter"
    )
    how.add_argument(
        "--target-size",
        metavar="SIZE",
        help="the best 4, 8 or 16 bits for each weight within this size of the bundle, such as 0.9G or 12.5M",
    )
    how.add_argument(
        "--min-snr", type=float, metavar="DB", help="the smallest bundle whose components keep this fidelity"
    )
    how.add_argument("--bits", type=Path, metavar="FILE", help="recipe.json of an earlier search, or its bundle")
    parser.add_argument("--block-size", type=int, help="inputs that share a scale, for 4 bits (default: 128)")
    parser.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        help="how 4-bit weights are found (default: gptq, which makes up for errors by what layers are given)",
    )
    parser.add_argument(
        "--low-rank",
        type=int,
        metavar="N",
        help="carry the rounding error of 4-bit layers in a float16 branch of N columns (default: none)",
    )
    parser.add_argument(
        "--attention-products",
        type=int,
        choices=(8, 32),
        help="bits of the numbers that attention multiplies, on processors with VNNI or ARM's dot product (default: 8 "
        "for Meissonic and Monetico, with --min-snr and for other models 32)",
    )
    parser.add_argument(
        "--codec-products",
        type=int,
        choices=(8, 32),
        help="bits of the numbers that the decoder multiplies (default: 8, about a third of the time of 32; with "
        "--min-snr 32)",
    )
    parser.add_argument(
        "--encoder-products",
        type=int,
        choices=(8, 32),
        help="the same of the encoder, which reads pictures to begin with (default: 32)",
    )
    parser.add_argument(
        "--codec-layers",
        type=int,
        choices=(16, 32),
        help="bits of the numbers that the codec keeps between its layers (default: 16, half the memory of 32)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text file with a prompt on each line, to calibrate with (default: typical prompts of the model)",
    )
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="REGEX=BITS",
        help="keep weights whose component/name matches at 8, 16 or 32 bits; repeatable, the first match counts",
    )


def read_scheme(arguments: argparse.Namespace) -> tuple[Scheme, dict[str, Any]] | None:
    """Scheme that the options describe and further arguments of `quantize_bundle`; None where none is asked for.

    Raises:
        UsageError: options that do not go together.
        InputRefusedError: the file with prompts cannot be read.
    """
    ways = ("scheme", "target_size", "min_snr", "bits")
    if all(getattr(arguments, way) is None for way in ways):
        for name in REFINEMENTS:
            if getattr(arguments, name) not in (None, False, []):
                raise UsageError(f"{_flag(name)} needs --scheme, --target-size, --min-snr or --bits")
        return None
    from pochade.quant.scheme import SCHEMES, Keep

    for name in ("attention_products", "codec_products", "encoder_products"):
        if getattr(arguments, name) == 8 and arguments.min_snr is not None:
            raise UsageError(f"{_flag(name)} 8 and --min-snr do not go together: no search makes its error smaller")
    scheme = SCHEMES[arguments.scheme or "int4"]
    for name in ("block_size", "rounding", "low_rank"):
        if getattr(arguments, name) is not None and scheme.linear.bits != 4:
            raise UsageError(f"{_flag(name)} has no effect with scheme {scheme.name}, which has no 4-bit weights")
    is_float_codec = arguments.codec_products == 32 and arguments.encoder_products != 8
    if arguments.calibration is not None and scheme.linear.bits != 4 and is_float_codec:
        raise UsageError(f"--calibration has no effect with scheme {scheme.name} and --codec-products 32")
    if arguments.block_size is not None:
        scheme = scheme.with_block_size(arguments.block_size)
    scheme = replace(
        scheme,
        rounding=arguments.rounding or scheme.rounding,
        low_rank=scheme.low_rank if arguments.low_rank is None else arguments.low_rank,
        int8_attention=_rounds_attention(arguments),
        int8_codec=(arguments.codec_products or (8 if arguments.min_snr is None else 32)) == 8,
        int8_encoder=arguments.encoder_products == 8,
        half_layers=arguments.codec_layers != 32,
    )
    rules = []
    for text in arguments.keep:
        pattern, _, bits = text.rpartition("=")
        if not pattern or not bits.isdecimal():
            raise UsageError(f"--keep {text!r} is not REGEX=BITS, e.g. 'proj_out=8'")
        rules.append(Keep(pattern, int(bits)))
    options: dict[str, Any] = {"prompts": _read_prompts(arguments.calibration), "recipe": arguments.bits}
    if arguments.target_size is not None or arguments.min_snr is not None:
        from pochade.quant.search import Goal

        size = None if arguments.target_size is None else read_bytes(arguments.target_size, "--target-size")
        options["goal"] = Goal(size, arguments.min_snr)
    return scheme.keeping(rules), options


def _rounds_attention(arguments: argparse.Namespace) -> bool | None:
    """Whether attention multiplies 8-bit numbers; None for as the family allows."""
    if arguments.attention_products is None:
        return None if arguments.min_snr is None else False
    return bool(arguments.attention_products == 8)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _read_prompts(path: Path | None) -> list[str]:
    """The lines of a file that are not empty; none without a file.

    Raises:
        InputRefusedError: it cannot be read, or holds no prompt.
    """
    if path is None:
        return []
    try:
        prompts = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputRefusedError(str(path), [f"it cannot be read as UTF-8 text ({error})"]) from None
    if not prompts:
        raise InputRefusedError(str(path), ["it holds no prompt; write one on each line"])
    return prompts
