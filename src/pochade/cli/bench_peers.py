"""`pochade bench peers CHECKPOINT BUNDLE ...`: the same picture with other runtimes, taking turns."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pochade.cli import bench_speed
from pochade.cli.options import add_verbosity
from pochade.cli.progress import ProgressBar
from pochade.cli.text import table
from pochade.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from pochade.benchmarks.peers.versus import Advantage

NAMES = {
    "cpu": ("PyTorch fp32", "PyTorch bf16", "OpenVINO bf16", "OpenVINO int8", "OpenVINO int4"),
    "cuda": ("PyTorch fp16", "PyTorch fp16 compiled"),
}
"""Peers that are measured on a device, unless some are named."""

ALL = tuple(dict.fromkeys(name for names in NAMES.values() for name in names))


def register(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the kind of benchmark."""
    parser = kinds.add_parser(
        "peers",
        help="bundles beside PyTorch and OpenVINO",
        description="Paint the same picture with bundles and with other runtimes on the checkpoint they come from, "
        "each in a process of its own, taking turns, and report how many times as long the others take. "
        "Needs pochade[cpu,export,bench].",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder in the published layout")
    parser.add_argument("bundles", metavar="BUNDLE", nargs="+", help="bundle made of it")
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="where OpenVINO's models are kept, made once")
    parser.add_argument(
        "--peer",
        action="append",
        choices=ALL,
        metavar="NAME",
        help="repeatable (default: "
        + "; ".join(f"on {device} {', '.join(names)}" for device, names in NAMES.items())
        + ")",
    )
    bench_speed.add_measuring_options(parser)
    add_verbosity(parser)
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure."""
    bench_speed.check(arguments)
    if arguments.device not in NAMES:
        raise UsageError(f"bench peers measures on {' or '.join(NAMES)}, not on {arguments.device}")
    names = list(dict.fromkeys(arguments.peer or NAMES[arguments.device]))
    variants = [name.split()[1] for name in names if name.startswith("OpenVINO")]
    if variants and arguments.device != "cpu":
        raise UsageError("OpenVINO computes on the CPU; leave its peers away")
    if variants and arguments.models is None:
        raise UsageError("OpenVINO's peers need --models FOLDER, where its models are kept")
    wanted = ["torch", "safetensors"]
    wanted += ["openvino", "nncf"] if variants else []
    if missing := [name for name in wanted if find_spec(name) is None]:
        raise MissingExtraError(
            f'bench peers needs more packages ({", ".join(missing)}): pip install "pochade[cpu,export,bench]"'
        )
    from pochade.benchmarks.peers.versus import advantages, peer_cases

    report = bench_speed.prepare(arguments)
    with ProgressBar(quiet=bool(arguments.quiet)) as bar:
        if variants:
            from pochade.benchmarks.peers.openvino_models import make

            bar.update("making OpenVINO's models", 0, 0)
            make(arguments.checkpoint, arguments.models, variants, report.settings.width, report.settings.height)
    report.cases += peer_cases(arguments.checkpoint, arguments.models, names)
    return bench_speed.measure_and_show(
        report,
        arguments,
        lambda finished: lines(list(advantages(finished))),
        lambda finished: {"advantages": [each.to_json() for each in advantages(finished)]},
    )


def lines(found: list[Advantage]) -> Iterator[str]:
    """How many times as long the others take."""
    if not found:
        return
    yield ""
    metrics = list(dict.fromkeys(each.metric for each in found))
    rows = [["times as long as", "takes", *metrics]]
    for bundle, peer in dict.fromkeys((each.bundle, each.peer) for each in found):
        cells = [each for each in found if (each.bundle, each.peer) == (bundle, peer)]
        rows.append([bundle, peer, *(f"{c.median:.2f} ({min(c.rounds):.2f} to {max(c.rounds):.2f})" for c in cells)])
    yield table(rows)
