"""Pictures of measurements."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pochade.benchmarks.quality import Comparison
from pochade.starter.evaluate import Share

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REFERENCE = "#7f8c9a"
BUNDLES = ("#d1495b", "#2e6f95", "#edae49", "#66a182", "#8d6a9f")


def plot_quality(comparison: Comparison, path: Path) -> None:
    """SNR of the components, and right pictures by category with 95 % intervals if they were judged.

    Args:
        comparison: what to draw.
        path: file to write; its suffix chooses the format.
    """
    from matplotlib.figure import Figure

    judged = bool(comparison.bundles[0].adherence)
    figure = Figure(figsize=(10.4 if judged else 5.2, 4.6), layout="constrained")
    axes = figure.subplots(1, 2 if judged else 1, squeeze=False)[0]
    _components(axes[0], comparison)
    if judged:
        _adherence(axes[1], comparison)
    figure.savefig(path, dpi=120)


def _components(axes: Axes, comparison: Comparison) -> None:
    height = 0.8 / len(comparison.bundles)
    names = [name for name, d in comparison.bundles[0].components.items() if d.signal]
    for i, quality in enumerate(comparison.bundles):
        values = [quality.components[name].snr_db for name in names]
        places = [row + (i + 0.5) * height - 0.4 for row in range(len(names))]
        axes.barh(places, values, height, color=BUNDLES[i % len(BUNDLES)], label=quality.bundle.manifest.name)
        for y, value in zip(places, values, strict=True):
            axes.text(value, y, f" {value:.1f}", va="center", fontsize="small")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("signal-to-noise ratio of the outputs, dB")
    axes.margins(x=0.12)
    # Above the bars, where no bundle's figures can lie beneath it.
    title = f"against {comparison.reference.manifest.name}"
    axes.legend(title=title, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)


def _adherence(axes: Axes, comparison: Comparison) -> None:
    first = comparison.bundles[0].adherence
    # The reference was judged once, so any bundle's pairs hold its shares.
    series = [(comparison.reference, REFERENCE, [Share(pair.reference, pair.n) for pair in first.values()])]
    for i, quality in enumerate(comparison.bundles):
        shares = [Share(pair.other, pair.n) for pair in quality.adherence.values()]
        series.append((quality.bundle, BUNDLES[i % len(BUNDLES)], shares))
    apart = 0.64 / len(series)
    for i, (bundle, colour, shares) in enumerate(series):
        values = [100 * share.value for share in shares]
        ends = [[100 * end for end in share.interval()] for share in shares]
        axes.errorbar(
            values,
            [row + (i + 0.5) * apart - 0.32 for row in range(len(shares))],
            xerr=[
                [max(0.0, v - low) for v, (low, _) in zip(values, ends, strict=True)],
                [max(0.0, high - v) for v, (_, high) in zip(values, ends, strict=True)],
            ],
            fmt="o",
            markersize=4,
            color=colour,
            label=bundle.manifest.name,
        )
    axes.set_yticks(range(len(first)), list(first))
    axes.invert_yaxis()
    axes.set_xlabel("right pictures, % (95 % Wilson intervals)")
    axes.legend(fontsize="small", loc="lower left")
    axes.grid(axis="x", alpha=0.3)
