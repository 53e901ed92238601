"""What the process takes, and has taken so far."""

from __future__ import annotations

import os
import sys
from pathlib import Path

BARE_PROCESS = 80_000_000
"""Bytes of Python with this runtime loaded, where the system does not tell."""


def peak_memory() -> int | None:
    """Largest resident set of this process so far, in bytes; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    try:
        # Linux gives a new process the peak of the one it was forked from as its ru_maxrss; this begins with it.
        status = Path("/proc/self/status").read_text("ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int | None:
    """Resident set of this process now, in bytes; None where the system does not tell (all but Linux)."""
    try:
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
