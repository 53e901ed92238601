"""Two measurements side by side: what became slower, what faster, and what is noise."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pochade.benchmarks.speed import METRICS, Case, read_report
from pochade.errors import InputRefusedError, UsageError

SAMPLES = 2000
"""Resamples of the bootstrap (Efron 1979); its seed is fixed, so that equal files give equal verdicts."""


@dataclass(frozen=True)
class Ratio:
    """Second over first of one figure of one bundle."""

    bundle: str
    metric: str
    first: float
    second: float
    """Medians, in seconds or bytes."""
    interval: tuple[float, float]
    """95 % of the ratio of medians."""

    @property
    def value(self) -> float:
        """Above 1 the second is slower or larger."""
        return self.second / self.first

    def verdict(self, threshold: float) -> str:
        """`slower`, `faster` or `noise`; memory is `more` or `less`."""
        words = ("more", "less") if self.metric == "peak memory" else ("slower", "faster")
        if self.value > 1 + threshold and self.interval[0] > 1:
            return words[0]
        if self.value < 1 / (1 + threshold) and self.interval[1] < 1:
            return words[1]
        return "noise"


@dataclass(frozen=True)
class Paired:
    """Two files."""

    ratios: Sequence[Ratio]
    notes: Sequence[str]
    """What differs between the two beside the figures."""

    def worse(self, threshold: float) -> list[Ratio]:
        """Those past the threshold."""
        return [ratio for ratio in self.ratios if ratio.verdict(threshold) in ("slower", "more")]


def compare_files(first: Path, second: Path) -> Paired:
    """Pair bundles of two files by name.

    Raises:
        InputRefusedError: a file is none of `pochade bench`.
        UsageError: what was asked of the bundles differs, or no bundle is in both.
    """
    one, two = read_report(first), read_report(second)
    try:
        settings = [report["settings"] for report in (one, two)]
        unlike = [key for key in settings[0] if settings[0][key] != settings[1].get(key)]
        if unlike:
            said = ", ".join(f"{key} {settings[0][key]!r} and {settings[1].get(key)!r}" for key in unlike)
            raise UsageError(f"{first} and {second} cannot be compared: they differ in {said}")
        cases = [{row["name"]: _case(row) for row in report["bundles"]} for report in (one, two)]
        both = [name for name in cases[0] if name in cases[1]]
        ratios = [ratio for name in both for ratio in _ratios(cases[0][name], cases[1][name])]
        notes = _notes(one["machine"], two["machine"])
        notes += [f"{name} is another bundle now" for name in both if cases[0][name].digest != cases[1][name].digest]
    except (KeyError, TypeError, IndexError, AttributeError, ZeroDivisionError) as error:
        raise InputRefusedError(f"{first} or {second}", [f"figures are missing ({error!r})"]) from None
    if not both:
        raise UsageError(f"{first} and {second} have no bundle in common")
    return Paired(ratios, notes)


def _case(row: Mapping[str, Any]) -> Case:
    return Case(row["name"], Path(row["name"]), row["digest"], row["bytes"], row["scorecard"], row["runs"])


def _ratios(one: Case, two: Case) -> list[Ratio]:
    rng = np.random.default_rng(0)
    out = []
    for metric, name in METRICS.items():
        first, second = one.samples(metric), two.samples(metric)
        # One cold start says nothing of its spread.
        if len(first) > 1 and len(second) > 1:
            interval = _interval(first, second, rng)
            out.append(Ratio(one.name, name, statistics.median(first), statistics.median(second), interval))
    peaks = [[float(run["peak_rss"]) for run in case.runs if run["peak_rss"]] for case in (one, two)]
    if all(peaks):
        first, second = peaks
        interval = _interval(first, second, rng)
        out.append(Ratio(one.name, "peak memory", statistics.median(first), statistics.median(second), interval))
    return out


def _interval(first: Sequence[float], second: Sequence[float], rng: np.random.Generator) -> tuple[float, float]:
    """Percentile bootstrap of the ratio of medians."""
    medians = [np.median(rng.choice(np.asarray(x), (SAMPLES, len(x))), axis=1) for x in (first, second)]
    low, high = np.quantile(medians[1] / medians[0], (0.025, 0.975))
    return float(low), float(high)


def _notes(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    return [f"{key} was {one[key]!r}, is {two[key]!r}" for key in one if one[key] != two.get(key)]
