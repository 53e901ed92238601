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

_M_MMAP_THRESHOLD = -3


def _map_large_blocks() -> None:
    """Have glibc map blocks of a megabyte and more, so that a closed session's weights go back to the system.

    Its threshold otherwise grows with the largest block freed, and gigabytes stay with the process.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent in musl, which returns large blocks anyway
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, 1 << 20)


_map_large_blocks()
ort.set_default_logger_severity(3)
