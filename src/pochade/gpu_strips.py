"""Rows of the strips beside a strip, for graphics cards: cut before a loop, not in it.

On a CPU the body of a loop over strips cuts them from the layer around it, at positions that the loop hands over with
each strip (`pochade.export.strips`). A card's loop hands everything over in the card's memory, and a cut has to wait
until the host has read from there where it begins and ends: four times for every strip of every layer. But which strip
lies beside which is known for all at once. So the rows of all strips are cut before the loop, brought to the strips
beside them, and handed over like the strips themselves; no number comes down to the host.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from pochade.graph_edit import home, register, subgraphs


class _Corner(NamedTuple):
    """What a position stands for."""

    strips: ir.Value
    """Whose rows each strip takes, (strips)."""
    row: ir.Value
    """Row of that strip, (1), a constant."""


def take_rows_before_loops(model: ir.Model) -> int:
    """Cut before each Scan what its body cuts at positions it is handed, and say how many cuts there were."""
    changed = 0
    axes: list[ir.Value] = []
    for scan in list(model.graph.all_nodes()):
        for body in subgraphs(scan) if scan.op_type == "Scan" else ():
            for cut in [node for node in body if _is_cut(node, body)]:
                if not axes:
                    axes = [register(model.graph, ir.Tensor(np.array([i]), name=f"gpu_strips.axis{i}")) for i in (0, 2)]
                _hand_over(scan, body, cut, *axes)
                changed += 1
            _drop_unread(scan, body)
    return changed


def _is_cut(node: ir.Node, body: ir.Graph) -> bool:
    """Whether a node of a body cuts rows from a layer around it at positions that the body is handed."""
    return node.op_type == "Slice" and all(position in body.inputs for position in node.inputs[1:3])


def _hand_over(scan: ir.Node, body: ir.Graph, cut: ir.Node, strips_axis: ir.Value, rows_axis: ir.Value) -> None:
    """Let the body take from its loop what it cut.

    Args:
        scan: the loop.
        body: of it.
        cut: a node of the body.
        strips_axis: 0, (1).
        rows_axis: 2, (1).
    """
    layer, result = cut.inputs[0], cut.outputs[0]
    first, last = (_corner(scan.inputs[body.inputs.index(position)]) for position in cut.inputs[1:3])
    rows = ir.node("Slice", [layer, first.row, last.row, rows_axis], name=f"{result.name}.of_all")
    beside = ir.node("Gather", [rows.outputs[0], first.strips], {"axis": 0}, name=f"{result.name}.beside")
    for node in (rows, beside):
        node.outputs[0].name = node.name
    home(scan).insert_before(scan, [rows, beside])
    handed = ir.Value(name=f"{result.name}.handed", type=layer.type if layer is not None else None)
    body.inputs.append(handed)
    scan.resize_inputs(len(scan.inputs) + 1)
    scan.replace_input_with(len(scan.inputs) - 1, beside.outputs[0])
    cut.op_type = "Unsqueeze"
    cut.resize_inputs(2)
    for i, value in enumerate((handed, strips_axis)):
        cut.replace_input_with(i, value)


def _corner(position: ir.Value | None) -> _Corner:
    """What a position (strips, 2) was joined from."""
    joined = position.producer() if position is not None else None
    assert joined is not None and joined.op_type == "Concat", "a position that is not one of export's"
    column, repeated = (value.producer() for value in joined.inputs if value is not None)
    assert column is not None and repeated is not None, f"{joined.name} is incomplete"
    strips, row = column.inputs[0], repeated.inputs[0]
    assert column.op_type == "Unsqueeze" and repeated.op_type == "Expand" and strips is not None and row is not None
    return _Corner(strips, row)


def _drop_unread(scan: ir.Node, body: ir.Graph) -> None:
    """Hand a body nothing that it does not read."""
    kept = [i for i, value in enumerate(body.inputs) if value.uses() or value.is_graph_output()]
    values = [scan.inputs[i] for i in kept]
    body.inputs[:] = [body.inputs[i] for i in kept]
    for i, value in enumerate(values):
        scan.replace_input_with(i, value)
    scan.resize_inputs(len(kept))
    scan.attributes.add(ir.AttrInt64("num_scan_inputs", len(kept)))
