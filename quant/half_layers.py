"""What a codec keeps between its layers, in float16: half the memory of a large picture.

Graphs that compute strip by strip (`pochade.export.strips`) hold the output of a whole layer until the next one has
read it; at 1024x1024 the largest take a gigabyte each. Scans give float16 instead, and whoever reads a strip of it
widens that strip. Sums, statistics and products stay in float32. A layer that is what a convolution of 8-bit numbers
gives (`int8_conv`) is kept as it is, in 8 bits.

Published codecs ask for float32 (`force_upcast`), since their layers may leave the range of float16. Numbers are
therefore stored divided by `DIVISOR`, which costs them no precision: they reach two millions, and one of 0.002 still
has all its bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from pochade.graph_edit import home, register
from pochade.quant.int8_strips import Codes, codes_of
from pochade.quant.surgery import graphs_around, hand_on

DIVISOR = 32.0
"""A power of two, so that neither way rounds."""

COPIES = ("Identity", "Slice")
"""Operators whose result is (a part of) their first input; outside of Scans they hand on whole layers."""
TAKES = "Slice"
"""Operator by which a body takes some rows of other strips than its own."""


def rewrite(model: ir.Model) -> int:
    """Narrow every float32 picture-like output of a Scan that is read strip by strip, by other Scans.

    To be called after convolutions have become those of 8-bit numbers.

    Returns:
        How many there were.
    """
    graph = model.graph
    found = _layers(graph)
    layers = [layer for layer in found if layer.can_be_narrow]
    if not layers:
        return 0
    down, up = (_constant(graph, name, value) for name, value in (("down", 1 / DIVISOR), ("up", DIVISOR)))
    for layer in layers:
        codes = layer.codes()
        for scan, index in layer.scans:
            _narrow(scan.attributes["body"].as_graph(), index, down if codes is None else None)
        for value in layer.values:
            value.dtype = ir.DataType.FLOAT16 if codes is None else ir.DataType.UINT8
        for strip in layer.strips:
            _widen(strip, up, codes)
    for node in (node for layer in found for node in layer.empty):
        _convert(node)
    return sum(len(layer.scans) for layer in layers)


class _Layer:
    """Values that are one another: what a Scan gives, copies of it, and the results of an If that chooses one."""

    def __init__(self, first: ir.Value, around: Mapping[ir.Graph, ir.Node]) -> None:
        self._around = around
        self.values = [first]
        self.strips: list[ir.Value] = []
        """What bodies of Scans take of it: a strip, which is an input, or rows."""
        self.empty: list[ir.Node] = []
        """Nodes that give no strip of another layer in its stead."""
        self.can_be_narrow = True
        for value in self.values:  # grows as it goes
            self._look_at(value)

    @property
    def scans(self) -> list[tuple[ir.Node, int]]:
        """Scans that give it, and as which of their outputs."""
        found = ((value.producer(), value) for value in self.values)
        return [(node, node.outputs.index(value)) for node, value in found if node is not None and _is_scan(node)]

    def codes(self) -> Codes | None:
        """8-bit numbers that one of its Scans widens, if all of them do, and by the same scale and zero point."""
        first, *others = (codes_of(_squeezed(_given(scan, index))) for scan, index in self.scans)
        same = first is not None and all(codes is not None and codes[1:] == first[1:] for codes in others)
        return first if same else None

    def _add(self, value: ir.Value) -> None:
        if value not in self.values:
            self.values.append(value)

    def _look_at(self, value: ir.Value) -> None:
        producer = value.producer()
        if producer is None or value.shape is None or len(value.shape) != 4 or value.dtype is not ir.DataType.FLOAT:
            self.can_be_narrow = False
            return
        if _is_empty(producer):
            self.empty.append(producer)
        elif producer.op_type in COPIES and producer.inputs[0] is not None:
            self._add(producer.inputs[0])
        elif producer.op_type == "If":
            for name in ("then_branch", "else_branch"):
                self._add(producer.attributes[name].as_graph().outputs[producer.outputs.index(value)])
        elif not _is_scan(producer):
            self.can_be_narrow = False
        for use in value.uses():
            if _is_scan(use.node):
                self.strips.append(use.node.attributes["body"].as_graph().inputs[use.idx])
            elif use.node.op_type == TAKES and self._owner(use.node.graph) == "Scan":
                self.strips.append(use.node.outputs[0])
            elif use.node.op_type in COPIES and use.idx == 0:
                if not _is_empty(use.node):
                    self._add(use.node.outputs[0])
            else:
                self.can_be_narrow = False
        if value.is_graph_output():
            if self._owner(value.graph) == "If":
                assert isinstance(value.graph, ir.Graph)
                self._add(self._around[value.graph].outputs[value.graph.outputs.index(value)])
            else:
                self.can_be_narrow = False

    def _owner(self, graph: ir.Graph | ir.Function | None) -> str:
        """Operator that a graph is the body or a branch of; nothing for the main graph."""
        return self._around[graph].op_type if isinstance(graph, ir.Graph) and graph in self._around else ""


def _layers(graph: ir.Graph) -> list[_Layer]:
    """What Scans give that is no mere row of numbers, in order."""
    layers: list[_Layer] = []
    around = graphs_around(graph)
    for node in graph.all_nodes():
        if _is_scan(node):
            for value in node.outputs:
                is_picture = value.shape is not None and len(value.shape) == 4
                if is_picture and not any(value in layer.values for layer in layers):
                    layers.append(_Layer(value, around))
    return layers


def _is_scan(node: ir.Node) -> bool:
    return node.op_type == "Scan"


def _is_empty(node: ir.Node) -> bool:
    """Whether a node takes no part of a layer, for a branch that has no use for it."""
    ends = [None if value is None else value.const_value for value in node.inputs[1:3]]
    return node.op_type == "Slice" and all(end is not None and end.numpy().tolist() == [0] for end in ends)


def _given(scan: ir.Node, index: int) -> ir.Value:
    """What the body of a Scan gives."""
    return scan.attributes["body"].as_graph().outputs[index]


def _squeezed(strip: ir.Value) -> ir.Value:
    """A strip that a body gives, before it loses its first axis."""
    node = strip.producer()
    assert node is not None and node.inputs[0] is not None, f"{strip.name} is given as it came"
    return node.inputs[0] if node.op_type == "Squeeze" else strip


def _constant(graph: ir.Graph, name: str, number: float) -> ir.Value:
    return register(graph, ir.Tensor(np.array(number, np.float32), name=f"half_layers.{name}"))


def _narrow(body: ir.Graph, index: int, down: ir.Value | None) -> None:
    """Let a Scan's body give float16, or without a factor the 8-bit numbers that it would have widened."""
    exact = body.outputs[index]
    if down is not None:
        nodes = _pair(f"{exact.name}.half", exact, ("Mul", [down]), ("Cast", []), ir.DataType.FLOAT16)
        dtype = ir.DataType.FLOAT16
    else:
        squeeze, codes = exact.producer(), codes_of(_squeezed(exact))
        assert squeeze is not None and codes is not None, f"{exact.name} is not widened"
        nodes = [ir.node("Squeeze", [codes[0], *squeeze.inputs[1:]], name=f"{exact.name}.codes")]
        nodes[0].outputs[0].name, dtype = nodes[0].name, ir.DataType.UINT8
    body.extend(nodes)
    narrow = nodes[-1].outputs[0]
    narrow.shape, narrow.type = exact.shape, ir.TensorType(dtype)
    body.outputs[index] = narrow


def _widen(strip: ir.Value, up: ir.Value, codes: Codes | None) -> None:
    """Give the readers of a strip float32; of what is cut from it, only that is widened."""
    dtype = ir.DataType.FLOAT16 if codes is None else ir.DataType.UINT8
    strip.dtype = dtype
    while (following := _only_reader(strip)) is not None and following.op_type in ("Slice", "Unsqueeze"):
        strip = following.outputs[0]
        strip.dtype = dtype
    if codes is None:
        nodes = _pair(f"{strip.name}.wide", strip, ("Cast", []), ("Mul", [up]), ir.DataType.FLOAT)
    else:
        nodes = [ir.node("DequantizeLinear", [strip, *codes[1:]], name=f"{strip.name}.wide")]
        nodes[0].outputs[0].name = nodes[0].name
    wide = nodes[-1].outputs[0]
    wide.shape, wide.dtype = strip.shape, ir.DataType.FLOAT
    hand_on(strip, nodes[0], wide)
    taken = strip.producer()
    assert taken is not None, f"strip {strip.name} is read as it came"
    home(taken).insert_after(taken, nodes)


def _convert(empty: ir.Node) -> None:
    """Let no strip of one layer have the type of another one."""
    result, source = empty.outputs[0], empty.inputs[0]
    assert source is not None and source.dtype is not None and result.dtype is not None
    if source.dtype is result.dtype:
        return
    assert empty.graph is not None
    cast = ir.node("Cast", [result], {"to": int(result.dtype)}, name=f"{result.name}.cast")
    value = cast.outputs[0]
    value.name, value.shape, value.type = cast.name, result.shape, ir.TensorType(result.dtype)
    hand_on(result, cast, value)
    result.dtype = source.dtype
    empty.graph.insert_after(empty, cast)


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = value.uses()
    return next(iter(uses)).node if len(uses) == 1 else None


def _pair(
    name: str,
    value: ir.Value,
    first: tuple[str, Sequence[ir.Value]],
    second: tuple[str, Sequence[ir.Value]],
    cast_to: ir.DataType,
) -> list[ir.Node]:
    """Two nodes one after the other, each of an operator and what it takes beside its input."""
    nodes: list[ir.Node] = []
    for i, (op_type, operands) in enumerate((first, second)):
        attributes = {"to": int(cast_to)} if op_type == "Cast" else {}
        node = ir.node(op_type, [value, *operands], attributes, name=f"{name}.{i}")
        value = node.outputs[0]
        value.name = f"{name}.{i}"
        nodes.append(node)
    return nodes
