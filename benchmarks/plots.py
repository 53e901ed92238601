"""Pictures of measurements."""

from __future__ import annotations

from pathlib import Path

from pochade.benchmarks.quality import Quality

REFERENCE, OTHER = "#7f8c9a", "#d1495b"


def plot_quality(quality: Quality, path: Path) -> None:
    """SNR of the components, and right pictures by category with 95 % intervals if they were judged.

    Args:
        quality: what to draw.
        path: file to write; its suffix chooses the format.
    """
    from matplotlib.figure import Figure

    from pochade.starter.evaluate import Share

    panels = 2 if quality.adherence else 1
    figure = Figure(figsize=(5.2 * panels, 4.6), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    floats = {name: d.snr_db for name, d in quality.components.items() if d.signal}
    axes[0].barh(list(floats), list(floats.values()), color=OTHER)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("signal-to-noise ratio of the outputs, dB")
    axes[0].set_title(f"{quality.other.manifest.name} against {quality.reference.manifest.name}", fontsize="medium")
    for y, value in enumerate(floats.values()):
        axes[0].text(value, y, f" {value:.1f}", va="center", fontsize="small")
    axes[0].margins(x=0.12)
    if quality.adherence:
        names = list(quality.adherence)
        for side, colour, offset in (("reference", REFERENCE, -0.16), ("other", OTHER, 0.16)):
            shares = [Share(getattr(shares, side), shares.n) for shares in quality.adherence.values()]
            values = [100 * share.value for share in shares]
            ends = [[100 * end for end in share.interval()] for share in shares]
            axes[1].errorbar(
                values,
                [y + offset for y in range(len(names))],
                xerr=[
                    [max(0.0, v - low) for v, (low, _) in zip(values, ends, strict=True)],
                    [max(0.0, high - v) for v, (_, high) in zip(values, ends, strict=True)],
                ],
                fmt="o",
                markersize=4,
                color=colour,
                label=getattr(quality, side).manifest.name,
            )
        axes[1].set_yticks(range(len(names)), names)
        axes[1].invert_yaxis()
        axes[1].set_xlabel("right pictures, % (95 % Wilson intervals)")
        axes[1].legend(fontsize="small", loc="lower left")
        axes[1].grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
