"""What a measurement was made on."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pochade import __version__, machine

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-ep-webgpu", "numpy", "torch", "openvino")


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


def write_report(path: Path | None, kind: str, values: Mapping[str, Any]) -> None:
    """Write what was measured, and on what, as JSON.

    Args:
        path: file to write; None for none.
        kind: of measurement.
        values: that JSON knows.
    """
    if path is not None:
        report = {"kind": kind, "machine": machine_card()} | dict(values)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
