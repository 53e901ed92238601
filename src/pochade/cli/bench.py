"""`pochade bench`: measurements that can be repeated and compared."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pochade.cli import bench_compare, bench_peers, bench_quality, bench_speed

DEFAULT = "speed"
KINDS = {DEFAULT: bench_speed, "compare": bench_compare, "peers": bench_peers, "quality": bench_quality}


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "bench",
        help="measure speed, memory or quality",
        usage="pochade bench BUNDLE [BUNDLE ...] | pochade bench KIND ...",
        description="Measure, and say what is noise. Without a KIND: speed and memory of bundles. A bundle that is "
        "called like a kind needs its folder before its name: ./quality.",
    )
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for module in KINDS.values():
        module.register(kinds)


def with_kind(argv: Sequence[str]) -> list[str]:
    """The arguments of the program, with the kind that is meant where `bench` is given bundles alone."""
    named = len(argv) > 1 and argv[1] in (*KINDS, "-h", "--help")
    return [argv[0], DEFAULT, *argv[1:]] if len(argv) > 1 and argv[0] == "bench" and not named else list(argv)
