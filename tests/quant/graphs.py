"""Tiny graphs on disk, as an export would write them, and how to run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

import pochade  # noqa: F401 - before onnxruntime is used: switches its telemetry off
from pochade.machine import saturates

Arrays = Mapping[str, NDArray[np.generic]]

needs_vnni = pytest.mark.skipif(saturates(), reason="8-bit products may overflow here")


def port(name: str, shape: Sequence[str | int] | None, kind: int = TensorProto.FLOAT) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def save(
    path: Path,
    nodes: Sequence[NodeProto],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    weights: Arrays,
) -> Path:
    """Write a graph whose initializers above a kilobyte are external."""
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(list(nodes), "graph", list(inputs), list(outputs), initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    path.parent.mkdir(exist_ok=True)
    ir.save(ir.from_proto(model), path, external_data=f"{path.name}.data", size_threshold_bytes=1024)
    return path


def save_linear(path: Path, weight: NDArray[np.floating], name: str = "w.weight") -> Path:
    """y = x @ weight, with x (tokens, inputs) of the weight's type."""
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    node = helper.make_node("MatMul", ["x", name], ["y"])
    return save(path, [node], [port("x", ["n", len(weight)], kind)], [port("y", None, kind)], {name: weight})


def session(path: Path, optimized: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    # The kernel for signed weights saturates on x86 without VNNI; this one gives the same numbers everywhere.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.log_severity_level = 3  # it warns that the file will hold processor-specific nodes
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(path: Path, **feeds: NDArray[np.generic]) -> NDArray[np.float32]:
    """First output, as float32."""
    outputs = session(path).run(None, dict(feeds))
    return np.asarray(outputs[0]).astype(np.float32)


def initializers(path: Path) -> dict[str, NDArray[np.generic]]:
    values = ir.load(path).graph.initializers.values()
    return {value.const_value.name or "": value.const_value.numpy().copy() for value in values if value.const_value}


def operators(path: Path) -> list[str]:
    """Operators of the main graph, in order."""
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def relative_error(actual: NDArray[np.floating], expected: NDArray[np.floating]) -> float:
    """Root mean square of the difference over that of what is expected."""
    assert actual.shape == expected.shape
    return float(np.sqrt(np.square(actual - expected).mean() / np.square(expected).mean()))
