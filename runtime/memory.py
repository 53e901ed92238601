"""What the process has taken so far, and how it gives memory back."""

from __future__ import annotations

import ctypes
import sys


def peak_memory() -> int | None:
    """Largest resident set of this process so far, in bytes; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """Give what is free on the heap back to the system, where the C library keeps it (glibc)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent in musl, which keeps nothing
        if trim is not None:
            trim(0)
