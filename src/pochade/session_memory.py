"""What an opened session holds of a graph's weights; for export and quantization, which have onnx_ir."""

from __future__ import annotations

import onnx_ir as ir

FOLDED = ("Cast", "Mul")
"""Operators by which weights are expanded; of constants, ONNX Runtime computes them while it opens a session."""


def weight_bytes(model: ir.Model) -> int:
    """Bytes of the constants that remain once those that can be computed are, and what they came from is gone."""
    constants: dict[ir.Value, tuple[int, float]] = {}
    """How many numbers, and bytes of each."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None:
                constants[value] = tensor.size, tensor.dtype.itemsize
    ahead = set()
    for node in model.graph.all_nodes():
        inputs = [constants.get(value) for value in node.inputs if value is not None]
        known = [constant for constant in inputs if constant is not None]
        if node.op_type in FOLDED and node.domain == "" and known and len(known) == len(inputs):
            ahead.add(node)
            size, itemsize = max(known)
            cast = node.attributes.get_int("to", 0)
            constants[node.outputs[0]] = size, ir.DataType(cast).itemsize if cast else itemsize
    remaining = [value for value in constants if any(use.node not in ahead for use in value.uses())]
    return round(sum(size * itemsize for size, itemsize in (constants[value] for value in remaining)))
