"""Whether an execution provider really opens a session, tried with the smallest model there is."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import numpy as np

# What a log line says is at its end; before it stand colours, time, source line and a function.
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LOG_REASONS = (re.compile(r"with error: (.+)"), re.compile(r"\[E:[^\]]*\] (.+)"))


FLOAT, FLOAT16 = 1, 10
"""Element types, as ONNX numbers them (onnx.proto, TensorProto.DataType)."""

NUMPY_TYPES = {FLOAT: np.float32, FLOAT16: np.float16}


def why_not(
    open_session: Callable[[bytes], Any], provider: str, operator: str = "Identity", element: int = FLOAT
) -> str | None:
    """Why no session runs on a provider, or None when one does.

    Reads what the libraries write to the process's stderr meanwhile, where alone they say which of them is missing.

    Args:
        open_session: on the provider, of such a model.
        provider: its name.
        operator: that it must compute.
        element: type of what it computes.
    """
    raised = got = ""
    with _native_stderr() as log:
        try:
            session = open_session(one_node_model(operator, element))
            session.run(None, {"x": np.zeros(1, NUMPY_TYPES[element])})
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


def one_node_model(
    operator: str = "Identity",
    element: int = FLOAT,
    inputs: Sequence[str] = ("x",),
    shape: Sequence[int] = (1,),
    domain: str = "",
    **integers: int,
) -> bytes:
    """ONNX model with one node whose inputs and output `y` have one type and shape; IR 10, opset 20.

    Written as protobuf fields by hand: the runtime has no onnx package to build it with.

    Args:
        operator: of the node.
        element: type, `FLOAT` or `FLOAT16`.
        inputs: their names.
        shape: of each.
        domain: of the operator.
        **integers: its attributes.
    """

    def varint(value: int) -> bytes:
        return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)

    def field(number: int, payload: bytes | str | int) -> bytes:
        if isinstance(payload, int):
            return varint(number << 3) + varint(payload)
        data = payload.encode() if isinstance(payload, str) else payload
        return varint(number << 3 | 2) + varint(len(data)) + data

    dims = b"".join(field(1, field(1, size)) for size in shape)  # TensorShapeProto.dim.dim_value
    tensor_type = field(1, field(1, element) + field(2, dims))  # TypeProto.tensor_type: elem_type, shape
    # AttributeProto: name, i, type INT.
    attributes = [field(1, name) + field(3, value) + field(20, 2) for name, value in integers.items()]
    node = b"".join(field(1, name) for name in inputs) + field(2, "y") + field(4, operator)
    node += b"".join(field(5, attribute) for attribute in attributes) + field(7, domain)
    ports = [field(11, field(1, name) + field(2, tensor_type)) for name in inputs]
    ports.append(field(12, field(1, "y") + field(2, tensor_type)))
    graph = field(1, node) + field(2, "probe") + b"".join(ports)
    versions = field(8, field(2, 20)) + field(8, field(1, "com.microsoft") + field(2, 1))
    return field(1, 10) + field(7, graph) + versions  # ir_version, graph, opset_import
