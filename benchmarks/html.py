"""A measurement as one web page that needs nothing else: tables, plots, and what it was made on."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from pochade.benchmarks.plots import BUNDLES
from pochade.benchmarks.speed import METRICS, Case, Report, spread, step_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --paper: #fff; --line: #d5dae0; --soft: #5d6975; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --paper: #16191d; --line: #39414a; --soft: #9aa5b1; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 84rem;
  margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: right; white-space: nowrap; padding: .3rem .6rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
small, dt { color: var(--soft); } dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dd { margin: 0; } .scroll { overflow-x: auto; }
.plots { display: flex; flex-wrap: wrap; gap: 1.5rem; } figure { margin: 0; background: #fff; border-radius: 6px; }
svg { max-width: 100%; height: auto; }
"""

PHASES = ("text", "denoise", "decode", "open")
COLOURS = dict(zip(PHASES, BUNDLES, strict=False))


def page(report: Report) -> str:
    """The whole page."""
    settings, machine = report.settings, report.machine
    measured = [case for case in report.cases if len(case.runs) > 1]
    plots = [_phases, _time_and_memory]
    if any(_fidelity(case) is not None for case in measured):
        plots.append(_size_and_fidelity)
    figures = "".join(f"<figure>{_svg(draw, measured)}</figure>" for draw in plots) if measured else ""
    facts = {
        "picture": f"{settings.width}x{settings.height}, {settings.num_inference_steps} steps, "
        f"guidance {settings.guidance_scale:g}, seed {settings.seed}",
        "prompt": settings.prompt,
        "device": f"{settings.device}, {settings.threads or machine['cores']} threads",
        "processor": f"{machine['cpu']}, {machine['cores']} cores",
        "extensions": " ".join(machine["features"]),
        "memory": f"{(machine['memory'] or 0) / 1e9:.1f} GB",
        "system": f"{machine['system']}, Python {machine['python']}",
        "versions": ", ".join(
            f"{name} {version}" for name, version in {"pochade": machine["pochade"], **machine["versions"]}.items()
        ),
        "rounds": f"{report.rounds}, all bundles taking turns in fresh processes, after one with a cold cache",
    }
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>pochade bench</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style><h1>pochade bench</h1><dl>{rows}</dl>"
        f'<div class="scroll">{_table(report)}</div><div class="plots">{figures}</div></html>\n'
    )


def _table(report: Report) -> str:
    names = ["bundle", "on disk", *METRICS.values(), "peak memory"]
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in _cells(case)) + "</tr>" for case in report.cases if case.runs
    )
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        "<p><small>Medians; below them the first and third quartile. Open: all sessions of a picture. Step: all passes "
        "of the transformer, and the sampler where it is a component. Memory: largest resident set, mapped files "
        "included.</small>"
    )


def _cells(case: Case) -> Iterator[str]:
    yield escape(case.name)
    yield f"{case.bytes / 1e6:,.1f} MB"
    for metric in METRICS:
        samples = case.samples(metric)
        if not samples:
            yield "-"
            continue
        around = f"<br><small>{between(*spread(samples))}</small>" if len(samples) > 1 else ""
        yield f"{seconds(case.median(metric) or 0.0)}{around}"
    yield f"{(case.peak_rss or 0) / 1e6:,.0f} MB"


def seconds(value: float) -> str:
    """A duration in the unit that suits it."""
    return f"{value * 1e3:.1f} ms" if value < 0.9995 else f"{value:.2f} s"


def between(low: float, high: float) -> str:
    """Two durations, the unit said once."""
    return f"{low * 1e3:.1f} to {high * 1e3:.1f} ms" if high < 0.9995 else f"{low:.2f} to {high:.2f} s"


def _svg(draw: Callable[[Axes, Sequence[Case]], None], cases: Sequence[Case]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    draw(figure.subplots(), cases)
    out = io.StringIO()
    # Letters as letters: small, and can be searched for.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pochade"}):
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    return text[text.index("<svg") :]


def _phases(axes: Axes, cases: Sequence[Case]) -> None:
    names = [case.name for case in cases]
    left = [0.0] * len(cases)
    for phase in PHASES:
        values = [_phase(case, phase) for case in cases]
        axes.barh(names, values, left=left, label=phase, color=COLOURS[phase])
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a picture, by phase")
    axes.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)


def _phase(case: Case, phase: str) -> float:
    """Median seconds of a phase."""
    if phase == "denoise":
        return (case.median("step") or 0.0) * len(step_seconds(case.runs[1]))
    return case.median(phase) or 0.0


NEAR = 0.2, 0.04
"""Shares of a plot's width and height within which names would lie on one another."""


def _scatter(axes: Axes, cases: Sequence[Case], place: Callable[[Case], tuple[float, float]]) -> None:
    right, top = (max(values) for values in zip(*map(place, cases), strict=True))
    named: list[tuple[float, float]] = []
    for i, case in enumerate(cases):
        x, y = place(case)
        # A name that would lie on another one goes below its point, and the next one below that.
        near = sum(abs(x - a) < NEAR[0] * right and abs(y - b) < NEAR[1] * top for a, b in named)
        named.append((x, y))
        axes.plot(x, y, "o", color=BUNDLES[i % len(BUNDLES)])
        # Names point to the middle, where they have room.
        side = "left" if x < right / 2 else "right"
        shift = (6 if side == "left" else -6, 4 - 12 * near)
        axes.annotate(case.name, (x, y), xytext=shift, textcoords="offset points", ha=side, fontsize="small")
    axes.set_xlim(0, 1.15 * right)
    axes.set_ylim(0, 1.15 * top)
    axes.grid(alpha=0.3)


def _time_and_memory(axes: Axes, cases: Sequence[Case]) -> None:
    _scatter(axes, cases, lambda case: ((case.peak_rss or 0) / 1e6, case.median("picture") or 0.0))
    axes.set_xlabel("peak memory, MB")
    axes.set_ylabel("seconds a picture")


def _size_and_fidelity(axes: Axes, cases: Sequence[Case]) -> None:
    known = [case for case in cases if _fidelity(case) is not None]
    _scatter(axes, known, lambda case: (case.bytes / 1e6, _fidelity(case) or 0.0))
    axes.set_xlabel("size on disk, MB")
    axes.set_ylabel("fidelity of the transformer, dB")


def _fidelity(case: Case) -> float | None:
    """Signal-to-noise ratio of the transformer in the bundle's scorecard."""
    components: dict[str, Any] = dict((case.scorecard or {}).get("components", {}))
    value = components.get("transformer", {}).get("snr_db")
    return None if value is None else float(value)
