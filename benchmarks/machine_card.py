"""What a measurement was made on."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from pochade import __version__, machine

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "numpy", "torch", "openvino")


def machine_card() -> dict[str, Any]:
    """Processor, memory, system and the versions of what computes; values that JSON knows."""
    from pochade.runtime.ort import ort

    return {
        "cpu": machine.cpu_model(),
        "features": machine.cpu_features(),
        "cores": machine.usable_cores(),
        "memory": machine.memory().total,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "pochade": __version__,
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "providers": ort.get_available_providers(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
