"""Offline text-to-image on ONNX Runtime, without PyTorch.

>>> import pochade
>>> with pochade.load("starter") as pipe:
...     pipe("a large red star").images[0].save("star.png")
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

# The onnxruntime wheels since 1.29 start an uploader when they are imported, unless this is set before. Every
# module of ours is imported after this line, so no import order of ours can start it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

__version__ = "0.1.0"
__all__ = ["Result", "StepEvent", "__version__", "load"]

if TYPE_CHECKING:
    from pochade.runtime.loading import load
    from pochade.runtime.pipeline import Result, StepEvent

_HOMES = {
    "load": "pochade.runtime.loading",
    "Result": "pochade.runtime.pipeline",
    "StepEvent": "pochade.runtime.pipeline",
}


def __getattr__(name: str) -> object:
    """Import on first use: `import pochade` alone stays free of numpy and onnxruntime."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pochade' has no attribute {name!r}")
