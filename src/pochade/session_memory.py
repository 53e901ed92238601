"""What an opened session holds of a graph's weights; for export and quantization, which may not see each other."""

from __future__ import annotations

import math
from typing import Any

FOLDED = ("Cast", "Expand", "Mul", "Reshape")
"""Operators by which weights are expanded; of constants, ONNX Runtime computes them while it opens a session."""

CAST_BYTES = {1: 4, 10: 2}
"""Bytes per number of the types that weights are cast to, float32 and float16, by their numbers in ONNX."""


def weight_bytes(model: Any) -> int:
    """Bytes of the constants that remain once those that can be computed are, and what they came from is gone.

    Args:
        model: an `onnx_ir.Model`; the library is not imported here, where the runtime has no use for it.
    """
    constants: dict[Any, tuple[int, float]] = {}
    """How many numbers, and bytes of each."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None:
                constants[value] = tensor.size, tensor.dtype.itemsize
    ahead = set()
    for node in model.graph.all_nodes():
        if node.op_type == "Constant" and (held := node.attributes.get("value")) is not None:
            tensor = held.as_tensor()
            constants[node.outputs[0]] = tensor.size, tensor.dtype.itemsize
        inputs = [constants.get(value) for value in node.inputs if value is not None]
        known = [constant for constant in inputs if constant is not None]
        if node.op_type in FOLDED and node.domain == "" and known and len(known) == len(inputs):
            ahead.add(node)
            size, itemsize = known[0] if node.op_type == "Reshape" else max(known)
            if node.op_type == "Expand" and (shape := node.inputs[1].const_value) is not None:
                size = math.prod(map(int, shape.numpy()))
                itemsize = known[0][1]
            cast = node.attributes.get_int("to", 0)
            constants[node.outputs[0]] = size, CAST_BYTES.get(cast, itemsize)
    remaining = [value for value in constants if any(use.node not in ahead for use in value.uses())]
    return round(sum(size * itemsize for size, itemsize in (constants[value] for value in remaining)))
