"""Float16 for a graph's products and for what moves their results, float32 for everything else."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pochade.graph_edit import before, constant_values, register

HALF = frozenset({"MatMul", "Gemm", "MatMulNBits", "MultiHeadAttention"})
"""What computes in float16."""

FOLLOWS = frozenset(
    {
        "Reshape",
        "Transpose",
        "Split",
        "Slice",
        "Concat",
        "Squeeze",
        "Unsqueeze",
        "Expand",
        "Identity",
        "FastGelu",
        "Gelu",
    }
)
"""What computes in the type that it is given: it moves numbers, or makes each no larger."""

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)

FINITE = 65504.0
"""Largest float16."""

SCALARS = 64
"""Constants up to so many numbers are narrowed here, and kept finite: minus infinity times 0 is not 0."""


class Narrowing:
    """Float16 for a graph's products and for what moves their results."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._constants = set(constant_values(graph))
        self._narrow: set[ir.Value] = set()
        """Values that were float32 and are float16 now."""
        self._cast: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def apply(self) -> int:
        """Change the graph, and say how many nodes compute in float16 now."""
        changed = 0
        for node in list(self._graph):
            if self._constants.issuperset(node.outputs):
                continue
            _fill_in_types(node)
            if node.op_type in HALF or (node.op_type in FOLLOWS and self._follows(node)):
                changed += self._compute_in_half(node)
            elif node.op_type != "Cast":
                for index, value in enumerate(node.inputs):
                    if value in self._narrow:
                        node.replace_input_with(index, self._as(value, ir.DataType.FLOAT, node))
        for index, value in enumerate(self._graph.outputs):
            if value in self._narrow:
                self._widen_output(index, value)
        return changed

    def _follows(self, node: ir.Node) -> bool:
        """Whether everything that a node moves is float16."""
        moved = [value for value in node.inputs if value is not None and value.dtype in FLOATS]
        return bool(moved) and all(value in self._narrow or value in self._constants for value in moved)

    def _compute_in_half(self, node: ir.Node) -> int:
        """Let a node take and give float16; 1 if that is a change."""
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype is ir.DataType.FLOAT:
                node.replace_input_with(index, self._as(value, ir.DataType.FLOAT16, node))
        wide = [value for value in node.outputs if value.dtype is ir.DataType.FLOAT]
        for value in wide:
            value.dtype = ir.DataType.FLOAT16
        self._narrow.update(wide)
        return int(bool(wide))

    def _as(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node) -> ir.Value:
        """A value in another type, cast once for all its readers."""
        if (value, dtype) not in self._cast:
            stored, maker = value.const_value, value.producer()
            if value in self._constants and value.is_initializer() and stored is not None and stored.size <= SCALARS:
                cast = self._finite(value, stored)
            elif maker is not None and maker.op_type == "DequantizeLinear" and len(value.uses()) == 1:
                # On every run; what it gives is of the type of its scales.
                scales = maker.inputs[1]
                assert scales is not None, f"{maker.name} has no scales"
                maker.replace_input_with(1, self._as(scales, dtype, maker))
                value.dtype = dtype
                cast = value
            else:
                cast = before(reader, "Cast", [value], dtype, to=int(dtype))
            self._cast[value, dtype] = cast
        return self._cast[value, dtype]

    def _finite(self, value: ir.Value, stored: ir.TensorProtocol) -> ir.Value:
        """A small constant in float16, its infinities and what would become one brought to the largest number."""
        half = np.clip(stored.numpy(), -FINITE, FINITE).astype(np.float16)
        return register(self._graph, ir.Tensor(half, name=f"{value.name}.float16"))

    def _widen_output(self, index: int, value: ir.Value) -> None:
        """Give an output of the graph its type back, under its name."""
        last = value.producer()
        assert last is not None, f"output {value.name} is not computed"
        name = value.name
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, name=f"{name}.widened")
        value.name = f"{name}.float16"
        wide = cast.outputs[0]
        wide.name, wide.shape, wide.type = name, value.shape, ir.TensorType(ir.DataType.FLOAT)
        self._graph.append(cast)
        self._graph.outputs[index] = wide


def _fill_in_types(node: ir.Node) -> None:
    """Types of outputs that earlier passes left open; those are of sums and products."""
    for value in node.outputs:
        if value.dtype is None and (first := node.inputs[0]) is not None and first.dtype is not None:
            value.dtype = ir.DataType.FLOAT if first.dtype in FLOATS else first.dtype


def is_half(graph: ir.Graph) -> bool:
    """Whether a graph computes in float16 as it came: its exporter knew what has to be wide."""
    return any(node.op_type in HALF and node.outputs[0].dtype is ir.DataType.FLOAT16 for node in graph)
