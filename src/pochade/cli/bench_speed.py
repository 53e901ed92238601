"""`pochade bench BUNDLE ...`: how long bundles take, and how much memory."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pochade.cli.options import add_verbosity, check_folders
from pochade.cli.progress import ProgressBar
from pochade.cli.text import human_size, table
from pochade.errors import MissingExtraError, OutputError, UsageError
from pochade.sizes import read_picture_size

if TYPE_CHECKING:
    from pochade.benchmarks.speed import Report

ROUNDS, QUICK_ROUNDS = 5, 2
QUICK_STEPS = 2


def register(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the kind of benchmark."""
    parser = kinds.add_parser(
        "speed",
        help="time and memory of bundles (what is meant without a KIND)",
        usage="pochade bench BUNDLE [BUNDLE ...] [options]",
        description="Paint with every bundle in a fresh process per round, taking turns, and report medians of every "
        "phase, the peak of memory and the size on disk.",
    )
    parser.add_argument("bundles", metavar="BUNDLE", nargs="+", help="bundle folder or installed name")
    add_measuring_options(parser)
    add_verbosity(parser)
    parser.set_defaults(func=run)


def add_measuring_options(parser: argparse.ArgumentParser) -> None:
    """What to paint, how often, and where to keep what comes out."""
    parser.add_argument("--prompt", help="what to paint (default: what the first bundle's model is asked for)")
    parser.add_argument("--size", metavar="WxH", help="of the picture (default: the first bundle's)")
    parser.add_argument("--steps", type=int, help="denoise steps (default: the first bundle's; 4 for large pictures)")
    parser.add_argument("--guidance", type=float, help="guidance (default: the first bundle's)")
    parser.add_argument("--seed", type=int, help="of the picture (default: 7)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or webgpu (default: cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores of this process)")
    parser.add_argument("--rounds", type=int, help=f"after one with a cold file cache (default: {ROUNDS})")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds of {QUICK_STEPS} steps at most")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep everything there, after every run")
    parser.add_argument("--resume", action="store_true", help="go on with what an interrupted run left in --json")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with plots; needs pochade[bench]")


def run(arguments: argparse.Namespace) -> int:
    """Measure."""
    check(arguments)
    return measure_and_show(prepare(arguments), arguments)


def prepare(arguments: argparse.Namespace) -> Report:
    """What is to be measured, with nothing measured yet."""
    from pochade.benchmarks.speed import Case, Report, default_settings
    from pochade.bundle import Bundle
    from pochade.runtime.locate import resolve

    paths = [resolve(name) for name in arguments.bundles]
    width, height = (None, None) if arguments.size is None else read_picture_size(arguments.size)
    first = Bundle.open(paths[0])
    quick_steps = min(QUICK_STEPS, int(first.manifest.defaults["num_inference_steps"])) if arguments.quick else None
    settings = default_settings(
        first,
        prompt=arguments.prompt,
        width=width,
        height=height,
        num_inference_steps=arguments.steps or quick_steps,
        guidance_scale=arguments.guidance,
        seed=arguments.seed,
        device=arguments.device,
        threads=arguments.threads,
    )
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    report = Report(settings, rounds, [Case.of(path) for path in paths])
    _unlike_names(report)
    return report


def measure_and_show(
    report: Report,
    arguments: argparse.Namespace,
    more_lines: Callable[[Report], Iterable[str]] = lambda _: (),
    more_json: Callable[[Report], dict[str, Any]] = lambda _: {},
) -> int:
    """Measure what is missing, and show what there is even when that is interrupted.

    Args:
        report: with the cases to measure.
        arguments: of the command line.
        more_lines: what else to print of the report.
        more_json: what else to keep of it.
    """
    from pochade.benchmarks.speed import measure

    if arguments.json is not None and arguments.resume and arguments.json.exists():
        report.resume(arguments.json)

    def save() -> None:
        if arguments.json is not None:
            report.save(arguments.json, more_json(report))

    try:
        with ProgressBar(quiet=bool(arguments.quiet)) as bar:
            measure(report, bar.update, save)
    finally:
        # Ctrl-C keeps what was measured.
        if any(case.runs for case in report.cases):
            print("\n".join([*lines(report), *more_lines(report)]))
            if arguments.html is not None:
                _write_page(report, arguments.html)
    return 0


def lines(report: Report) -> Iterator[str]:
    """The measurement as a table."""
    from pochade.benchmarks.html import seconds
    from pochade.benchmarks.speed import METRICS

    settings = report.settings
    yield (
        f"{settings.width}x{settings.height}, {settings.num_inference_steps} steps, guidance "
        f"{settings.guidance_scale:g}, {settings.device}, {settings.threads or report.machine['cores']} threads, "
        f"medians of {report.rounds} rounds"
    )
    yield ""
    on_card = any(case.peak_vram for case in report.cases)
    rows = [["bundle", "on disk", *METRICS.values(), "peak memory", *(["of the card"] if on_card else [])]]
    for case in report.cases:
        medians = [case.median(metric) if case.runs else None for metric in METRICS]
        peaks = [case.peak_rss, *([case.peak_vram] if on_card else [])]
        rows.append(
            [
                case.name,
                human_size(case.bytes),
                *("-" if value is None else seconds(value) for value in medians),
                *("-" if peak is None else human_size(peak) for peak in peaks),
            ]
        )
    yield table(rows)


def check(arguments: argparse.Namespace) -> None:
    """Refuse options that cannot be meant before anything is loaded."""
    for name in ("rounds", "steps", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}; it must be at least 1")
    if arguments.resume and arguments.json is None:
        raise UsageError("--resume needs --json FILE, where the interrupted run kept what it measured")
    check_folders(arguments.json, arguments.html)
    if arguments.html is not None and find_spec("matplotlib") is None:
        raise MissingExtraError('--html needs matplotlib: pip install "pochade[bench]"')


def _unlike_names(report: Report) -> None:
    """Tables and later comparisons tell bundles apart by their names."""
    names = [case.name for case in report.cases]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"two bundles are called {', '.join(twice)}; measure each once, or name its folder otherwise")


def _write_page(report: Report, path: Path) -> None:
    from pochade.benchmarks.html import page

    try:
        path.write_text(page(report), "utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from None
