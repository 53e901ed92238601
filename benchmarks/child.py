"""One measurement in a process of its own: `python -m pochade.benchmarks.child`, a job on stdin, figures on stdout.

Nothing is imported before the clock runs but what Python starts with, so that the time to import counts, and the peak
of memory is that of a program which does nothing else.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pochade.benchmarks.phase_peaks import PhasePeaks
    from pochade.runtime.pipeline import Pipeline


def main() -> None:
    """Do the job."""
    job = json.load(sys.stdin)
    if job["cold"]:
        forget(Path(job["bundle"]))
    start = time.perf_counter()
    import pochade
    from pochade.benchmarks.card import watched_card
    from pochade.errors import PochadeError

    try:
        options = {key: job.get(key) for key in ("device", "threads", "ram", "vram")}
        with watched_card(job["device"]) as card, pochade.load(job["bundle"], **options) as pipe:
            watched = _watched(pipe) if job.get("phases") else None
            loaded = time.perf_counter()
            result = pipe(job["prompt"], **job["settings"])
            painted = time.perf_counter()
            threads, plan = pipe.threads, pipe.plan
    except PochadeError as error:
        print(json.dumps({"error": str(error), "exit_code": error.exit_code}))
        return
    print(
        json.dumps(
            {
                "import_and_load": loaded - start,
                "picture": painted - loaded,
                "cpu": time.process_time(),
                "peak_rss": watched.largest if watched else result.peak_memory,
                "peak_vram": card.bytes,
                "phase_peaks": watched.peaks if watched else None,
                "planned_peak": plan.peak if plan else None,
                "plan": plan.lines()[1:] if plan else None,
                "planned_peaks": {name: way.peak for name, way in plan.phases.items()} if plan else None,
                "threads": threads,
                "providers": dict(result.providers),
                "components": {name: asdict(times) for name, times in result.components.items()},
                "settings": {key: result.settings[key] for key in ("width", "height", "device")}
                | {key: result.settings[key] for key in ("num_inference_steps", "guidance_scale")},
            }
        )
    )


def _watched(pipe: Pipeline) -> PhasePeaks:
    from pochade.benchmarks.phase_peaks import PhasePeaks

    return PhasePeaks(pipe)


def forget(bundle: Path) -> bool:
    """Ask the system to drop a bundle's files from its cache, so that they are read from the disk again.

    Returns:
        Whether this system can be asked.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in bundle.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return True


def read_figures(text: str) -> dict[str, Any]:
    """What a child printed, its last line: libraries may have printed before.

    Raises:
        ValueError: it is nothing of the kind.
    """
    lines = text.strip().splitlines()
    figures = json.loads(lines[-1]) if lines else None
    if not isinstance(figures, dict):
        raise ValueError("no figures")
    return figures


if __name__ == "__main__":
    main()
