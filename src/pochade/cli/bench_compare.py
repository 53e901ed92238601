"""`pochade bench compare A.json B.json`: what became slower, what faster, and what is noise."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from pochade.cli.options import add_json, add_verbosity
from pochade.cli.text import human_size, printable, table
from pochade.errors import UsageError


def register(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the kind of benchmark."""
    parser = kinds.add_parser(
        "compare",
        help="two files of earlier measurements",
        description="Pair the bundles of two files that pochade bench wrote with --json. Ends with exit code 1 if "
        "anything became slower or larger by more than the threshold, beyond noise.",
    )
    parser.add_argument("first", type=Path, metavar="A.json", help="before")
    parser.add_argument("second", type=Path, metavar="B.json", help="after")
    parser.add_argument(
        "--threshold", type=float, default=5.0, metavar="PERCENT", help="that is still no change (default: 5)"
    )
    add_json(parser, "ratios, intervals and verdicts as JSON")
    add_verbosity(parser)
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Compare."""
    from pochade.benchmarks.compare_runs import compare_files
    from pochade.benchmarks.html import seconds

    if not 0 <= arguments.threshold <= 1000:
        raise UsageError(f"--threshold {arguments.threshold:g} cannot be meant; take 0 to 1000 percent")
    threshold = arguments.threshold / 100
    paired = compare_files(arguments.first, arguments.second)
    for note in paired.notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    if arguments.json:
        rows = [
            {
                "bundle": ratio.bundle,
                "metric": ratio.metric,
                "first": ratio.first,
                "second": ratio.second,
                "ratio": round(ratio.value, 4),
                "interval": [round(end, 4) for end in ratio.interval],
                "verdict": ratio.verdict(threshold),
            }
            for ratio in paired.ratios
        ]
        print(json.dumps({"threshold": threshold, "ratios": rows, "notes": list(paired.notes)}, indent=2))
    else:
        cells = [["bundle", "figure", "before", "after", "ratio", "95 %", ""]]
        for ratio in paired.ratios:
            is_memory = ratio.metric == "peak memory"
            values = [human_size(round(v)) if is_memory else seconds(v) for v in (ratio.first, ratio.second)]
            low, high = ratio.interval
            shares = (f"{ratio.value:.3f}", f"{low:.3f} to {high:.3f}")
            cells.append([ratio.bundle, ratio.metric, *values, *shares, ratio.verdict(threshold)])
        print(table(cells))
    return 1 if paired.worse(threshold) else 0
