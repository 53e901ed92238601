"""Large float32 weights -> stored as float16, widened when a session opens."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

LEAST = 4096
"""Smaller weights (norms, biases) are not worth a node."""


class StoreHalfPass(ir.passes.InPlacePass):
    """Halves the file of a component that computes in float32.

    ONNX Runtime folds the Casts of weights when it loads; of a lookup table, the rows found are cast instead.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change every large float32 initializer of the main graph."""
        graph = model.graph
        large = [
            value
            for value in graph.initializers.values()
            if not value.is_graph_input()
            and value.dtype == ir.DataType.FLOAT
            and value.const_value is not None
            and value.const_value.size >= LEAST
        ]
        for value in large:
            _store_half(graph, value)
        return ir.passes.PassResult(model, bool(large))


def _store_half(graph: ir.Graph, value: ir.Value) -> None:
    source = value.const_value
    assert source is not None and value.name is not None
    shape = ir.Shape(source.shape.numpy())
    half = ir.LazyTensor(
        lambda: ir.Tensor(source.numpy().astype(np.float16)),
        dtype=ir.DataType.FLOAT16,
        shape=shape,
        name=value.name,
    )
    readers = [usage.node for usage in value.uses()]
    del graph.initializers[value.name]
    stored = ir.Value(name=value.name, shape=shape, type=ir.TensorType(half.dtype), const_value=half)
    if all(node.op_type == "Gather" and node.domain == "" and node.inputs[0] is value for node in readers):
        graph.register_initializer(stored)
        for node in readers:
            _widen_rows(node, stored)
        return
    cast = ir.node("Cast", [stored], attributes={"to": int(ir.DataType.FLOAT)})
    cast.outputs[0].name = f"{value.name}.float32"
    graph.register_initializer(stored)
    ir.convenience.replace_all_uses_with(value, cast.outputs[0])
    graph.insert_before(graph[0], cast)


def _widen_rows(gather: ir.Node, table: ir.Value) -> None:
    """Widen the rows that are looked up rather than the table, which would be copied whole when a session opens."""
    rows = gather.outputs[0]
    gather.replace_input_with(0, table)
    graph = gather.graph
    assert graph is not None
    cast = ir.node("Cast", [rows], attributes={"to": int(ir.DataType.FLOAT)})
    widened = cast.outputs[0]
    widened.name, widened.shape, widened.type = f"{rows.name}.float32", rows.shape, rows.type
    ir.convenience.replace_all_uses_with(rows, widened, replace_graph_outputs=True)
    cast.replace_input_with(0, rows)
    rows.type = ir.TensorType(ir.DataType.FLOAT16)
    graph.insert_after(gather, cast)
