"""The whole way at published size with random weights: export, quantize and paint, each in a process of its own.

    python -m pochade.benchmarks.full_size FOLDER [--model meissonic] [--steps 2] [--json FILE]

Writes about 20 GB into FOLDER. What is there from an earlier run is used again, but not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pochade import __version__, machine
from pochade.bundle import Bundle

FORMAT_VERSION = 1
SIZE = {"meissonic": 1024, "monetico": 512}


@dataclass(frozen=True)
class Stage:
    """One command, measured."""

    name: str
    seconds: float
    """Wall-clock time."""
    cpu_seconds: float
    peak_rss: int
    """Largest resident set of the process in bytes, mapped files included."""
    bytes: int
    """Size of what it wrote."""
    report: dict[str, object]
    """What `generate --json` said of timings and peak memory."""


def measure(name: str, command: list[str], output: Path) -> Stage:
    """Run a command as a child and say what it took.

    Raises:
        RuntimeError: it failed; the message holds the end of what it printed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    printed, complaints = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{name} failed: {complaints.decode()[-2000:]}")
    report = json.loads(printed) if "--json" in command else {}
    kept = {key: report[key] for key in ("timings", "peak_memory") if key in report}
    seconds = time.perf_counter() - start
    cpu = usage.ru_utime + usage.ru_stime
    return Stage(name, round(seconds, 2), round(cpu, 2), usage.ru_maxrss * 1024, size_of(output), kept)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def run(folder: Path, model: str, steps: int) -> list[Stage]:
    """Every stage in order."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, side = folder / "checkpoint", str(SIZE[model])
    program = [sys.executable, "-m", "pochade"]
    schemes = ("int8", "int4")
    random = [sys.executable, "-m", "pochade.benchmarks.random_checkpoint"]
    makers: list[tuple[str, list[str], Path]] = [
        ("checkpoint", [*random, model, str(checkpoint)], checkpoint),
        ("export fp32", [*program, "export", str(checkpoint), "-o", str(folder / "fp32")], folder / "fp32"),
    ]
    for scheme in schemes:
        target = folder / scheme
        command = [*program, "quantize", str(folder / "fp32"), "-o", str(target), "--scheme", scheme]
        makers.append((f"quantize {scheme}", command, target))
    stages = [measure(*maker) for maker in makers if not maker[2].exists()]
    for scheme in ("fp32", *schemes):
        picture = folder / f"{scheme}.png"
        command = [*program, "generate", "a photo of a small red house near the lake", "-m", str(folder / scheme)]
        command += ["--size", f"{side}x{side}", "--steps", str(steps), "-s", "7", "-o", str(picture), "--json"]
        stages.append(measure(f"paint {scheme}", command, picture))
    return stages


def table(stages: list[Stage]) -> str:
    """Markdown table of the stages."""
    lines = ["| stage | wall s | CPU s | peak RSS GB | written GB |", "|---|---|---|---|---|"]
    for stage in stages:
        lines.append(
            f"| {stage.name} | {stage.seconds:.1f} | {stage.cpu_seconds:.1f} | {stage.peak_rss / 1e9:.2f} | "
            f"{stage.bytes / 1e9:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure export, quantization and painting at published size.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=SIZE, default="meissonic")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the measurements there")
    arguments = parser.parse_args()
    stages = run(arguments.folder, arguments.model, arguments.steps)
    scorecards = {scheme: Bundle.open(arguments.folder / scheme).manifest.scorecard for scheme in ("int8", "int4")}
    print(table(stages))
    if arguments.json:
        result = {
            "format_version": FORMAT_VERSION,
            "pochade": __version__,
            "machine": {
                "cpu": machine.cpu_model(),
                "features": machine.cpu_features(),
                "cores": machine.usable_cores(),
                "memory": machine.memory().total,
            },
            "model": arguments.model,
            "steps": arguments.steps,
            "stages": [asdict(stage) for stage in stages],
            "scorecards": scorecards,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
