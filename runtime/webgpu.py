"""WebGPU's execution provider: a plug-in that comes in a package of its own and serves cards of any vendor.

It is not compiled into ONNX Runtime, so a session cannot name it: the library is registered once for the process, and
each session is given the cards that it then lists.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pochade.runtime.ort import ort
from pochade.runtime.probe import FLOAT16, NUMPY_TYPES, one_node_model, why_not

PACKAGE = "onnxruntime_ep_webgpu"
PROVIDER = "WebGpuExecutionProvider"

NO_CARD = "no graphics card is seen that its plug-in can use"


def is_installed() -> bool:
    """Whether the plug-in's package is there; says nothing about a card."""
    return importlib.util.find_spec(PACKAGE) is not None


def why_not_webgpu() -> str | None:
    """Why no session runs on WebGPU here, or None when one does."""
    if not is_installed():
        return "its plug-in is not installed"
    if not hasattr(ort, "register_execution_provider_library"):
        return f"onnxruntime {ort.__version__} takes no plug-ins"
    try:
        if not _cards():
            return NO_CARD
    except Exception as error:  # ONNX Runtime raises a dozen unrelated types here
        return f"its plug-in cannot be loaded: {' '.join(str(error).split())}"
    return why_not(lambda model: open_on_card(model, ort.SessionOptions()), PROVIDER)


@cache
def computes_in_half() -> bool:
    """Whether the card computes in float16, which WebGPU leaves open; to be asked where it runs at all."""
    options = ort.SessionOptions()
    # The CPU would compute it in float32 otherwise, and say nothing.
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return why_not(lambda model: open_on_card(model, options), PROVIDER, "Neg", FLOAT16) is None


@cache
def attends_correctly(element: int) -> bool:
    """Whether the fused attention of the card gives what attention is.

    With version 0.4.0 of the plug-in it is not on SwiftShader; the like of it was seen on cards (onnxruntime pull
    request 28520).

    Args:
        element: type to compute in, of `pochade.runtime.probe`.
    """
    tokens, heads, width = 80, 2, 32
    random = np.random.default_rng(0)
    queries, keys, values = random.standard_normal((3, tokens, heads, width)).astype(NUMPY_TYPES[element])
    shape = (1, tokens, heads * width)
    names = ("queries", "keys", "values")
    model = one_node_model("MultiHeadAttention", element, names, shape, "com.microsoft", num_heads=heads)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = open_on_card(model, options)
        feeds = {name: part.reshape(shape) for name, part in zip(names, (queries, keys, values), strict=True)}
        found = session.run(None, feeds)[0].reshape(tokens, heads, width)
    except Exception:  # ONNX Runtime raises a dozen unrelated types here
        return False
    weights = np.exp(np.einsum("qhw,khw->hqk", queries, keys, dtype=np.float32) * width**-0.5)
    expected = np.einsum("hqk,khw->qhw", weights / weights.sum(-1, keepdims=True), values.astype(np.float32))
    return bool(np.abs(found - expected).max() < 0.02)


def open_on_card(model: Path | bytes, options: Any) -> Any:
    """A session on the first card, the CPU behind it.

    Args:
        model: the graph's file or its content.
        options: of the session; the card is added to them.
    """
    options.add_provider_for_devices(_cards()[:1], {})
    return ort.InferenceSession(model if isinstance(model, bytes) else str(model), options)


@cache
def _cards() -> list[Any]:
    """Cards that the plug-in lists, once its library is registered."""
    library = importlib.import_module(PACKAGE).get_library_path()
    ort.register_execution_provider_library(PACKAGE, library)
    return [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
