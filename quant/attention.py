"""Attention on int8: both products of `softmax(Q K^T) V` take 8-bit operands, rounded at run time.

Q is rounded to uint8 with one scale for the whole tensor, K and V to int8 with one scale each, and every row of
probabilities to uint8 with a scale of its own, a 255th of its largest. A fixed 255th for all rows would lose every
probability below 0.002, which is all of them where attention is spread over a thousand tokens.

Each head is computed by itself: its scores, 5 MB for 1101 tokens, stay in the caches where those of all heads do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from pochade.quant.streamed import Array
from pochade.quant.surgery import MICROSOFT, register

OPERATOR = "MultiHeadAttention"
BY_HEADS = {"perm": [0, 2, 1, 3]}
"""Between (images, tokens, heads, numbers) and (images, heads, tokens, numbers)."""


def rewrite(model: ir.Model) -> int:
    """Round every `com.microsoft.MultiHeadAttention` of a graph that is in float32 and has nothing but Q, K and V.

    Returns:
        How many there were.
    """
    found = [node for node in model.graph if _is_plain(node)]
    constants = _Constants(model.graph)
    for node in found:
        _round(model.graph, node, constants)
    return len(found)


def _is_plain(node: ir.Node) -> bool:
    """Whether a node is an attention without mask, bias and cache."""
    given = [value for value in node.inputs if value is not None]
    return (
        (node.domain, node.op_type) == (MICROSOFT, OPERATOR)
        and len(given) == 3 == len([value for value in node.inputs[:3] if value is not None])
        and all(value.dtype is ir.DataType.FLOAT for value in given)
        and not node.attributes.get_int("unidirectional", 0)
        and _width(node) is not None
    )


def _width(node: ir.Node) -> int | None:
    """Numbers in the queries of a token, all heads together; None where the graph does not say."""
    queries = node.inputs[0]
    shape = queries.shape if queries is not None else None
    last = shape[-1] if shape is not None and len(shape) == 3 else None
    return last if isinstance(last, int) else None


class _Constants:
    """Initializers that all attentions of a graph share, made when first asked for."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._known: dict[str, ir.Value] = {}

    def get(self, name: str, array: Array) -> ir.Value:
        """The constant of that name."""
        if name not in self._known:
            self._known[name] = register(self._graph, ir.Tensor(array, name=f"int8_attention.{name}"))
        return self._known[name]

    def integers(self, *numbers: int) -> ir.Value:
        """A list of int64."""
        return self.get("_".join(map(str, numbers)), np.array(numbers, np.int64))

    def number(self, value: float) -> ir.Value:
        """A float32."""
        return self.get(f"{value:.9g}", np.array(value, np.float32))


def _round(graph: ir.Graph, node: ir.Node, constants: _Constants) -> None:
    """Put the rounded form in place of an attention; the node becomes its last step."""
    queries, keys, values = node.inputs[:3]
    width = _width(node)
    assert queries is not None and keys is not None and values is not None and width is not None
    heads = node.attributes["num_heads"].as_int()
    scale = node.attributes.get_float("scale", 0.0) or (width / heads) ** -0.5
    ops = tape.Tape()
    q, q_scale, q_zero = ops.op_multi_out("DynamicQuantizeLinear", [queries], num_outputs=3)
    k, k_scale = _signed(ops, keys, constants)
    v, v_scale = _signed(ops, values, constants)
    # Codes are moved after rounding: a quarter of the bytes.
    split = constants.integers(0, 0, heads, -1)
    q, v = (ops.op("Transpose", [ops.op("Reshape", [codes, split])], BY_HEADS) for codes in (q, v))
    k = ops.op("Transpose", [ops.op("Reshape", [k, split])], {"perm": [0, 2, 3, 1]})
    q_scale = ops.op("Mul", [q_scale, constants.number(scale)])
    parts = ([x] if heads == 1 else _split(ops, x, heads) for x in (q, k, v))
    mixed = [_attend(ops, (*part, q_scale, k_scale, v_scale, q_zero), constants) for part in zip(*parts, strict=True)]
    together = mixed[0] if heads == 1 else ops.op("Concat", mixed, {"axis": 1})
    joined = ops.op("Transpose", [together], BY_HEADS)
    _insert(graph, node, ops.nodes)

    node.domain, node.op_type, node.version = "", "Reshape", None
    node.attributes.clear()
    node.resize_inputs(2)
    node.replace_input_with(0, joined)
    node.replace_input_with(1, constants.integers(0, 0, -1))


def _attend(ops: tape.Tape, given: tuple[ir.Value, ...], constants: _Constants) -> ir.Value:
    """Attention of one head, (images, 1, tokens, numbers).

    Args:
        ops: to add to.
        given: codes of Q, of K transposed and of V, the scales of all three, and the zero point of Q.
        constants: of the graph.
    """
    q, k, v, q_scale, k_scale, v_scale, q_zero = given
    scores = ops.op("MatMulIntegerToFloat", [q, k, q_scale, k_scale, q_zero], domain=MICROSOFT)
    p = ops.op("Softmax", [scores], {"axis": -1})
    last = constants.integers(-1)
    p_scales = ops.op("Mul", [ops.op("ReduceMax", [p, last]), constants.number(1 / 255)])
    # QuantizeLinear takes one scale for each index of an axis, so all rows have to lie along the first.
    table = ops.op("Concat", [last, ops.op("Shape", [p], {"start": 3})], {"axis": 0})
    rows = ops.op("QuantizeLinear", [ops.op("Reshape", [p, table]), ops.op("Reshape", [p_scales, last])], {"axis": 0})
    p = ops.op("Reshape", [rows, ops.op("Shape", [p])])
    mixed = ops.op("Cast", [ops.op("MatMulInteger", [p, v])], {"to": int(ir.DataType.FLOAT)})
    return ops.op("Mul", [mixed, ops.op("Mul", [p_scales, v_scale])])


def _split(ops: tape.Tape, x: ir.Value, heads: int) -> Sequence[ir.Value]:
    return ops.op_multi_out("Split", [x], {"axis": 1, "num_outputs": heads}, num_outputs=heads)


def _signed(ops: tape.Tape, value: ir.Value, constants: _Constants) -> tuple[ir.Value, ir.Value]:
    """A tensor as int8 codes, and their scale."""
    peak = ops.op("ReduceMax", [ops.op("Abs", [value])], {"keepdims": 0})
    scale = ops.op("Mul", [peak, constants.number(1 / 127)])
    return ops.op("QuantizeLinear", [value, scale, constants.get("zero", np.array(0, np.int8))]), scale


def _insert(graph: ir.Graph, before: ir.Node, nodes: Sequence[ir.Node]) -> None:
    """Add nodes with names that tell which attention they belong to."""
    owner = before.name or before.outputs[0].name
    for i, node in enumerate(nodes):
        node.name = f"{owner}.{i}.{node.op_type}"
        for j, value in enumerate(node.outputs):
            value.name = f"{node.name}.{j}"
    graph.insert_before(before, list(nodes))
