"""The only place that imports onnxruntime."""

from __future__ import annotations

import os

from pochade.errors import MissingExtraError
from pochade.runtime.heap import set_up_heap

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

set_up_heap()
ort.set_default_logger_severity(3)
