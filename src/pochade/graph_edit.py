"""Small changes to a graph, for whatever rewrites one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir


def register(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initializer of the tensor's name, shape and type."""
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=tensor.name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def before(reader: ir.Node, op_type: str, inputs: list[ir.Value], dtype: ir.DataType, **attributes: int) -> ir.Value:
    """The result of a new node that stands before a reader of it."""
    name = f"{inputs[0].name}.{op_type}.{dtype}"
    node = ir.node(op_type, inputs, attributes, name=name)
    value = node.outputs[0]
    value.name, value.dtype = name, dtype
    if op_type == "Cast":
        value.shape = inputs[0].shape
    home(reader).insert_before(reader, node)
    return value


def home(node: ir.Node) -> ir.Graph:
    """The graph, body or branch that a node is of."""
    assert isinstance(node.graph, ir.Graph), f"{node.name} belongs to no graph"
    return node.graph


def forget_shapes(model: ir.Model) -> None:
    """Drop what ONNX Runtime infers again: a third of the file."""
    for graph in model.graphs():
        kept = {*graph.inputs, *graph.outputs, *graph.initializers.values()}
        for node in graph:
            for value in node.outputs:
                if value not in kept:
                    value.shape, value.type = None, None


def take_else_branches(graph: ir.Graph) -> None:
    """Put the `else` branch of every If in its place: that of graphs which keep what others compute twice."""
    for node in [node for node in graph if node.op_type == "If"]:
        branch = node.attributes["else_branch"].as_graph()
        results, inner = list(branch.outputs), list(branch)
        branch.outputs.clear()
        for moved in inner:
            branch.remove(moved)
            moved.name = None  # unique in its branch alone
        graph.insert_before(node, inner)
        for value, result in zip(node.outputs, results, strict=True):
            value.replace_all_uses_with(result)
        graph.remove(node, safe=True)


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """Bodies and branches of a node."""
    return [value.as_graph() for value in node.attributes.values() if value.type is ir.AttributeType.GRAPH]


def constant_values(graph: ir.Graph, also: Iterable[ir.Value] = ()) -> Iterator[ir.Value]:
    """What is made of weights alone, and of other values that count as such."""
    known = {*(value for value in graph.initializers.values() if not value.is_graph_input()), *also}
    yield from known
    for node in graph:
        if all(value is None or value in known for value in node.inputs) and not subgraphs(node):
            known.update(node.outputs)
            yield from node.outputs
