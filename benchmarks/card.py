"""What the driver of an NVIDIA card says of it, through NVML's own program: nothing has to be installed."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class PeakMemory:
    """The largest memory of the card that this process was seen to take."""

    def __init__(self) -> None:
        self.bytes: int | None = None
        """None where the driver does not tell."""


def card_memory() -> int | None:
    """Bytes of the card that this process takes, its context included; None where the driver does not tell."""
    rows = query_card("pid,used_gpu_memory", "compute-apps") or []
    own = [row[1] for row in rows if row[0] == str(os.getpid())]
    return int(float(own[0]) * 1024**2) if own and own[0].replace(".", "").isdigit() else None


@contextmanager
def watched_card(device: str, seconds: float = 0.05) -> Iterator[PeakMemory]:
    """Asks for `card_memory` again and again, until the driver does not tell; on `cuda` alone.

    Args:
        device: that is used meanwhile.
        seconds: between two questions.
    """
    peak, done = PeakMemory(), threading.Event()
    if device != "cuda":
        yield peak
        return

    def watch() -> None:
        while (taken := card_memory()) is not None:
            peak.bytes = max(taken, peak.bytes or 0)
            if done.wait(seconds):
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def query_card(fields: str, what: str = "gpu") -> list[list[str]] | None:
    """Rows of nvidia-smi; None without it.

    Args:
        fields: to ask for, as its `--help-query-gpu` names them.
        what: `gpu`, or `compute-apps` for a row for each process.
    """
    command = ["nvidia-smi", f"--query-{what}={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
