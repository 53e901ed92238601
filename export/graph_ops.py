"""A small builder for graphs that are written by hand rather than traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from pochade.export.trace import IR_VERSION, OPSET


class GraphOps:
    """Records nodes in order: `ops.MatMul(a, b)` appends one and returns its output."""

    def __init__(self, prefix: str = "") -> None:
        # A subgraph sees the names of the graph around it, so its own need a prefix.
        self._prefix = prefix
        self._tape = tape.Tape()
        self.constants: list[ir.Value] = []

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """Nodes so far."""
        return self._tape.nodes

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        """Operator of that name; keyword arguments are attributes, `_outputs` asks for several results."""
        if op_type.startswith("_"):
            raise AttributeError(op_type)

        def append(*inputs: ir.Value | None, _outputs: int = 1, **attributes: Any) -> Any:
            values = self._tape.op_multi_out(op_type, inputs, attributes, num_outputs=_outputs)
            for i, value in enumerate(values):
                value.name = f"{self._prefix}{op_type}_{len(self.nodes)}_{i}"
            return values[0] if _outputs == 1 else values

        return append

    def ints(self, name: str, values: Sequence[int] | int) -> ir.Value:
        """Named int64 constant."""
        return self._constant(name, np.array(values, np.int64))

    def floats(self, name: str, values: Sequence[float] | float) -> ir.Value:
        """Named float32 constant."""
        return self._constant(name, np.array(values, np.float32))

    def true(self, name: str) -> ir.Value:
        """Named constant: true."""
        return self._constant(name, np.array(True))

    def _constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.constants.append(value)
        return value


def component_model(
    name: str,
    op: GraphOps,
    inputs: Mapping[str, ir.Value],
    outputs: Mapping[str, ir.Value],
    dtype: ir.DataType,
    shape: Sequence[int | str],
    weights: Sequence[ir.Value] = (),
) -> ir.Model:
    """What was recorded, as the graph of a component whose outputs are alike.

    Args:
        name: of the component.
        op: its nodes and constants.
        inputs: ports by their names, in order.
        outputs: values by the names that they get.
        dtype: of all outputs.
        shape: of all outputs.
        weights: initializers beside the constants.
    """
    for port_name, value in outputs.items():
        value.name, value.shape, value.type = port_name, ir.Shape(shape), ir.TensorType(dtype)
    graph = ir.Graph(
        list(inputs.values()),
        list(outputs.values()),
        nodes=op.nodes,
        initializers=[*weights, *op.constants],
        opset_imports={"": OPSET},
        name=name,
    )
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="pochade")


def port(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    """Typed value to be a graph's input."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
