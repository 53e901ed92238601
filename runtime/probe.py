"""Whether an execution provider really opens a session, tried with the smallest model there is."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

# What a log line says is at its end; before it stand colours, time, source line and a function.
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LOG_REASONS = (re.compile(r"with error: (.+)"), re.compile(r"\[E:[^\]]*\] (.+)"))


def why_not(ort: Any, provider: str) -> str | None:
    """Why no session runs on a provider, or None when one does.

    Reads what the libraries write to the process's stderr meanwhile, where alone they say which of them is missing.

    Args:
        ort: the module of ONNX Runtime.
        provider: that it lists; this only says which wheel is installed.
    """
    raised = got = ""
    with _native_stderr() as log:
        try:
            # Without enable_fallback=0, ONNX Runtime prints to stdout and quietly takes the CPU.
            session = ort.InferenceSession(identity_model(), providers=[provider], enable_fallback=0)
            session.run(None, {"x": np.zeros(1, np.float32)})
            got = session.get_providers()[0]
        except Exception as error:  # ONNX Runtime raises a dozen unrelated types here
            raised = " ".join(str(error).split())
        log.seek(0)
        logged = _reason_in_log(log.read().decode(errors="replace"))
    if got == provider:
        return None
    return logged or raised or f"the session ran on {got} instead"


@contextlib.contextmanager
def _native_stderr() -> Iterator[IO[bytes]]:
    """What the libraries write to stderr meanwhile."""
    with tempfile.TemporaryFile() as file:
        try:
            saved = os.dup(2)
        except OSError:  # a windowed program has no stderr
            yield file
            return
        try:
            os.dup2(file.fileno(), 2)
            yield file
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _reason_in_log(text: str) -> str:
    """The first reason in what ONNX Runtime logged, empty where it logged none."""
    plain = _COLOUR.sub("", text)
    found = next((found for pattern in _LOG_REASONS if (found := pattern.search(plain))), None)
    return found[1].strip() if found else ""


def identity_model() -> bytes:
    """ONNX model with one Identity node from `x` to `y`, float32 of shape (1); IR 10, opset 20.

    Written as protobuf fields by hand: the runtime has no onnx package to build it with.
    """

    def field(number: int, payload: bytes | str | int) -> bytes:
        if isinstance(payload, int):
            return bytes([number << 3, payload])
        data = payload.encode() if isinstance(payload, str) else payload
        return bytes([number << 3 | 2, len(data)]) + data

    shape = field(1, field(1, 1))  # TensorShapeProto.dim.dim_value
    tensor_type = field(1, field(1, 1) + field(2, shape))  # TypeProto.tensor_type: elem_type FLOAT, shape
    node = field(1, "x") + field(2, "y") + field(4, "Identity")
    ports = [field(number, field(1, name) + field(2, tensor_type)) for number, name in ((11, "x"), (12, "y"))]
    graph = field(1, node) + field(2, "identity") + b"".join(ports)
    return field(1, 10) + field(7, graph) + field(8, field(2, 20))  # ir_version, graph, opset_import
