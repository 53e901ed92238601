"""Changes to a graph that several rewrites share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import onnx_ir as ir

from pochade.graph_edit import register, subgraphs
from pochade.quant.select import Weight, constant_shape
from pochade.quant.streamed import Array, StreamedTensor

MICROSOFT = "com.microsoft"


def graphs_around(graph: ir.Graph) -> dict[ir.Graph, ir.Node]:
    """The node that each graph inside of another one is the body or a branch of."""
    return {body: node for node in graph.all_nodes() for body in subgraphs(node)}


def add_initializer(
    weight: Weight, suffix: str, dtype: ir.DataType, shape: Sequence[int], chunks: Callable[[], Iterator[Array]]
) -> ir.Value:
    """A new initializer beside a weight, named after it and computed when it is written."""
    return register(weight.graph, StreamedTensor(f"{weight.name}.{suffix}", dtype, shape, chunks))


def hand_on(value: ir.Value, reader: ir.Node, result: ir.Value) -> None:
    """Let all readers of a value read another one that is made of it, but the node that makes it.

    Args:
        value: as it was; it may be an output of its graph.
        reader: goes on to read it, as its first input.
        result: of that node or of one behind it.
    """
    value.replace_all_uses_with(result, replace_graph_outputs=True)
    reader.replace_input_with(0, value)


def drop(weight: Weight) -> None:
    """Remove the initializer of a weight that nothing reads any more, and the Cast that widened it."""
    assert not weight.source.uses(), f"{weight.name} is still read"
    cast = weight.source.producer()
    if cast is not None:
        assert cast.graph is not None, f"{weight.name} is widened outside of any graph"
        cast.graph.remove(cast, safe=True)
    del weight.graph.initializers[weight.name]


def become(node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], attributes: dict[str, int]) -> None:
    """Turn a node into a `com.microsoft` one that computes the same outputs.

    In place, so that its outputs keep their names, types and readers, and may be outputs of the graph.
    """
    node.domain, node.op_type, node.version = MICROSOFT, op_type, None
    node.attributes.clear()
    for name, number in attributes.items():
        node.attributes.add(ir.AttrInt64(name, number))
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)


def replace_linear(
    weight: Weight, op_type: str, operands: Sequence[ir.Value], bias_index: int, attributes: dict[str, int]
) -> list[ir.Node]:
    """Let every reader of a linear weight compute `op_type(x, *operands)`, its bias included.

    Args:
        weight: read by MatMul or Gemm nodes.
        op_type: of domain com.microsoft.
        operands: inputs 1 and following.
        bias_index: which input of the new node is the bias.
        attributes: of the new node.

    Returns:
        The nodes that compute it now.
    """
    products = []
    for node in weight.readers:
        bias, last = _bias(node, weight.rows)
        inputs = [node.inputs[0], *operands]
        if bias is not None:
            inputs += [None] * (bias_index - len(inputs)) + [bias]
        become(last, op_type, inputs, attributes)
        if last is not node:
            assert node.graph is not None, f"node {node.name} belongs to no graph"
            node.graph.remove(node, safe=True)
        products.append(last)
    _move_into_subgraph(weight.graph, products, operands)
    return products


def _move_into_subgraph(owner: ir.Graph, products: Sequence[ir.Node], operands: Sequence[ir.Value]) -> None:
    """Let initializers belong to the subgraph that all their readers are in, if there is one.

    ONNX Runtime looks for the weights of a Loop's body in the body alone when it makes int8 products exact on
    processors without VNNI, and quietly leaves those of the graph around it to saturate.
    """
    home = products[0].graph
    if not isinstance(home, ir.Graph) or home is owner or any(product.graph is not home for product in products):
        return
    for value in operands:
        if value.is_initializer():
            assert value.name is not None
            del owner.initializers[value.name]
            home.register_initializer(value)


def store_in_subgraphs(model: ir.Model, threshold: int) -> None:
    """Let large initializers of subgraphs be Constant nodes, which stay in the graph file.

    ONNX Runtime refuses to read a subgraph's initializers from a data file that has several hard links, and uv
    installs by hard links. Those of the main graph it does read.

    Args:
        model: changed in place.
        threshold: bytes, up to which a tensor stays in the graph file anyway.
    """
    for graph in model.graphs():
        if graph is model.graph:
            continue
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= threshold:
                continue
            del graph.initializers[name]
            # A tensor that is computed when it is written knows no protobuf of its own.
            attribute = ir.AttrTensor("value", ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name))
            constant = ir.node("Constant", [], {"value": attribute}, outputs=[value], name=f"{name}.constant")
            graph.insert_before(graph[0], constant)


def add_constant(weight: Weight, suffix: str, array: Array, widen: bool = True) -> ir.Value:
    """A new initializer beside a weight, named after it, read as the type that the weight's readers compute in.

    A narrower type is widened by a Cast, which ONNX Runtime folds when it opens the session, unless told not to.
    """
    name = f"{weight.name}.{suffix}"
    value = register(weight.graph, ir.Tensor(array, name=name))
    if not widen or value.dtype is weight.dtype:
        return value
    wide = ir.Value(name=f"{name}.expanded", shape=value.shape, type=ir.TensorType(weight.dtype))
    cast = ir.node("Cast", [value], {"to": int(weight.dtype)}, outputs=[wide], name=wide.name)
    weight.graph.insert_before(weight.graph[0], cast)
    return wide


def scale_input(weight: Weight, products: Sequence[ir.Node], factors: Array) -> None:
    """Multiply the first input of each node by factors along its last axis."""
    _before(weight, products, "Mul", [add_constant(weight, "input_factors", factors)], weight.dtype)


def quantize_input(weight: Weight, products: Sequence[ir.Node], scale: ir.Value, zero: ir.Value) -> None:
    """Round the first input of each node to uint8."""
    _before(weight, products, "QuantizeLinear", [scale, zero], ir.DataType.UINT8)


def _before(
    weight: Weight, products: Sequence[ir.Node], op_type: str, operands: Sequence[ir.Value], dtype: ir.DataType
) -> None:
    """Let each node read `op_type(x, *operands)` in place of its first input x."""
    for i, product in enumerate(products):
        source, graph = product.inputs[0], product.graph
        assert graph is not None and source is not None, f"node {product.name} belongs to no graph"
        name = f"{weight.name}.input{i}"
        output = ir.Value(name=name, shape=source.shape, type=ir.TensorType(dtype))
        graph.insert_before(product, ir.node(op_type, [source, *operands], outputs=[output], name=name))
        product.replace_input_with(0, output)


def add_branch(weight: Weight, products: Sequence[ir.Node], down: ir.Value, up: ir.Value) -> None:
    """Add x @ down @ up to what each node computes from its first input x."""
    for i, product in enumerate(products):
        output, graph = product.outputs[0], product.graph
        assert graph is not None, f"node {product.name} belongs to no graph"
        name = f"{weight.name}.branch{i}"
        thin = ir.node("MatMul", [product.inputs[0], down], name=f"{name}.down")
        wide = ir.node("MatMul", [thin.outputs[0], up], name=f"{name}.up")
        total = ir.node("Add", [output, wide.outputs[0]], name=f"{name}.sum")
        for node, suffix in ((thin, "down"), (wide, "up"), (total, "sum")):
            node.outputs[0].name = f"{name}.{suffix}"
            node.outputs[0].dtype = weight.dtype
        graph.insert_after(product, [thin, wide, total])
        # All readers but the sum itself, the graph's own outputs included.
        hand_on(output, total, total.outputs[0])
        # What reads the layer, now or later, finds the sum under the layer's name.
        output.name, total.outputs[0].name = f"{name}.product", output.name
        total.outputs[0].shape = output.shape


def _bias(node: ir.Node, rows: int) -> tuple[ir.Value | None, ir.Node]:
    """Bias of a linear layer or None, and the node whose output is the layer's: itself or a following Add."""
    if node.op_type == "Gemm":
        return (node.inputs[2] if len(node.inputs) > 2 else None), node
    output = node.outputs[0]
    uses = output.uses()
    if output.is_graph_output() or len(uses) != 1:
        return None, node
    add = next(iter(uses)).node
    # An Add in a subgraph runs once per iteration; moving the product there would repeat it.
    if add.op_type != "Add" or add.domain != "" or add.graph is not node.graph:
        return None, node
    for value in add.inputs:
        if value is not output and constant_shape(value) == (rows,):
            return value, add
    return None, node
