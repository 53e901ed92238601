"""Linear layers that read the same tensor -> one linear layer and a Split."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx_ir as ir

MOST = 4
"""Query, key, value and MLP. The modulation layers of a whole network share an input too, as do the keys and values
that all its blocks make of a text; joined, they would be one weight of a gigabyte that no later stage could stream."""


class MergeLinearPass(ir.passes.InPlacePass):
    """Merges `Add(MatMul(x, W), b)` nodes that share `x` and each have a bias, e.g. query, key, value and MLP.

    One wide product is faster than three narrow ones, and dynamic quantization then measures the range of `x`
    once. Costs nothing in memory: the weights are joined when they are written.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Merge within the main graph."""
        groups: dict[ir.Value, list[tuple[ir.Node, ir.Node]]] = defaultdict(list)
        for node in model.graph:
            pair = _linear(node)
            if pair and node.inputs[0] is not None:
                groups[node.inputs[0]].append(pair)
        merged = False
        for shared, pairs in groups.items():
            for alike in [pairs] if len(pairs) <= MOST else _by_parent(pairs):
                if 1 < len(alike) <= MOST:
                    _merge(model.graph, shared, alike)
                    merged = True
        return ir.passes.PassResult(model, merged)


def _by_parent(pairs: list[tuple[ir.Node, ir.Node]]) -> list[list[tuple[ir.Node, ir.Node]]]:
    """The pairs by the module that their linear layers are parts of, as the names of weights tell it."""
    groups: dict[str, list[tuple[ir.Node, ir.Node]]] = defaultdict(list)
    for matmul, add in pairs:
        weight = matmul.inputs[1]
        assert weight is not None and weight.name is not None
        layer = weight.name.rpartition(".weight")[0]
        groups[layer.rpartition(".")[0]].append((matmul, add))
    return list(groups.values())


def _weight(value: ir.Value | None) -> ir.TensorProtocol | None:
    return value.const_value if value is not None and value.is_initializer() else None


def _linear(node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """The MatMul and its bias Add when `node` is a linear layer with a weight and a bias."""
    if node.op_type != "MatMul":
        return None
    weight, uses = _weight(node.inputs[1]), node.outputs[0].uses()
    if weight is None or len(weight.shape) != 2 or len(uses) != 1:
        return None
    add = next(iter(uses)).node
    biases = [_weight(value) for value in add.inputs] if add.op_type == "Add" else []
    return (node, add) if any(b is not None and len(b.shape) == 1 for b in biases) else None


def _merge(graph: ir.Graph, shared: ir.Value, pairs: list[tuple[ir.Node, ir.Node]]) -> None:
    weights = [matmul.inputs[1] for matmul, _ in pairs]
    biases = [next(v for v in add.inputs if _weight(v) is not None) for _, add in pairs]
    widths = [b.const_value.shape.numpy()[0] for b in biases if b is not None and b.const_value is not None]
    first = pairs[0][0]
    matmul = ir.node("MatMul", [shared, _joined(graph, weights)])
    add = ir.node("Add", [matmul.outputs[0], _joined(graph, biases)])
    sizes = ir.Value(
        name=f"{add.name or first.name}_{first.outputs[0].name}_widths",
        shape=ir.Shape([len(widths)]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.Tensor(np.array(widths, np.int64)),
    )
    graph.register_initializer(sizes)
    split = ir.node("Split", [add.outputs[0], sizes], attributes={"axis": -1}, num_outputs=len(pairs))
    graph.insert_before(first, [matmul, add, split])
    for (old_matmul, old_add), part in zip(pairs, split.outputs, strict=True):
        part.shape, part.type = old_add.outputs[0].shape, old_add.outputs[0].type
        ir.convenience.replace_all_uses_with(old_add.outputs[0], part)
        graph.remove([old_add, old_matmul], safe=True)
    for value in (*weights, *biases):
        assert value is not None and value.name is not None
        if not value.uses():
            graph.initializers.pop(value.name)


def _joined(graph: ir.Graph, values: list[ir.Value | None]) -> ir.Value:
    """Initializer that is the parts side by side along their last axis, joined when it is written."""
    parts = [v.const_value for v in values if v is not None and v.const_value is not None]
    name = "+".join(v.name for v in values if v is not None and v.name is not None)
    shape = ir.Shape([*parts[0].shape.numpy()[:-1], sum(p.shape.numpy()[-1] for p in parts)])
    tensor = ir.LazyTensor(
        lambda: ir.Tensor(np.concatenate([p.numpy() for p in parts], axis=-1)),
        dtype=parts[0].dtype,
        shape=shape,
        name=name,
    )
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(parts[0].dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
