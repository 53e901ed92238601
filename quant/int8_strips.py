"""8-bit numbers on their way from one convolution to the next, in graphs that compute strip by strip.

`int8_conv` rounds before each convolution and widens after it. What only moves numbers can move their codes as well, a
quarter of the bytes: rounding is brought forward and widening put off, neither of which changes a number.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from pochade.graph_edit import subgraphs
from pochade.quant.surgery import hand_on

ROWS = 2
"""Axis along which strips are cut and joined."""

SELECTS = ("Slice", "Resize")
"""Operators that give some numbers of their first input, or give them repeatedly: bodies resize to the nearest."""

Codes = tuple[ir.Value, ir.Value, ir.Value]
"""8-bit numbers, their scale and their zero point."""


def rewrite(model: ir.Model) -> None:
    """Move codes instead of numbers, in all bodies of Scans that multiply 8-bit numbers."""
    for scan in model.graph.all_nodes():
        for body in subgraphs(scan) if scan.op_type == "Scan" else ():
            if any(node.op_type == "QLinearConv" for node in body):
                while _round_once(body) or _round_earlier(body) or _widen_later(body):
                    pass
                _measure_in_one_pass(body)


def codes_of(value: ir.Value) -> Codes | None:
    """What a value was widened from, if it was."""
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    codes, scale, zero = node.inputs
    assert codes is not None and scale is not None and zero is not None, f"{node.name} is incomplete"
    return codes, scale, zero


def _round_once(body: ir.Graph) -> bool:
    """Let equal roundings of one value be one."""
    first: dict[tuple[ir.Value | None, ...], ir.Node] = {}
    for node in body:
        if node.op_type != "QuantizeLinear":
            continue
        if (earlier := first.setdefault(tuple(node.inputs), node)) is not node:
            node.outputs[0].replace_all_uses_with(earlier.outputs[0])
            body.remove(node, safe=True)
            return True
    return False


def _round_earlier(body: ir.Graph) -> bool:
    """Cut, double and join what is rounded already."""
    for node in body:
        if node.op_type != "QuantizeLinear" or node.inputs[0] is None:
            continue
        moved = node.inputs[0].producer()
        if moved is None or moved.graph is not body or len(moved.outputs[0].uses()) != 1:
            continue
        is_join = moved.op_type == "Concat" and moved.attributes["axis"].as_int() == ROWS
        if not is_join and not (moved.op_type in SELECTS and _is_made_in(body, moved.inputs[0])):
            continue
        steps = node.inputs[1:]
        for index in range(len(moved.inputs) if is_join else 1):
            part = moved.inputs[index]
            assert part is not None, f"{moved.name} is incomplete"
            rounded = _node("QuantizeLinear", [part, *steps], f"{part.name}.for_{node.outputs[0].name}", part.shape)
            body.insert_before(moved, rounded)
            moved.replace_input_with(index, rounded.outputs[0])
        _take_place(moved, node)
        return True
    return False


def _widen_later(body: ir.Graph) -> bool:
    """Join and rearrange codes that have one scale."""
    for node in body:
        if node.op_type not in ("Concat", "DepthToSpace"):
            continue
        given = [None if value is None else codes_of(value) for value in node.inputs]
        widened = [codes for codes in given if codes is not None]
        if len(widened) < len(given) or len({codes[1:] for codes in widened}) != 1:
            continue
        producers = [value.producer() for value in node.inputs if value is not None]
        for index, (codes, *_) in enumerate(widened):
            node.replace_input_with(index, codes)
        result = node.outputs[0]
        last = _node("DequantizeLinear", [result, *widened[0][1:]], f"{result.name}.wide", result.shape)
        hand_on(result, last, last.outputs[0])
        result.dtype = ir.DataType.UINT8
        body.insert_after(node, last)
        for producer in producers:
            if producer is not None and not producer.outputs[0].uses():
                body.remove(producer, safe=True)
        return True
    return False


def _measure_in_one_pass(body: ir.Graph) -> None:
    """Let a variance be the mean of squares less the square of the mean, and not a mean of squared differences.

    It spares writing the differences. Rounded numbers have no more digits than float32 has left here.
    """
    for square in list(body):
        apart = square.inputs[0].producer() if square.op_type == "Mul" and square.inputs[0] is not None else None
        if apart is None or apart.op_type != "Sub" or square.inputs[0] is not square.inputs[1]:
            continue
        y, mean = apart.inputs
        assert y is not None and mean is not None and mean.producer() is not None
        (use,) = square.outputs[0].uses()
        spread = use.node.outputs[0]
        flat = next(u.node for u in mean.uses() if u.node.op_type == "Reshape").outputs[0]
        for i in (0, 1):
            square.replace_input_with(i, y)
        squared = _node("Mul", [flat, flat], f"{spread.name}.squared_mean", flat.shape)
        less = _node("Sub", [spread, squared.outputs[0]], f"{spread.name}.less", spread.shape)
        # Rounding could leave a flat channel a little below zero.
        kept = _node("Relu", [less.outputs[0]], f"{spread.name}.variance", spread.shape)
        body.extend([squared, less, kept])
        hand_on(spread, less, kept.outputs[0])
        body.remove(apart, safe=True)


def _is_made_in(body: ir.Graph, value: ir.Value | None) -> bool:
    """Whether a value is one of a body's own: of a layer around it, only a strip may be rounded."""
    producer = value.producer() if value is not None else None
    return producer is not None and producer.graph is body


def _take_place(node: ir.Node, of: ir.Node) -> None:
    """Let the readers of a rounding read what moves rounded numbers."""
    assert of.graph is not None
    result = node.outputs[0]
    result.dtype = ir.DataType.UINT8
    of.outputs[0].replace_all_uses_with(result)
    of.graph.remove(of, safe=True)


def _node(op_type: str, inputs: Sequence[ir.Value | None], name: str, shape: ir.Shape | None) -> ir.Node:
    dtype = ir.DataType.UINT8 if op_type == "QuantizeLinear" else ir.DataType.FLOAT
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype))
    return ir.node(op_type, inputs, outputs=[value], name=name)
