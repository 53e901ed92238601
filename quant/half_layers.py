"""What a codec keeps between its layers, in float16: half the memory of a large picture.

Graphs that compute strip by strip (`pochade.export.strips`) hold the output of a whole layer until the next one has
read it; at 1024x1024 the largest take a gigabyte each. Scans give float16 instead, and whoever reads a strip of it
widens that strip. Sums, statistics and products stay in float32.

Published codecs ask for float32 (`force_upcast`), since their layers may leave the range of float16. Numbers are
therefore stored divided by `DIVISOR`, which costs them no precision: they reach two millions, and one of 0.002 still
has all its bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from pochade.quant.surgery import register

DIVISOR = 32.0
"""A power of two, so that neither way rounds."""

COPIES = ("Identity", "Slice")
"""Operators whose result is (a part of) their first input; outside of Scans they hand on whole layers."""
TAKES = ("Gather", "Slice")
"""Operators by which a body takes a strip, or some rows of one."""


def rewrite(model: ir.Model) -> int:
    """Narrow every float32 picture-like output of a Scan that is read strip by strip, inside of other Scans.

    Returns:
        How many there were.
    """
    graph = model.graph
    layers = [layer for layer in _layers(graph) if layer.can_be_narrow]
    if not layers:
        return 0
    down, up = (_constant(graph, name, value) for name, value in (("down", 1 / DIVISOR), ("up", DIVISOR)))
    for layer in layers:
        for value in layer.values:
            if (scan := _scan(value)) is not None:
                _narrow(scan.attributes["body"].as_graph(), scan.outputs.index(value), down)
        for value in layer.values:
            value.dtype = ir.DataType.FLOAT16
        for reader in layer.readers:
            _widen(reader, up)
    return sum(1 for layer in layers for value in layer.values if _scan(value) is not None)


class _Layer:
    """Values that are one another: what a Scan gives, copies of it, and the results of an If that chooses one."""

    def __init__(self, first: ir.Value, around: Mapping[ir.Graph, ir.Node]) -> None:
        self._around = around
        self.values = [first]
        self.readers: list[ir.Node] = []
        """Nodes in bodies of Scans, which take a strip or some rows."""
        self.can_be_narrow = True
        for value in self.values:  # grows as it goes
            self._look_at(value)

    def _add(self, value: ir.Value) -> None:
        if value not in self.values:
            self.values.append(value)

    def _look_at(self, value: ir.Value) -> None:
        producer = value.producer()
        if producer is None or value.shape is None or len(value.shape) != 4 or value.dtype is not ir.DataType.FLOAT:
            self.can_be_narrow = False
            return
        if producer.op_type in COPIES and producer.inputs[0] is not None:
            self._add(producer.inputs[0])
        elif producer.op_type == "If":
            for name in ("then_branch", "else_branch"):
                self._add(producer.attributes[name].as_graph().outputs[producer.outputs.index(value)])
        elif producer.op_type != "Scan":
            self.can_be_narrow = False
        for use in value.uses():
            if use.node.op_type in TAKES and self._owner(use.node.graph) == "Scan":
                self.readers.append(use.node)
            elif use.node.op_type in COPIES and use.idx == 0:
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
    around = {body: node for node in graph.all_nodes() for body in _subgraphs(node)}
    for node in graph.all_nodes():
        if node.op_type == "Scan":
            for value in node.outputs:
                is_picture = value.shape is not None and len(value.shape) == 4
                if is_picture and not any(value in layer.values for layer in layers):
                    layers.append(_Layer(value, around))
    return layers


def _scan(value: ir.Value) -> ir.Node | None:
    producer = value.producer()
    return producer if producer is not None and producer.op_type == "Scan" else None


def _subgraphs(node: ir.Node) -> list[ir.Graph]:
    return [value.as_graph() for value in node.attributes.values() if value.type is ir.AttributeType.GRAPH]


def _constant(graph: ir.Graph, name: str, number: float) -> ir.Value:
    return register(graph, ir.Tensor(np.array(number, np.float32), name=f"half_layers.{name}"))


def _narrow(body: ir.Graph, index: int, down: ir.Value) -> None:
    """Let a Scan's body give float16."""
    exact = body.outputs[index]
    nodes = _pair(f"{exact.name}.half", exact, ("Mul", [down]), ("Cast", []), ir.DataType.FLOAT16)
    body.extend(nodes)
    narrow = nodes[-1].outputs[0]
    narrow.shape, narrow.type = exact.shape, ir.TensorType(ir.DataType.FLOAT16)
    body.outputs[index] = narrow


def _widen(taken: ir.Node, up: ir.Value) -> None:
    """Give the readers of a strip float32; of what is cut from it, only that is widened."""
    last = taken
    while (following := _only_reader(last)) is not None and following.op_type in ("Slice", "Unsqueeze"):
        last.outputs[0].dtype = ir.DataType.FLOAT16
        last = following
    strip = last.outputs[0]
    strip.dtype = ir.DataType.FLOAT16
    nodes = _pair(f"{strip.name}.wide", strip, ("Cast", []), ("Mul", [up]), ir.DataType.FLOAT)
    wide = nodes[-1].outputs[0]
    strip.replace_all_uses_with(wide)
    nodes[0].replace_input_with(0, strip)
    assert last.graph is not None, f"node {last.name} belongs to no graph"
    last.graph.insert_after(last, nodes)


def _only_reader(node: ir.Node) -> ir.Node | None:
    uses = node.outputs[0].uses()
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
