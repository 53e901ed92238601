"""Which execution provider a pipeline runs on, and the truth about it."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pochade.errors import DeviceUnavailableError, UsageError
from pochade.runtime import webgpu
from pochade.runtime.ort import ort
from pochade.runtime.probe import FLOAT, FLOAT16, why_not

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "webgpu": webgpu.PROVIDER}
"""Execution provider of each device name."""

WIDE_SPLIT = "GatherSliceToSplitFusion"
"""Optimizer of ONNX Runtime that makes one Split of slices. CUDA's kernel for more than 32 parts copies a table of them
from the host on every run."""

FLAVOUR = (
    'install the GPU flavour alone: pip uninstall -y onnxruntime onnxruntime-gpu; pip install "pochade[gpu]" '
    "(it needs an NVIDIA driver for CUDA 13)"
)

WEBGPU_FLAVOUR = 'pip install "pochade[webgpu]"'

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
    if device == "webgpu":
        if webgpu.is_installed():
            return "install the card's driver, on Linux one for Vulkan and libvulkan.so.1"
        return f"{WEBGPU_FLAVOUR}, which brings it"
    return next((mend for pattern, mend in FIXES if re.search(pattern, reason)), FLAVOUR)


@dataclass(frozen=True)
class Device:
    """Where the sessions of a pipeline run."""

    name: str
    """`cpu`, `cuda` or `webgpu`."""
    required: bool
    """Asked for by name: a component that cannot run there is an error, not a silent fall to the CPU."""
    note: str = ""
    """Why `auto` did not take something faster."""
    memory_limit: int | None = None
    """Bytes of a card that each session's allocator may take at most; WebGPU's cannot be held to any."""
    half: bool = True
    """Whether it computes in float16."""
    attends: bool = True
    """Whether its fused attention gives what attention is."""

    @property
    def is_partial(self) -> bool:
        """Whether it has kernels for some components alone; the others are computed on the CPU, whole."""
        return self.name == "webgpu"

    @property
    def loops(self) -> bool:
        """Whether it runs loops of a graph itself; else what a turn reads goes up with each turn."""
        return self.name != "webgpu"

    @property
    def on_gpu(self) -> bool:
        """Whether it is a graphics card, with memory of its own."""
        return self.name != "cpu"

    @property
    def provider(self) -> str:
        """Execution provider name."""
        return PROVIDERS[self.name]

    def open(self, model: Path | bytes, options: Any, captures: bool = False) -> Any:
        """A session of a graph; the CPU stands behind a card for shape arithmetic.

        Args:
            model: the graph's file or its content.
            options: of the session.
            captures: let runs be captured as CUDA graphs; on CUDA alone.
        """
        if self.name == "webgpu":
            return webgpu.open_on_card(model, options)
        source = model if isinstance(model, bytes) else str(model)
        # A captured graph reads what lies at the host's addresses of then, so nothing may come from there.
        disabled = [WIDE_SPLIT] if captures else None
        return ort.InferenceSession(
            source, options, providers=self._provider_list(captures), disabled_optimizers=disabled
        )

    def _provider_list(self, captures: bool) -> list[str | tuple[str, dict[str, str]]]:
        if self.name == "cpu":
            return [self.provider]
        options = {
            # The allocator's habit is to double what it takes each time it needs more.
            "arena_extend_strategy": "kSameAsRequested",
            # By habit each new shape of a convolution tries all of cuDNN's algorithms, a third of a second to one, and
            # memory for them; a session decodes one picture. github.com/microsoft/onnxruntime/issues/19838 and 22705.
            "cudnn_conv_algo_search": "HEURISTIC",
        }
        if self.memory_limit is not None:
            options["gpu_mem_limit"] = str(self.memory_limit)
            # Else cuDNN may choose what needs more work space than there is (see `codec_memory.CUDNN_WORK_SPACE`).
            options["cudnn_conv_use_max_workspace"] = "0"
        if captures:
            options["enable_cuda_graph"] = "1"
        return [(self.provider, options), PROVIDERS["cpu"]]


CPU = Device("cpu", required=True)


def choose(name: str) -> Device:
    """Device for a name the user gave.

    Args:
        name: `auto`, `cpu`, `cuda` or `webgpu`. `auto` takes CUDA when its provider is installed and a session opens
            on it. It never takes WebGPU, whose card may be slower than the processor beside it.

    Raises:
        UsageError: no such device name.
        DeviceUnavailableError: asked for by name and not to be had; says how to get it.
    """
    if name == "cpu":
        return CPU
    if name not in ("auto", *PROVIDERS):
        raise UsageError(f"device {name!r} is unknown; choose auto, {', '.join(PROVIDERS)}")
    reason = webgpu.why_not_webgpu() if name == "webgpu" else _why_not_cuda()
    if reason is None:
        device = Device("cuda" if name == "auto" else name, required=name != "auto")
        if name != "webgpu":
            return device
        half = webgpu.computes_in_half()
        return replace(device, half=half, attends=webgpu.attends_correctly(FLOAT16 if half else FLOAT))
    if name != "auto":
        raise DeviceUnavailableError(f"device {name} cannot be had: {reason}; {fix(name, reason)}")
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
    return why_not_listed(PROVIDERS["cuda"])


def why_not_listed(provider: str) -> str | None:
    """Why no session runs on a provider that is compiled into the installed onnxruntime, or None when one does."""
    if provider == PROVIDERS["cuda"]:
        find_libraries()
    # Without enable_fallback=0, ONNX Runtime prints to stdout and quietly takes the CPU.
    return why_not(lambda model: ort.InferenceSession(model, providers=[provider], enable_fallback=0), provider)
