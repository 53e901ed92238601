"""How long bundles take and how much memory: every round a fresh process for each, taking turns."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pochade.benchmarks.child import read_figures
from pochade.benchmarks.machine_card import machine_card
from pochade.bundle import Bundle
from pochade.errors import InputRefusedError, OutputError, PochadeError
from pochade.quant.trial import small_settings, typical_prompts
from pochade.strict_json import parse_object

BUNDLE_CHILD = "pochade.benchmarks.child"
"""What paints with a bundle in a process of its own."""

FORMAT_VERSION = 1
KIND = "pochade bench"

METRICS: Mapping[str, str] = {
    "cold_open": "open, cold",
    "open": "open",
    "text": "text",
    "step": "step",
    "sampler": "sampler",
    "decode": "decode",
    "picture": "picture",
}
"""Figures in seconds and what tables call them; a bundle without a sampler of its own has none of that."""

Progress = Callable[[str, int, int], None]
Figures = dict[str, Any]
"""What one child reported."""


@dataclass(frozen=True)
class Settings:
    """What every bundle is asked for."""

    prompt: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    device: str
    threads: int | None

    def to_json(self) -> dict[str, Any]:
        """For files."""
        return dict(vars(self))

    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline beside the prompt."""
        names = ("width", "height", "num_inference_steps", "guidance_scale", "seed")
        return {name: getattr(self, name) for name in names}


def default_settings(bundle: Bundle, **given: Any) -> Settings:
    """The bundle's own, but few steps where pictures are large; what is given and not None overrules.

    Args:
        bundle: whose defaults count.
        given: fields of Settings.
    """
    defaults, few = bundle.manifest.defaults, small_settings(bundle)
    values = {
        "prompt": typical_prompts(bundle)[0],
        "width": int(defaults["width"]),
        "height": int(defaults["height"]),
        "num_inference_steps": few["num_inference_steps"],
        "guidance_scale": float(defaults["guidance_scale"]),
        "seed": 7,
        "device": "cpu",
        "threads": None,
    }
    return Settings(**(values | {key: value for key, value in given.items() if value is not None}))


@dataclass
class Case:
    """One bundle and what was measured of it."""

    name: str
    path: Path
    digest: str
    bytes: int
    scorecard: Mapping[str, Any] | None
    runs: list[Figures] = field(default_factory=list)
    """The first has a cold file cache, where the system lets one ask for that."""
    module: str = BUNDLE_CHILD
    """What runs in the process."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further parts of its job."""

    @property
    def opens_meanwhile(self) -> bool:
        """Whether models are opened while a picture is painted, each for its own phase, and not all before."""
        return self.module == BUNDLE_CHILD

    @classmethod
    def of(cls, path: Path) -> Case:
        """An unmeasured one."""
        bundle = Bundle.open(path)
        return cls(bundle.manifest.name, path, bundle.digest, bundle.size, bundle.manifest.scorecard)

    def samples(self, metric: str, runs: Sequence[Figures] | None = None) -> list[float]:
        """Every sample of a figure, in seconds.

        Args:
            metric: key of METRICS; `picture_loaded`, a picture less what opening models takes; or `picture_from_files`,
                a picture with it.
            runs: to take them from; without, all but the first.
        """
        warm = self.runs[1:] if runs is None else runs
        match metric:
            case "cold_open":
                return [_opened(run) for run in self.runs[:1] if run["cold"]]
            case "open":
                return [_opened(run) for run in warm]
            case "text":
                return [sum(_ran(run, r"text_encoder(_\d+)?|condition")) for run in warm]
            case "step":
                return [seconds for run in warm for seconds in step_seconds(run)]
            case "sampler":
                return [seconds for run in warm for seconds in _ran(run, "sampler")]
            case "decode":
                return [seconds for run in warm for seconds in _ran(run, r"\w+_decoder")]
            case "picture_loaded":
                return [run["picture"] - (_opened(run) if self.opens_meanwhile else 0) for run in warm]
            case "picture_from_files":
                return [run["picture"] + (0 if self.opens_meanwhile else _opened(run)) for run in warm]
            case _:
                return [run[metric] for run in warm]

    def median(self, metric: str) -> float | None:
        """Of the samples, None without any."""
        samples = self.samples(metric)
        return statistics.median(samples) if samples else None

    @property
    def peak_rss(self) -> int | None:
        """Largest peak of the processes, in bytes."""
        return self._peak("peak_rss")

    @property
    def peak_vram(self) -> int | None:
        """The same of a card's memory, CUDA's context included; None where the driver tells nothing."""
        return self._peak("peak_vram")

    def _peak(self, kind: str) -> int | None:
        return max((peak for run in self.runs if (peak := run.get(kind))), default=None)

    def to_json(self) -> dict[str, Any]:
        """Everything, and the medians that follow from it."""
        medians = {name: value for name in METRICS if (value := self.median(name)) is not None}
        return {
            "name": self.name,
            "digest": self.digest,
            "bytes": self.bytes,
            "scorecard": self.scorecard,
            "median_seconds": {name: round(value, 6) for name, value in medians.items()},
            "spread_seconds": {name: [round(v, 6) for v in spread(self.samples(name))] for name in medians},
            "peak_rss": self.peak_rss,
            "peak_vram": self.peak_vram,
            "runs": self.runs,
        }


def _opened(run: Figures) -> float:
    return sum(sum(times["opened"]) for times in run["components"].values())


def _ran(run: Figures, pattern: str) -> list[float]:
    """Seconds of every run of the components whose names match."""
    found = (times for name, times in run["components"].items() if re.fullmatch(pattern, name))
    return [seconds for times in found for seconds in times["ran"]]


def step_seconds(run: Figures) -> list[float]:
    """Seconds of each denoise step: its passes of the transformer and, where that is a component, its sampler."""
    passes, draws = _ran(run, "transformer"), _ran(run, "sampler")
    steps = len(draws) or int(run["settings"]["num_inference_steps"])
    per_step = len(passes) // steps
    return [sum(passes[i * per_step : (i + 1) * per_step]) + sum(draws[i : i + 1]) for i in range(steps)]


def spread(samples: Sequence[float]) -> tuple[float, float]:
    """First and third quartile, or least and greatest of fewer than four."""
    if len(samples) < 4:
        return min(samples), max(samples)
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


@dataclass
class Report:
    """A whole measurement, finished or not."""

    settings: Settings
    rounds: int
    cases: list[Case]
    machine: Mapping[str, Any] = field(default_factory=machine_card)

    def to_json(self) -> dict[str, Any]:
        """For files."""
        return {
            "format_version": FORMAT_VERSION,
            "kind": KIND,
            "machine": dict(self.machine),
            "settings": self.settings.to_json(),
            "rounds": self.rounds,
            "bundles": [case.to_json() for case in self.cases],
        }

    def save(self, path: Path, more: Mapping[str, Any] | None = None) -> None:
        """Write it; a half-written file never takes its place.

        Args:
            path: file to write.
            more: entries beside its own.

        Raises:
            OutputError: it cannot be written.
        """
        new = path.with_name(f".{path.name}.new")
        try:
            new.write_text(json.dumps(self.to_json() | dict(more or {}), indent=1, ensure_ascii=False) + "\n", "utf-8")
            new.replace(path)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from None

    def resume(self, path: Path) -> None:
        """Take over the runs in an earlier file of the same measurement.

        Raises:
            InputRefusedError: it is another measurement.
        """
        earlier = read_report(path)
        ours = json.loads(json.dumps(self.to_json()))
        for key in ("settings", "machine"):
            if earlier[key] != ours[key]:
                raise InputRefusedError(str(path), [f"its {key} are not those asked for now; write to another file"])
        known = {row["digest"]: row["runs"] for row in earlier["bundles"]}
        for case in self.cases:
            case.runs = list(known.get(case.digest, []))


def read_report(path: Path) -> dict[str, Any]:
    """A file of `Report.save`.

    Raises:
        InputRefusedError: it is none, or of another version.
    """
    try:
        report = parse_object(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputRefusedError(str(path), [f"it cannot be read ({error})"]) from None
    if report.get("kind") != KIND:
        raise InputRefusedError(str(path), ["pochade bench did not write it"])
    if report.get("format_version") != FORMAT_VERSION:
        version = report.get("format_version")
        raise InputRefusedError(str(path), [f"it has format version {version}, this version reads {FORMAT_VERSION}"])
    return report


def measure(report: Report, progress: Progress, save: Callable[[], None]) -> None:
    """Fill in the missing rounds; every bundle once in each, so that a slow minute of the machine hits all alike.

    Each round begins with another one: the first comes after whatever ran last, which may have taken the files' cache.

    Args:
        report: with the runs there are.
        progress: told before every run.
        save: called after every run.

    Raises:
        PochadeError: a child could not do it.
    """
    for turn in range(report.rounds + 1):
        first = turn % len(report.cases)
        for i, case in enumerate(report.cases[first:] + report.cases[:first]):
            if len(case.runs) > turn:
                continue
            progress(f"measuring {case.name}", turn * len(report.cases) + i, (report.rounds + 1) * len(report.cases))
            case.runs.append(run_once(case, report.settings, cold=turn == 0))
            save()


def run_once(case: Case, settings: Settings, cold: bool) -> Figures:
    """One picture in a process of its own.

    Args:
        case: what paints.
        settings: of the picture.
        cold: whether the bundle's files are dropped from the cache first.

    Raises:
        PochadeError: the process could not do it, with its exit code.
    """
    can_forget = hasattr(os, "posix_fadvise")
    job = {
        **case.extra,
        "bundle": str(case.path),
        "prompt": settings.prompt,
        "settings": settings.call(),
        "device": settings.device,
        "threads": settings.threads,
        "cold": cold,
    }
    command = [sys.executable, "-m", case.module]
    # In a group of its own Ctrl-C reaches this process alone, which then ends the child without its traceback.
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )
    try:
        out, complaint = child.communicate(json.dumps(job))
    except BaseException:
        child.kill()
        child.wait()
        raise
    try:
        figures = read_figures(out)
    except ValueError:
        last = (complaint.strip().splitlines() or ["it said nothing"])[-1]
        how = signal.strsignal(-child.returncode) if child.returncode < 0 else f"exit code {child.returncode}"
        raise PochadeError(f"measuring {case.name} failed ({how}): {last}") from None
    if "error" in figures:
        error = PochadeError(figures["error"])
        error.exit_code = figures["exit_code"]
        raise error
    return figures | {"cold": cold and can_forget}
