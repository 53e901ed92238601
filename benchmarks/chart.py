"""A chart of a comparison: `python -m pochade.benchmarks.chart PEERS.json CHART.png [--names int8=mine]`.

Reads what `pochade bench peers --json` wrote. Bars are medians; needs pochade[bench].
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pochade.benchmarks.peers.versus import PEERS
from pochade.benchmarks.plots import BUNDLES, REFERENCE
from pochade.benchmarks.speed import read_report

PANELS: tuple[tuple[str, Callable[[Mapping[str, Any]], float]], ...] = (
    ("a denoise step, seconds", lambda row: row["median_seconds"]["step"]),
    ("decoding, seconds", lambda row: row["median_seconds"]["decode"]),
    ("peak memory, GB", lambda row: row["peak_rss"] / 1e9),
)


def draw(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], path: Path) -> None:
    """A panel for each figure, a bar for each row, the smallest step first.

    Args:
        rows: `bundles` of a report.
        names: other names for some of them.
        path: file to write; its suffix chooses the format.
    """
    from matplotlib.figure import Figure

    ordered = sorted(rows, key=PANELS[0][1])
    figure = Figure(figsize=(10.4, 0.9 + 0.36 * len(ordered)), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    colours = [REFERENCE if row["name"] in PEERS else BUNDLES[0] for row in ordered]
    for panel, (title, figure_of) in zip(axes, PANELS, strict=True):
        values = [figure_of(row) for row in ordered]
        panel.barh(range(len(values)), values, color=colours)
        for y, value in enumerate(values):
            panel.text(value, y, f" {value:.1f}", va="center", fontsize="small")
        panel.set_xlabel(title)
        panel.margins(x=0.15)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(ordered)), [names.get(row["name"], row["name"]) for row in ordered])
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("chart", type=Path)
    parser.add_argument("--names", nargs="+", default=[], metavar="BUNDLE=NAME", help="what to call bundles")
    arguments = parser.parse_args()
    names = dict(pair.split("=", 1) for pair in arguments.names if "=" in pair)
    draw(read_report(arguments.report)["bundles"], names, arguments.chart)


if __name__ == "__main__":
    main()
