"""The only place that imports onnxruntime."""

from __future__ import annotations

import ctypes
import os
import sys

from pochade.errors import MissingExtraError

# Set again for whoever cleared it after importing pochade: the uploader starts with the import, not later.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

_FIX = 'install one of its two flavours: pip install "pochade[cpu]" or "pochade[gpu]"'

try:
    import onnxruntime as ort
except ImportError as error:
    raise MissingExtraError(f"onnxruntime cannot be imported ({error}); {_FIX}") from None
if not hasattr(ort, "InferenceSession"):
    # Uninstalling one of two flavours leaves folders behind, which import as an empty module.
    raise MissingExtraError(f"onnxruntime is only left over from an uninstalled package; {_FIX}")

__all__ = ["ort"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_STRIPS = 20 << 20
"""Bytes of the largest blocks that are taken from the heap, and how much of it is kept when free: strips of a codec
have 8 or 16 MB. With more, 32 MB and 64 MB kept, decoding takes a tenth less time and 80 MB more."""


def _set_up_heap() -> None:
    """Have glibc map whole layers, which go back to the system once they are freed, and keep strips in its heap.

    Its threshold otherwise grows with the largest block freed, and gigabytes stay with the process. With one of a
    megabyte every strip was made of fresh pages: half of a decoder's time. Threads share one heap: what is free at the
    end of the others is kept for ever, whatever `malloc_trim` is told.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent in musl, which returns large blocks anyway
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _STRIPS)
            mallopt(_M_TRIM_THRESHOLD, _STRIPS)
            mallopt(_M_ARENA_MAX, 1)


_set_up_heap()
ort.set_default_logger_severity(3)
