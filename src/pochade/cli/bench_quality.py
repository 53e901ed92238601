"""`pochade bench quality`: what bundles lose against the one they come from."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pochade.cli.options import add_verbosity, check_folders
from pochade.cli.progress import ProgressBar
from pochade.cli.text import human_size, table
from pochade.errors import MissingExtraError, OutputError, UsageError

if TYPE_CHECKING:
    from pochade.benchmarks.quality import Comparison, Quality


def register(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the kind of benchmark."""
    quality = kinds.add_parser(
        "quality",
        help="what bundles lose against the one they come from",
        description="Compare bundles of one source: components on the same inputs, tokens and pictures with the "
        "same noise, and for starter bundles how often pictures obey the prompt. Needs pochade[quant,bench].",
    )
    quality.add_argument("reference", metavar="REFERENCE", help="bundle folder or installed name, usually float")
    quality.add_argument("bundles", metavar="BUNDLE", nargs="+", help="one to judge")
    quality.add_argument("--pictures", type=int, default=4, metavar="N", help="pictures to compare (default: 4)")
    quality.add_argument(
        "--adherence",
        type=int,
        default=0,
        metavar="N",
        help="starter bundles: judge N pictures of each category by all (default: none)",
    )
    quality.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="prompt to use; repeatable")
    quality.add_argument("--steps", type=int, help="denoise steps (default: the bundle's; 4 where pictures are large)")
    quality.add_argument("--seed", type=int, default=0, help="of the first picture; the next ones count up")
    quality.add_argument("--json", type=Path, metavar="FILE", help="also write everything there")
    quality.add_argument("--plot", type=Path, metavar="FILE", help="also draw it: .png, .svg or .pdf")
    add_verbosity(quality)
    quality.set_defaults(func=run_quality)


def run_quality(arguments: argparse.Namespace) -> int:
    """Compare bundles."""
    if arguments.pictures < 1 or arguments.adherence < 0 or arguments.seed < 0:
        raise UsageError("--pictures must be at least 1, --adherence and --seed at least 0")
    check_folders(arguments.json, arguments.plot)
    if arguments.plot is not None and arguments.plot.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot {arguments.plot} must end in .png, .svg or .pdf")
    wanted = ["scipy", "onnx_ir", *(["matplotlib"] if arguments.plot is not None else [])]
    if missing := [name for name in wanted if find_spec(name) is None]:
        raise MissingExtraError(
            f'bench quality needs more packages ({", ".join(missing)}): pip install "pochade[cpu,quant,bench]"'
        )
    from pochade.benchmarks.plots import plot_quality
    from pochade.benchmarks.quality import compare
    from pochade.bundle import Bundle
    from pochade.runtime.locate import resolve

    with ProgressBar(quiet=bool(arguments.quiet)) as bar:
        comparison = compare(
            Bundle.open(resolve(arguments.reference)),
            [Bundle.open(resolve(name)) for name in arguments.bundles],
            pictures=arguments.pictures,
            adherence=arguments.adherence,
            prompts=arguments.prompt,
            seed=arguments.seed,
            steps=arguments.steps,
            progress=bar.update,
        )
    print("\n".join(report(comparison)))
    try:
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(comparison.to_json(), indent=2, ensure_ascii=False) + "\n", "utf-8")
        if arguments.plot is not None:
            plot_quality(comparison, arguments.plot)
    except OSError as error:
        raise OutputError(f"cannot write {error.filename}: {error.strerror}") from None
    return 0


def report(comparison: Comparison) -> Iterator[str]:
    """The comparison as tables."""
    one, settings = comparison.reference, comparison.settings
    for quality in comparison.bundles:
        other = quality.bundle
        yield f"{other.manifest.name} ({human_size(other.size)}) against {one.manifest.name} ({human_size(one.size)})"
        yield (
            f"{settings['pictures']} pictures of {settings['width']}x{settings['height']}, "
            f"{settings['num_inference_steps']} steps, seeds from {settings['seed']}"
        )
        yield ""
        yield from _one(quality, one.manifest.name)
        if quality is not comparison.bundles[-1]:
            yield ""


def _one(quality: Quality, reference: str) -> Iterator[str]:
    """What one bundle loses."""
    rows = [["component, on the reference's inputs", "SNR", "equal"]]
    for name, difference in quality.components.items():
        snr = _db(difference.snr_db) if difference.signal else "-"
        rows.append([name, snr, f"{difference.agreement:.2%}" if difference.counted else "-"])
    yield table(rows)
    yield ""
    if quality.forced.counted:
        yield f"tokens drawn, every step from the reference's grid: {quality.forced.agreement:.2%} equal"
    if quality.token_agreement is not None:
        yield f"tokens of the final grid, every step from its own: {quality.token_agreement:.2%} equal"
    pictures = quality.pictures
    yield (
        f"pictures with the same noise: PSNR {_db(pictures.psnr_db)}, SSIM {pictures.ssim:.3f} (medians; the "
        f"reference with other noise: {_db(pictures.other_seed_psnr_db)}, {pictures.other_seed_ssim:.3f})"
    )
    if quality.adherence:
        yield ""
        yield from _adherence(quality, reference)


def _db(value: float) -> str:
    """A ratio in dB; the one that stands for no difference in words."""
    from pochade.quant.fidelity import CEILING_DB

    return "infinite" if value >= CEILING_DB else f"{value:.1f} dB"


def _adherence(quality: Quality, reference: str) -> Iterator[str]:
    """Right pictures by category."""
    from pochade.benchmarks.quality import LEVEL

    rows = [["right pictures", reference, quality.bundle.manifest.name, "points", "p", ""]]
    for category, shares in quality.adherence.items():
        rows.append(
            [
                category,
                f"{shares.reference}/{shares.n} {shares.reference / shares.n:.1%}",
                f"{shares.other}/{shares.n} {shares.other / shares.n:.1%}",
                f"{shares.difference:+.1f}",
                f"{shares.p_value:.3f}",
                shares.verdict,
            ]
        )
    yield table(rows)
    yield f"p: exact McNemar test on the same prompts and seeds; {LEVEL:g} and above is called noise"
