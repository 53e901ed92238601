"""A progress bar on stderr, only where a person would see it."""

from __future__ import annotations

import os
import shutil
import sys
import time


class ProgressBar:
    """One line that is redrawn: what, how far, how long still. Silent when stderr is no terminal."""

    def __init__(self, quiet: bool = False) -> None:
        # stderr is None in windowed programs.
        self._shown = not quiet and sys.stderr is not None and sys.stderr.isatty()
        self._colour = "NO_COLOR" not in os.environ
        self._start = time.perf_counter()
        self._label = ""
        self._drawn = False

    def update(self, label: str, done: int, total: int, unit: str = "") -> None:
        """Show `done` of `total`; the clock for the time left starts again with every new label."""
        if not self._shown:
            return
        now = time.perf_counter()
        if label != self._label:
            self._label, self._start = label, now
        elapsed = now - self._start
        text = label + self._bar(label, done, total, unit, elapsed) if total else f"{label} …"
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()
        self._drawn = True

    def _bar(self, label: str, done: int, total: int, unit: str, elapsed: float) -> str:
        share = min(done / total, 1.0)
        left = f"{clock(elapsed / share - elapsed)} left" if share > 0.02 else ""
        tail = f" {done}/{total}{unit}  {left}"
        width = max(10, min(40, shutil.get_terminal_size().columns - len(label) - len(tail) - 6))
        filled = round(share * width)
        bar = "━" * filled + ("╺" if filled < width else "") + " " * (width - filled - 1)
        return f" \x1b[36m{bar}\x1b[0m{tail}" if self._colour else f" {bar}{tail}"

    def clear(self) -> None:
        """Take the line away."""
        if self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._drawn = False

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()


def clock(seconds: float) -> str:
    """Duration as m:ss, or h:mm:ss from an hour on."""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
