"""Attention on int8: both products of `softmax(Q K^T) V` take 8-bit operands, rounded at run time.

Q is rounded to uint8 with one scale for the whole tensor, K and V to int8 with one scale each, and every row of
probabilities to uint8 with a scale of its own, a 255th of its largest. A fixed 255th for all rows would lose every
probability below 0.002, which is all of them where attention is spread over a thousand tokens.

A few heads are computed at a time: scores of all of them, 5 MB each for 1101 tokens, would leave the caches. Those of
one leave threads little to do before they have to wait for one another, which takes long where they share no cache.

The graph says it in one node of a function that the file brings along, which ONNX Runtime takes apart when it opens the
file, and which `pochade.gpu_graph` makes the attention that it was. The same is done for processors without VNNI.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from pochade.component import ATTENDED_HEADS, Component, with_graphs
from pochade.gpu_graph import OWN_DOMAIN, ROUNDED_ATTENTION, restore_attention
from pochade.graph_edit import forget_shapes
from pochade.quant.functions import FunctionTape
from pochade.quant.surgery import MICROSOFT

OPERATOR = "MultiHeadAttention"
ATTRIBUTES = {"num_heads": ir.AttributeType.INT, "scale": ir.AttributeType.FLOAT}
BLOCKS_OPSET = 21
"""Of ONNX, in which QuantizeLinear first had blocks. Its other operators here only gained types since opset 20."""

ROW = 1 << 20
"""Numbers of a block that has one scale: more than any row of probabilities."""

BY_HEADS = {"perm": [0, 2, 1, 3]}
"""Between (images, tokens, heads, numbers) and (images, heads, tokens, numbers)."""


def rewrite(model: ir.Model) -> int:
    """Round every `com.microsoft.MultiHeadAttention` of a graph that is in float32 and has nothing but Q, K and V.

    Returns:
        How many there were.
    """
    found = [node for node in model.graph if _is_plain(node)]
    opset = max(model.graph.opset_imports[""], BLOCKS_OPSET)
    functions: dict[tuple[int, float], ir.Function] = {}
    for node in found:
        heads = node.attributes["num_heads"].as_int()
        width = _width(node)
        assert width is not None
        scale = node.attributes.get_float("scale", 0.0) or (width / heads) ** -0.5
        name = f"{ROUNDED_ATTENTION}{len(functions) + 1}"
        function = functions.get((heads, scale)) or _function(name, heads, scale, opset)
        functions[heads, scale] = function
        node.domain, node.op_type, node.version = OWN_DOMAIN, function.name, None
        node.attributes.add(ir.AttrFloat32("scale", scale))
        node.resize_inputs(3)
    for function in functions.values():
        model.functions[function.identifier()] = function
        model.graph.opset_imports.update({OWN_DOMAIN: 1, "": opset})
    return len(found)


def with_float_attention(component: Component, folder: Path) -> Component:
    """A component with graphs of attention in float32 written beside those whose attention is rounded.

    Args:
        component: whose files lie in the folder.
        folder: of the bundle.
    """
    return with_graphs(component, "float_attention", lambda file: save_float_attention(folder / file))


def save_float_attention(path: Path) -> str | None:
    """Write a graph again with attention in float32, on the same data file.

    Args:
        path: of the graph.

    Returns:
        Name of the file beside it; None where no attention is rounded.
    """
    model = ir.load(path)
    if not restore_attention(model):
        return None
    forget_shapes(model)
    target = path.with_name(f"{path.stem}.float_attention.onnx")
    ir.save(model, target)
    return target.name


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


def _function(name: str, heads: int, scale: float, opset: int) -> ir.Function:
    """Rounded attention of so many heads, whose attributes are those of the exact one and say nothing new."""
    queries, keys, values = given = [ir.Value(name=each) for each in ("queries", "keys", "values")]
    ops = FunctionTape()
    q, q_scale, q_zero = ops.op_multi_out("DynamicQuantizeLinear", [queries], num_outputs=3)
    k, k_scale = _signed(ops, keys)
    v, v_scale = _signed(ops, values)
    # Codes are moved after rounding: a quarter of the bytes.
    split = ops.integers(0, 0, heads, -1)
    q, v = (ops.op("Transpose", [ops.op("Reshape", [codes, split])], BY_HEADS) for codes in (q, v))
    k = ops.op("Transpose", [ops.op("Reshape", [k, split])], {"perm": [0, 2, 3, 1]})
    q_scale = ops.op("Mul", [q_scale, ops.number(scale)])
    count = -(-heads // ATTENDED_HEADS)
    parts = ([x] if count == 1 else _split(ops, x, count) for x in (q, k, v))
    mixed = [_attend(ops, (*part, q_scale, k_scale, v_scale, q_zero)) for part in zip(*parts, strict=True)]
    together = mixed[0] if count == 1 else ops.op("Concat", mixed, {"axis": 1})
    joined = ops.op("Reshape", [ops.op("Transpose", [together], BY_HEADS), ops.integers(0, 0, -1)])
    return ops.function(name, given, [joined], opset, ATTRIBUTES)


def _attend(ops: FunctionTape, given: tuple[ir.Value, ...]) -> ir.Value:
    """Attention of some heads, (images, heads, tokens, numbers).

    Args:
        ops: to add to.
        given: codes of Q, of K transposed and of V, the scales of all three, and the zero point of Q.
    """
    q, k, v, q_scale, k_scale, v_scale, q_zero = given
    scores = ops.op("MatMulIntegerToFloat", [q, k, q_scale, k_scale, q_zero], domain=MICROSOFT)
    p = ops.op("Softmax", [scores], {"axis": -1})
    last = ops.integers(-1)
    p_scales = ops.op("Mul", [ops.op("ReduceMax", [p, last]), ops.number(1 / 255)])
    # A block is a row, of which only the first part is there: ONNX Runtime rounds blocks with all threads, and
    # what has a scale for each index of an axis with one.
    p = ops.op("QuantizeLinear", [p, p_scales], {"axis": 3, "block_size": ROW})
    mixed = ops.op("Cast", [ops.op("MatMulInteger", [p, v])], {"to": int(ir.DataType.FLOAT)})
    return ops.op("Mul", [mixed, ops.op("Mul", [p_scales, v_scale])])


def _split(ops: FunctionTape, x: ir.Value, count: int) -> Sequence[ir.Value]:
    """As many heads in each as there can be, and the others in the last."""
    return ops.op_multi_out("Split", [x], {"axis": 1, "num_outputs": count}, num_outputs=count)


def _signed(ops: FunctionTape, value: ir.Value) -> tuple[ir.Value, ir.Value]:
    """A tensor as int8 codes, and their scale."""
    peak = ops.op("ReduceMax", [ops.op("Abs", [value])], {"keepdims": 0})
    scale = ops.op("Mul", [peak, ops.number(1 / 127)])
    return ops.op("QuantizeLinear", [value, scale, ops.constant("zero", np.array(0, np.int8))]), scale
