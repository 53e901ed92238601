"""The Scans of a graph as graphs of their own, whose strips are computed by as many threads as there are at a time.

ONNX Runtime runs the body of a Scan for one strip after another. Threads then share every operator, of which there are
thirty for each strip of each layer: they wait for one another thousands of times, some operators know one thread alone,
and what one core wrote another reads. But strips of a layer do not depend on each other. Parted, a body is a graph that
a thread runs by itself (`pochade.runtime.parted`), and what stands between two Scans is another, run once: numbers of
each channel, of which there are few.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from pochade.component import Component, StripPart
from pochade.graph_edit import constant_values, forget_shapes, home, subgraphs, take_else_branches
from pochade.runtime.strips import computes_in_strips


def with_parts(component: Component, folder: Path) -> Component:
    """A component with the parts of its graph written beside it; as it is where it does not compute in strips.

    Args:
        component: whose files lie in the folder.
        folder: of the bundle.
    """
    if not computes_in_strips(component):
        return component
    path = folder / component.file
    # Parts say what types they take, which graphs do not say of what is between two nodes.
    model = ShapeInferencePass()(ir.load(path)).model
    written = []
    for i, part in enumerate(part_scans(model)):
        target = path.with_name(f"{path.stem}.part{i:02}.onnx")
        forget_shapes(part.model)
        target.write_bytes(ir.to_proto(part.model).SerializeToString())
        written.append(StripPart(target.name, part.strips))
    return replace(component, parts=tuple(written))


@dataclass(frozen=True)
class Part:
    """One of the graphs."""

    model: ir.Model
    strips: Mapping[str, str]
    """Inputs that differ from strip to strip, by name: the value along whose first axis they lie. None of them in what
    runs once."""


def part_scans(model: ir.Model) -> list[Part]:
    """Parts of a graph, in the order in which they run; what one gives another takes by the same name.

    Of each If they compute the `else` branch. The model is used up.
    """
    graph = model.graph
    take_else_branches(graph)
    RemoveUnusedNodesPass()(model)
    fixed = _fixed(graph)
    groups: list[list[ir.Node]] = [[]]
    for node in list(graph):
        if node.outputs[0] in fixed:
            continue
        if node.op_type == "Scan":
            groups += [[node], []]
        else:
            groups[-1].append(node)
    groups = [group for group in groups if group]
    given = _given(groups)
    graph.outputs.clear()
    parts = []
    for group, results in zip(groups, given, strict=True):
        if group[0].op_type == "Scan":
            parts.append(_body(group[0], fixed, model))
        else:
            parts.append(Part(_model(group, [], results, fixed, model), {}))
    return parts


def _fixed(graph: ir.Graph) -> set[ir.Value]:
    """What is made of weights and of the lengths of inputs: each part that reads it makes it itself.

    Zero points would otherwise be inputs, and ONNX Runtime has its fast kernels for constant ones.
    """
    lengths = (node.outputs[0] for node in graph if node.op_type == "Shape" and node.inputs[0] in graph.inputs)
    return set(constant_values(graph, lengths))


def _given(groups: Sequence[Sequence[ir.Node]]) -> list[list[ir.Value]]:
    """What others than the group itself read of what each group gives."""
    place = {inner: i for i, group in enumerate(groups) for node in group for inner in _with_bodies(node)}
    return [
        [
            value
            for node in group
            for value in node.outputs
            if value.is_graph_output() or any(place.get(use.node) != i for use in value.uses())
        ]
        for i, group in enumerate(groups)
    ]


def _body(scan: ir.Node, fixed: set[ir.Value], model: ir.Model) -> Part:
    """What a Scan does with one strip."""
    body = scan.attributes["body"].as_graph()
    ports, results = list(body.inputs), list(body.outputs)
    strips = {str(port.name): str(value.name) for port, value in zip(ports, scan.inputs, strict=True) if value}
    body.inputs.clear()
    body.outputs.clear()
    for result, value in zip(results, scan.outputs, strict=True):
        result.name = value.name
    return Part(_model(list(body), ports, results, fixed, model), strips)


def _model(
    nodes: Sequence[ir.Node],
    ports: Sequence[ir.Value],
    results: Sequence[ir.Value],
    fixed: set[ir.Value],
    model: ir.Model,
) -> ir.Model:
    """A model of nodes, which leave the graph they are in.

    Args:
        nodes: in order.
        ports: its first inputs; whatever else the nodes read follows.
        results: its outputs.
        fixed: see `_fixed`.
        model: that the nodes are of.
    """
    inside = {value for node in nodes for inner in _with_bodies(node) for value in inner.outputs}
    inside |= {value for node in nodes for inner in _with_bodies(node) for b in subgraphs(inner) for value in b.inputs}
    inside |= set(ports)
    copies: dict[ir.Value, ir.Value] = {}
    inputs, weights, first = list(ports), list[ir.Value](), list[ir.Node]()

    def brought(value: ir.Value) -> ir.Value:
        """A value from outside, as this model has it."""
        if value in copies:
            return copies[value]
        copy = ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=value.const_value)
        copies[value] = copy
        maker = value.producer()
        if maker is not None and value in fixed:
            operands = [None if operand is None else brought(operand) for operand in maker.inputs]
            kept = maker.attributes.values()
            first.append(ir.Node(maker.domain, maker.op_type, operands, kept, outputs=[copy], name=maker.name))
        else:
            (inputs if value.const_value is None else weights).append(copy)
        return copy

    for node in nodes:
        home(node).remove(node)
        for inner in _with_bodies(node):
            for i, value in enumerate(inner.inputs):
                if value is not None and value not in inside:
                    inner.replace_input_with(i, brought(value))
    graph = ir.Graph(
        inputs,
        results,
        nodes=[*first, *nodes],
        initializers=weights,
        opset_imports=dict(model.graph.opset_imports),
        name=model.graph.name,
    )
    return ir.Model(graph, ir_version=model.ir_version, producer_name=model.producer_name)


def _with_bodies(node: ir.Node) -> Iterator[ir.Node]:
    """A node, and all nodes of its bodies and branches."""
    yield node
    for body in subgraphs(node):
        for inner in body:
            yield from _with_bodies(inner)
