"""Which initializers count as weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from pochade.quant.scheme import Use
from pochade.quant.select import find_weights
from tests.quant.graphs import Arrays, port

W = np.ones((24, 32), np.float32)


def found(nodes: list[NodeProto], weights: Arrays, outputs: tuple[str, ...] = ("y",)) -> dict[str, tuple[Use, int]]:
    """Use and axis of every weight of a graph with inputs x (n, 24) and ids (n)."""
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    inputs = [port("x", ["n", 24]), port("ids", ["n"], TensorProto.INT64)]
    graph = helper.make_graph(nodes, "graph", inputs, [port(name, None) for name in outputs], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return {weight.name: (weight.use, weight.axis) for weight in find_weights(ir.from_proto(model))}


def node(op_type: str, *inputs: str, **attributes: int | float) -> NodeProto:
    result = helper.make_node(op_type, list(inputs), ["y"])
    result.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    return result


@pytest.mark.parametrize(
    ("reader", "weight", "role"),
    [
        (node("MatMul", "x", "w"), W, (Use.LINEAR, 1)),
        (node("Gemm", "x", "w"), W, (Use.LINEAR, 1)),
        (node("Gemm", "x", "w", transB=1), W.T, (Use.LINEAR, 0)),
        (node("Gather", "w", "ids"), W, (Use.EMBEDDING, 0)),
        (node("Conv", "x", "w"), np.ones((8, 4, 3, 3), np.float32), (Use.CONV, 0)),
        (node("ConvTranspose", "x", "w"), np.ones((8, 4, 3, 3), np.float16), (Use.CONV, 1)),
    ],
)
def test_uses(reader: NodeProto, weight: NDArray[np.floating], role: tuple[Use, int]) -> None:
    assert found([reader], {"w": weight}) == {"w": role}


@pytest.mark.parametrize(
    ("reader", "weight"),
    [
        (node("MatMul", "w", "x"), W),
        (node("MatMul", "x", "w"), W[None]),
        (node("MatMul", "x", "w"), W.astype(np.float64)),
        (node("Gemm", "x", "w", alpha=0.5), W),
        (node("Gemm", "x", "w", transA=1), W),
        (node("Gemm", "x", "w", "x"), W),
        (node("Gather", "w", "ids", axis=1), W),
        (node("ConvTranspose", "x", "w", group=2), np.ones((8, 4, 3, 3), np.float32)),
        (node("Add", "x", "w"), W),
    ],
)
def test_what_the_operators_cannot_serve_is_left_out(reader: NodeProto, weight: NDArray[np.floating]) -> None:
    assert found([reader], {"w": weight}) == {}


def test_an_initializer_that_two_nodes_read_is_one_weight() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], [name]) for name in ("y", "z")]
    assert found(nodes, {"w": W}, ("y", "z")) == {"w": (Use.LINEAR, 1)}


def test_an_embedding_tied_to_the_output_layer_is_left_out() -> None:
    nodes = [
        helper.make_node("Gather", ["w", "ids"], ["y"]),
        helper.make_node("Gemm", ["x", "w"], ["z"], transB=1),
    ]
    assert found(nodes, {"w": W.T}, ("y", "z")) == {}


def test_an_initializer_that_is_an_output_is_left_out() -> None:
    assert found([node("MatMul", "x", "w")], {"w": W}, ("y", "w")) == {}


def test_weights_read_inside_a_loop_are_found() -> None:
    body = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["z"]), helper.make_node("Identity", ["go"], ["go_on"])],
        "body",
        [port("i", [], TensorProto.INT64), port("go", [], TensorProto.BOOL)],
        [port("go_on", [], TensorProto.BOOL), port("z", None)],
    )
    loop = helper.make_node("Loop", ["count", ""], ["y"], body=body)
    assert found([loop], {"w": W, "count": np.array(2)}) == {"w": (Use.LINEAR, 1)}
