"""Holds limits of memory against what is taken: every case in a process of its own, as predicted and as measured.

python -m pochade.benchmarks.budgets BUNDLE [BUNDLE ...] --sizes 512x512 1024x1024 --ram none 1G 1.2G [--json FILE]

A prediction that is exceeded, of the whole or of a phase, and a limit that is, end it with exit code 1. Limits that are
refused are told. Phases are measured where the system lets a process count its peak anew (Linux).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pochade.benchmarks.machine_card import write_report
from pochade.benchmarks.speed import Case, default_settings, run_once
from pochade.bundle import Bundle
from pochade.errors import OutOfBudgetError, PochadeError
from pochade.runtime.locate import resolve
from pochade.sizes import read_bytes, read_picture_size, show_bytes


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE")
    parser.add_argument("--sizes", nargs="+", default=["512x512"], metavar="SIZE")
    parser.add_argument("--ram", nargs="+", default=["none"], metavar="LIMIT", help="none, or a size such as 1.2G")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    print("| bundle | size | limit | predicted | measured | ratio | seconds of CPU |")
    print("|---|---|---|---|---|---|---|")
    for name, size, limit in itertools.product(args.bundles, args.sizes, args.ram):
        case = Case.of(resolve(name))
        width, height = read_picture_size(size)
        settings = default_settings(Bundle.open(case.path), width=width, height=height, num_inference_steps=args.steps)
        ram = None if limit == "none" else read_bytes(limit, "--ram")
        row: dict[str, Any] = {"bundle": case.name, "size": size, "steps": args.steps, "ram": ram}
        try:
            figures = run_once(replace(case, extra={"ram": ram, "phases": True}), settings, cold=False)
        except PochadeError as error:
            if error.exit_code != OutOfBudgetError.exit_code:
                raise
            row["refused"] = str(error)
            print(f"| {case.name} | {size} | {limit} | refused: {error} | | | |", flush=True)
        else:
            row |= {key: figures[key] for key in ("planned_peak", "peak_rss", "cpu", "threads", "plan")}
            row |= {key: figures[key] for key in ("planned_peaks", "phase_peaks", "components")}
            ratio = row["planned_peak"] / row["peak_rss"]
            cells = (show_bytes(row["planned_peak"]), show_bytes(row["peak_rss"]), f"{ratio:.3f}", f"{row['cpu']:.0f}")
            print(f"| {case.name} | {size} | {limit} | {' | '.join(cells)} |", flush=True)
            for line in _phases(row):
                print(line, flush=True)
        rows.append(row)
        write_report(args.json, "pochade budgets", {"rows": rows})
    return int(any(_exceeded(row) for row in rows))


def _phases(row: dict[str, Any]) -> Iterator[str]:
    """A line of the table for each phase that was measured."""
    for name, planned in row["planned_peaks"].items():
        if found := row["phase_peaks"].get(name):
            yield f"| | {name} | | {show_bytes(planned)} | {show_bytes(found)} | {planned / found:.3f} | |"


def _exceeded(row: dict[str, Any]) -> bool:
    """Whether more was taken than predicted, or than allowed."""
    if "refused" in row:
        return False
    if any(row["phase_peaks"].get(name, 0) > planned for name, planned in row["planned_peaks"].items()):
        return True
    return bool(row["peak_rss"] > min(row["planned_peak"], row["ram"] or row["planned_peak"]))


if __name__ == "__main__":
    raise SystemExit(main())
