"""A linear layer that reads several tensors side by side -> a linear layer for each, and their sum."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import onnx_ir as ir

from pochade.component import INPUTS_FROM
from pochade.graph_edit import register

TOKENS_RANK = 3
"""(batch, tokens, width)"""

LEAST_SHARE = 1 / 16
"""Of the inputs that each part must have: a product of a few of them costs more than to copy them."""


class PartInputsPass(ir.passes.InPlacePass):
    """Replaces `MatMul(Concat(x, y), W)` by `MatMul(x, W of x) + MatMul(y, W of y)`, with or without a bias.

    What stands side by side need not be copied there, and is rounded each in its own range by dynamic quantization:
    where attention and an MLP meet, these differ. Weights are cut when they are written.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Part them in the main graph."""
        parted = [node for node in list(model.graph) if _part(model.graph, node)]
        return ir.passes.PassResult(model, bool(parted))


def _part(graph: ir.Graph, product: ir.Node) -> bool:
    """Part a product, if it is one of that kind."""
    if product.op_type != "MatMul" or product.inputs[0] is None:
        return False
    joined, weight = product.inputs[0].producer(), product.inputs[1]
    widths = _widths(joined) if joined is not None and joined.op_type == "Concat" else []
    stored = weight.const_value if weight is not None and weight.is_initializer() else None
    if joined is None or weight is None or stored is None or len(stored.shape) != 2:
        return False
    if len(widths) < 2 or sum(widths) != stored.shape.numpy()[0] or len(joined.outputs[0].uses()) != 1:
        return False
    if min(widths) < LEAST_SHARE * sum(widths):
        return False
    starts = [0, *accumulate(widths)][:-1]
    products = [
        ir.node("MatMul", [part, _rows(graph, weight, first, width)], name=f"{product.name}.{first}")
        for part, first, width in zip(joined.inputs, starts, widths, strict=True)
    ]
    result = product.outputs[0]
    for node in products:
        node.outputs[0].name, node.outputs[0].type = f"{result.name}.{node.name}", result.type
        node.outputs[0].shape = result.shape
    graph.insert_before(product, products)
    # The bias stays with the last one; quantization makes one node of the two.
    last = products[-1].outputs[0]
    result.replace_all_uses_with(last)
    bias = _bias(last)
    rest, after = (last, products[-1]) if bias is None else (bias.outputs[0], bias)
    assert not rest.is_graph_output() and rest.name is not None, f"{rest.name} would be parted from its name"
    readers, total = list(rest.uses()), rest
    for node in reversed(products[:-1]):
        following = ir.node("Add", [node.outputs[0], total], name=f"{node.name}.sum")
        graph.insert_after(after, following)
        total, after = following.outputs[0], following
        total.name, total.type, total.shape = following.name, rest.type, rest.shape
    for use in readers:
        use.node.replace_input_with(use.idx, total)
    # Others know the layer's result by its name.
    rest.name, total.name = f"{rest.name}.rest", rest.name
    graph.remove([product, joined], safe=True)
    if not weight.uses():
        assert weight.name is not None
        graph.initializers.pop(weight.name)
    return True


def _widths(joined: ir.Node) -> list[int]:
    """Lengths of what stands side by side on the last axis; nothing where that is not known.

    Nor for single vectors, (batch, width): a layer that is computed once for a picture is no time to spare.
    """
    ranks = {len(value.shape) for value in joined.inputs if value is not None and value.shape is not None}
    if ranks != {TOKENS_RANK} or joined.attributes.get_int("axis", 0) not in (-1, TOKENS_RANK - 1):
        return []
    widths = [value.shape[-1] if value is not None and value.shape is not None else None for value in joined.inputs]
    known = [width for width in widths if isinstance(width, int)]
    return known if len(known) == len(widths) else []


def _bias(value: ir.Value) -> ir.Node | None:
    """The Add of a bias that alone reads a value."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type != "Add":
        return None
    (other,) = (other for other in uses[0].node.inputs if other is not value)
    is_bias = other is not None and other.is_initializer() and other.shape is not None and len(other.shape) == 1
    return uses[0].node if is_bias else None


def _rows(graph: ir.Graph, weight: ir.Value, first: int, count: int) -> ir.Value:
    """The rows of a weight (inputs, outputs) for some of its inputs, cut when they are written."""
    stored = weight.const_value
    assert stored is not None and weight.name is not None
    name, shape = f"{weight.name}{INPUTS_FROM}{first}", ir.Shape([count, stored.shape.numpy()[1]])
    tensor = ir.LazyTensor(
        lambda: ir.Tensor(np.ascontiguousarray(stored.numpy()[first : first + count])),
        dtype=stored.dtype,
        shape=shape,
        name=name,
    )
    return register(graph, tensor)
