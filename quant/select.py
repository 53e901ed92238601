"""Which initializers of a component can be quantized, and what they are used for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from pochade.quant.scheme import Use

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(frozen=True)
class Weight:
    """An initializer and all nodes that read it, in any subgraph, all in the same way."""

    value: ir.Value
    """The initializer."""
    source: ir.Value
    """What the readers read: the initializer, or the output of a Cast that widens it from float16."""
    name: str
    tensor: ir.TensorProtocol
    shape: tuple[int, ...]
    use: Use
    axis: int
    """Axis of the outputs (linear, convolution) or of the rows that ids choose (embedding)."""
    dtype: ir.DataType
    """Type the readers compute in."""
    readers: tuple[ir.Node, ...]

    @property
    def rows(self) -> int:
        """Outputs of a linear layer, rows of an embedding."""
        return self.shape[self.axis]

    @property
    def width(self) -> int:
        """Numbers per row: inputs of a linear layer, width of an embedding."""
        return int(self.tensor.size) // self.rows

    @property
    def graph(self) -> ir.Graph:
        """The graph that owns the initializer; readers may sit in its subgraphs."""
        graph = self.value.graph
        assert isinstance(graph, ir.Graph), f"initializer {self.name} belongs to no graph"
        return graph


def find_weights(model: ir.Model) -> list[Weight]:
    """Float weights of linear layers, embeddings and convolutions, in the order of the graphs.

    One initializer is one weight however many nodes read it. Where readers differ in what they do with it (an
    embedding table that is also the output layer, a matrix read plain and transposed), no single form serves them
    all and it is left out, as is one that is a port of the graph.
    """
    found = (_weight(value) for graph in model.graphs() for value in graph.initializers.values())
    return [weight for weight in found if weight is not None]


def constant_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Shape of an initializer, also of one behind a Cast, None for any other value."""
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Cast":
        value = producer.inputs[0]
    if value is None or not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return None
    return tuple(value.const_value.shape.numpy())


def _weight(value: ir.Value) -> Weight | None:
    shape, tensor = constant_shape(value), value.const_value
    if shape is None or tensor is None or tensor.dtype not in FLOATS or value.is_graph_output() or 0 in shape:
        return None
    widened = _widened(value) if tensor.dtype is ir.DataType.FLOAT16 else None
    source = value if widened is None else widened
    roles = set(_roles(source, shape))
    role = roles.pop() if len(roles) == 1 else None
    if role is None or source.is_graph_output():
        return None
    use, axis = role
    dtype = tensor.dtype if widened is None else ir.DataType.FLOAT
    readers = tuple(usage.node for usage in source.uses())
    return Weight(value, source, str(value.name), tensor, shape, use, axis, dtype, readers)


def _widened(value: ir.Value) -> ir.Value | None:
    """The value as float32, where a Cast to that is all that reads it."""
    readers = [usage.node for usage in value.uses()]
    if len(readers) != 1 or readers[0].op_type != "Cast":
        return None
    return readers[0].outputs[0] if readers[0].attributes["to"].as_int() == ir.DataType.FLOAT else None


def _roles(source: ir.Value, shape: tuple[int, ...]) -> Iterator[tuple[Use, int] | None]:
    """Use and output axis according to every reader; None from one that needs the weight as it is."""
    for usage in source.uses():
        # com.microsoft has operators of the same names.
        role = ROLES.get(usage.node.op_type) if usage.node.domain == "" else None
        yield role(usage.node, usage.idx, shape) if role else None


def _matmul(node: ir.Node, index: int, shape: tuple[int, ...]) -> tuple[Use, int] | None:
    # A vector on the left has its own shape rule, which the quantized operators do not share.
    left = node.inputs[0].shape if node.inputs[0] is not None else None
    is_linear = index == 1 and len(shape) == 2 and (left is None or len(left) > 1)
    return (Use.LINEAR, 1) if is_linear else None


def _gemm(node: ir.Node, index: int, shape: tuple[int, ...]) -> tuple[Use, int] | None:
    attributes = node.attributes
    if index != 1 or attributes.get_int("transA", 0) != 0 or attributes.get_float("alpha", 1.0) != 1.0:
        return None
    axis = 0 if attributes.get_int("transB", 0) else 1
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        # The quantized operators add a vector as it is.
        is_bias = attributes.get_float("beta", 1.0) == 1.0 and constant_shape(node.inputs[2]) == (shape[axis],)
        return (Use.LINEAR, axis) if is_bias else None
    return Use.LINEAR, axis


def _gather(node: ir.Node, index: int, shape: tuple[int, ...]) -> tuple[Use, int] | None:
    return (Use.EMBEDDING, 0) if index == 0 and len(shape) == 2 and node.attributes.get_int("axis", 0) == 0 else None


def _conv(_: ir.Node, index: int, __: tuple[int, ...]) -> tuple[Use, int] | None:
    return (Use.CONV, 0) if index == 1 else None


def _conv_transpose(node: ir.Node, index: int, _: tuple[int, ...]) -> tuple[Use, int] | None:
    # With groups, axis 1 counts the outputs of a group, and a scale per output would need another shape.
    return (Use.CONV, 1) if index == 1 and node.attributes.get_int("group", 1) == 1 else None


ROLES = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Gather": _gather,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
}
