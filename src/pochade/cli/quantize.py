"""`pochade quantize`: a float bundle becomes an int8 or int4 one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pochade.cli.options import add_verbosity
from pochade.cli.progress import ProgressBar
from pochade.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from pochade.quant.scheme import Scheme

SCHEME_NAMES = ("int8", "int4")


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "quantize",
        help="make a float bundle small",
        description="Make an int8 or int4 bundle of a float one and measure what that costs. Needs pochade[quant].",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="bundle folder or installed name")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE", help="folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
    add_scheme_options(parser, required=True)
    add_verbosity(parser)
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Quantize."""
    scheme = read_scheme(arguments)
    assert scheme is not None, "--scheme is required"
    try:
        from pochade.quant.bundle import quantize_bundle
    except ImportError as error:
        raise MissingExtraError(f'quantize needs more packages ({error}): pip install "pochade[cpu,quant]"') from None
    from pochade.runtime.locate import resolve

    with ProgressBar(quiet=bool(arguments.quiet)) as bar:
        source = resolve(arguments.bundle)
        quantize_bundle(source, arguments.output, scheme, overwrite=arguments.overwrite, progress=bar.update)
    print(arguments.output)
    return 0


def add_scheme_options(parser: argparse.ArgumentParser, required: bool) -> None:
    """--scheme and what refines it."""
    parser.add_argument("--scheme", choices=SCHEME_NAMES, required=required, help="how weights are stored")
    parser.add_argument("--block-size", type=int, help="inputs that share a scale, for int4 (default: 128)")
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="REGEX=BITS",
        help="keep weights whose component/name matches at 8, 16 or 32 bits; repeatable, the first match counts",
    )


def read_scheme(arguments: argparse.Namespace) -> Scheme | None:
    """Scheme that the options describe, None without --scheme.

    Raises:
        UsageError: options that do not go together.
    """
    if arguments.scheme is None:
        if arguments.block_size is not None or arguments.keep:
            raise UsageError("--block-size and --keep need --scheme")
        return None
    from pochade.quant.scheme import SCHEMES, Keep

    scheme = SCHEMES[arguments.scheme]
    if arguments.block_size is not None:
        if scheme.linear.block_size is None:
            raise UsageError(f"--block-size has no effect with scheme {scheme.name}, which has a scale per channel")
        scheme = scheme.with_block_size(arguments.block_size)
    rules = []
    for text in arguments.keep:
        pattern, _, bits = text.rpartition("=")
        if not pattern or not bits.isdecimal():
            raise UsageError(f"--keep {text!r} is not REGEX=BITS, e.g. 'proj_out=8'")
        rules.append(Keep(pattern, int(bits)))
    return scheme.keeping(rules)
