"""Peaks of memory one component at a time: the kernel's own count, begun anew when a component's session closes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pochade.runtime.heap import return_freed_memory
from pochade.runtime.memory import peak_memory
from pochade.runtime.pipeline import Pipeline
from pochade.runtime.session import ComponentSession

PHASES: Mapping[str, str] = {
    "vae_encoder": "encode",
    "text_encoder": "text",
    "text_encoder_2": "text",
    "condition": "condition",
    "transformer": "denoise",
    "controlnet": "denoise",
    "sampler": "denoise",
    "vq_decoder": "decode",
    "vae_decoder": "decode",
}
"""Phase of a memory plan that a component belongs to."""


def when_closed(pipe: Pipeline, tell: Callable[[str], None], begin: Callable[[], object] = lambda: None) -> None:
    """From now on tell the phase of every component of a pipeline whose session has closed.

    Args:
        pipe: whose sessions are watched.
        tell: called with the phase.
        begin: called before a session is opened.
    """
    opened = pipe._open

    @contextlib.contextmanager
    def watched(name: str, *arguments: Any, **options: Any) -> Iterator[ComponentSession]:
        begin()
        with opened(name, *arguments, **options) as session:
            yield session
        tell(PHASES.get(name, name))

    pipe._open = watched  # type: ignore[method-assign]


class PhasePeaks:
    """Largest resident set of this process in each phase of a call, in bytes.

    What happens between two components counts for the second. Nothing is found where the system cannot begin anew
    (all but Linux).
    """

    def __init__(self, pipe: Pipeline) -> None:
        """Watch a pipeline from now on."""
        self.peaks: dict[str, int] = {}
        if _begin_anew():
            when_closed(pipe, self._take)

    def _take(self, phase: str) -> None:
        peak = peak_memory() or 0
        self.peaks[phase] = max(self.peaks.get(phase, 0), peak)
        # As the pipeline does before it opens the next one: what this one has freed is no part of that.
        return_freed_memory()
        _begin_anew()

    @property
    def largest(self) -> int | None:
        """Of the whole process, as `peak_memory` would tell it without being begun anew."""
        last = peak_memory()
        return max((*self.peaks.values(), last), default=None) if last is not None else None


def _begin_anew() -> bool:
    """Let `peak_memory` count from here on; whether this system can."""
    if sys.platform != "linux":
        return False
    try:
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    except OSError:
        return False
    return True
