"""Which execution provider a pipeline runs on, and the truth about it."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass

from pochade.errors import DeviceUnavailableError, UsageError
from pochade.runtime.ort import ort
from pochade.runtime.probe import why_not

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""Execution provider of each device name."""

FLAVOUR = (
    'install the GPU flavour alone: pip uninstall -y onnxruntime onnxruntime-gpu; pip install "pochade[gpu]" '
    "(it needs an NVIDIA driver for CUDA 13)"
)

FIXES = (
    ("libcuda.so|nvcuda.dll|no CUDA-capable device", "install NVIDIA's driver, 580 or newer, on a machine with a card"),
    ("driver version is insufficient", "bring NVIDIA's driver to 580 or newer, which CUDA 13 needs"),
    ("cublas|cudart|curand|cudnn|cufft|nvrtc", 'pip install "pochade[gpu]", which brings CUDA and cuDNN'),
)
"""What mends a reason, by a pattern that is found in it."""


def fix(device: str, reason: str) -> str | None:
    """What a user can do about a device that does not load; None for the CPU, which always does."""
    if device == "cpu":
        return None
    return next((mend for pattern, mend in FIXES if re.search(pattern, reason)), FLAVOUR)


@dataclass(frozen=True)
class Device:
    """Where the sessions of a pipeline run."""

    name: str
    """`cpu` or `cuda`."""
    required: bool
    """Asked for by name: a component that cannot run there is an error, not a silent fall to the CPU."""
    note: str = ""
    """Why `auto` did not take something faster."""
    memory_limit: int | None = None
    """Bytes of a card that each session's allocator may take at most."""

    @property
    def on_gpu(self) -> bool:
        """Whether it is a graphics card, with memory of its own."""
        return self.name != "cpu"

    @property
    def provider(self) -> str:
        """Execution provider name."""
        return PROVIDERS[self.name]

    @property
    def provider_list(self) -> list[str | tuple[str, dict[str, str]]]:
        """What a session is opened with; the CPU stands behind a GPU for shape arithmetic."""
        if self.name == "cpu":
            return [self.provider]
        # The allocator's habit is to double what it takes each time it needs more.
        options = {"arena_extend_strategy": "kSameAsRequested"}
        if self.memory_limit is not None:
            options["gpu_mem_limit"] = str(self.memory_limit)
        return [(self.provider, options), PROVIDERS["cpu"]]


def choose(name: str) -> Device:
    """Device for a name the user gave.

    Args:
        name: `auto`, `cpu` or `cuda`. `auto` takes CUDA when its provider is installed and a session opens on it.

    Raises:
        UsageError: no such device name.
        DeviceUnavailableError: asked for by name and not to be had; says how to get it.
    """
    if name == "cpu":
        return Device("cpu", required=True)
    if name not in ("auto", "cuda"):
        raise UsageError(f"device {name!r} is unknown; choose auto, {', '.join(PROVIDERS)}")
    reason = _why_not_cuda()
    if reason is None:
        return Device("cuda", required=name == "cuda")
    if name == "cuda":
        raise DeviceUnavailableError(f"device cuda cannot be had: {reason}; {fix('cuda', reason)}")
    return Device("cpu", required=False, note=reason if PROVIDERS["cuda"] in ort.get_available_providers() else "")


def find_libraries() -> None:
    """Load the CUDA and cuDNN libraries that pip installed, which no search path of the system names.

    It prints what it misses; whether anything is missing the session says, and `pochade doctor` why.
    """
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(OSError, RuntimeError):
        ort.preload_dlls()


def _why_not_cuda() -> str | None:
    """Reason why no session runs on CUDA here, or None when one does.

    ONNX Runtime lists the provider wherever the GPU wheel is installed and falls back without an error, so only
    a session tells.
    """
    if PROVIDERS["cuda"] not in ort.get_available_providers():
        return "the installed onnxruntime has no CUDA provider"
    find_libraries()
    return why_not(ort, PROVIDERS["cuda"])
