"""What a codec keeps between its layers, in float16: half the memory of a large picture.

Graphs that compute strip by strip (`pochade.export.strips`) hold the output of a whole layer until the next one has
read it; at 1024x1024 the largest take a gigabyte each. Scans give float16 instead, and whoever reads a strip of it
widens that strip. Sums, statistics and products stay in float32.

Published codecs ask for float32 (`force_upcast`), since their layers may leave the range of float16. Numbers are
therefore stored divided by `DIVISOR`, which costs them no precision: they reach two millions, and one of 0.002 still
has all its bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

DIVISOR = 32.0
"""A power of two, so that neither way rounds."""


def rewrite(model: ir.Model) -> int:
    """Narrow every float32 picture-like output of a Scan that is read strip by strip, inside of other Scans.

    Returns:
        How many there were.
    """
    graph = model.graph
    scans = [node for node in graph if node.op_type == "Scan" and node.domain == ""]
    layers = [(scan, i) for scan in scans for i, value in enumerate(scan.outputs) if _is_layer(value, graph)]
    if not layers:
        return 0
    down, up = (_constant(graph, name, value) for name, value in (("down", 1 / DIVISOR), ("up", DIVISOR)))
    for scan, i in layers:
        _narrow(scan.attributes["body"].as_graph(), i, down)
        scan.outputs[i].dtype = ir.DataType.FLOAT16
        for reader in list(dict.fromkeys(use.node for use in scan.outputs[i].uses())):
            _widen(reader, up)
    return len(layers)


def _is_layer(value: ir.Value, graph: ir.Graph) -> bool:
    """Whether a value is (strips, channels, rows, columns) and every reader takes one strip of it."""
    readers = [use.node for use in value.uses()]
    return (
        value.dtype is ir.DataType.FLOAT
        and value.shape is not None
        and len(value.shape) == 4
        and not value.is_graph_output()
        and bool(readers)
        and all(node.op_type == "Gather" and node.graph is not graph for node in readers)
    )


def _constant(graph: ir.Graph, name: str, number: float) -> ir.Value:
    tensor = ir.Tensor(np.array(number, np.float32), name=f"half_layers.{name}")
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _narrow(body: ir.Graph, index: int, down: ir.Value) -> None:
    """Let a Scan's body give float16."""
    exact = body.outputs[index]
    nodes = _pair(f"{exact.name}.half", exact, ("Mul", [down]), ("Cast", []), ir.DataType.FLOAT16)
    body.extend(nodes)
    narrow = nodes[-1].outputs[0]
    narrow.shape, narrow.type = exact.shape, ir.TensorType(ir.DataType.FLOAT16)
    body.outputs[index] = narrow


def _widen(gather: ir.Node, up: ir.Value) -> None:
    """Give the readers of a strip float32; of what is cut from it, only that is widened."""
    last = gather
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
