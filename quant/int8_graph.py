"""Two more graphs of a component whose weights are stored in blocks, by which it multiplies 8 bits at full speed.

Products of blocks take half as long again as those of one scale for each output. One graph, the expander, gives the
weights of all of them in the latter form: 8-bit codes and scales, with a rounding error that is small beside what 4
bits left. The other graph takes these as inputs. Files stay as small as they were; who opens a session chooses.

Weights are inputs and not initializers, since ONNX Runtime lays initializers out anew when it opens a session, and
holds them twice while it does. Inputs it lays out piece by piece as it multiplies, which a thousand rows make up for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from pochade.component import Component, Int8Graph, with_graphs
from pochade.gpu_graph import OWN_DOMAIN
from pochade.graph_edit import register
from pochade.quant import dynamic_int8, nbits
from pochade.quant.functions import FunctionTape
from pochade.quant.scheme import Scheme
from pochade.quant.surgery import become
from pochade.session_memory import weight_bytes

REPEATED = ("transformer",)
"""Components that run on every step; what runs once is done before its weights would be expanded."""

LEAST = 1e-30
"""Least scale: zeros have zeros for codes, whatever it is."""


def with_int8_graphs(component: Component, folder: Path, scheme: Scheme) -> Component:
    """A component with these graphs written beside those that it has, if it is one that they help.

    Args:
        component: whose files lie in the folder.
        folder: of the bundle.
        scheme: that it was quantized by.
    """
    if component.name not in REPEATED:
        return component

    def can_round(weight: str) -> bool:
        return not scheme.is_spiky(f"{component.name}/{weight}")

    return with_graphs(component, "int8", lambda file: save_int8_graph(folder / file, can_round))


def save_int8_graph(path: Path, can_round: Callable[[str], bool] = lambda _: True) -> Int8Graph | None:
    """Write both graphs beside a component's first.

    Args:
        path: of the first graph, `<name>.onnx`; with what takes low-rank changes, `<name>.lora.onnx`.
        can_round: whether inputs of the layer of a weight of this name may be rounded with one scale for all.

    Returns:
        What the manifest says about them; None where no product can be expanded.
    """
    model = ir.load(path)
    products = [node for node in model.graph if _can_expand(node) and can_round(_weight(node))]
    if not products:
        return None
    expander = _Expander(model.graph.opset_imports[""])
    for node in products:
        _expand(model.graph, node, expander)
    RemoveUnusedNodesPass()(model)
    target, expands = (path.with_name(f"{path.stem}.{ending}.onnx") for ending in ("int8", "expand"))
    ir.save(model, target)
    ir.save(expander.model(model.ir_version), expands)
    return Int8Graph(target.name, expands.name, weight_bytes(model) + expander.bytes)


def _can_expand(node: ir.Node) -> bool:
    """Whether a node multiplies float32 by a weight in symmetric blocks, 4 or 8 bits a number."""
    if node.op_type != "MatMulNBits" or node.attributes.get_int("bits", 4) not in (4, 8):
        return False
    x, codes, scales, *more = node.inputs
    stored = all(value is not None and value.is_initializer() for value in (codes, scales))
    return stored and not any(more[:2]) and x is not None and scales is not None and scales.dtype is ir.DataType.FLOAT


def _weight(product: ir.Node) -> str:
    """Name of the weight that a product's codes were made of."""
    codes = product.inputs[1]
    assert codes is not None and codes.name is not None, f"{product.name} has no weight"
    return codes.name.rpartition(".int")[0]


def _expand(graph: ir.Graph, node: ir.Node, expander: _Expander) -> None:
    """Let a product take its weight as inputs of the graph."""
    given = [node.inputs[0], *expander.add(graph, node)]
    bias = node.inputs[nbits.BIAS_INDEX] if len(node.inputs) > nbits.BIAS_INDEX else None
    if bias is not None:
        given += [None] * (dynamic_int8.BIAS_INDEX - len(given)) + [bias]
    become(node, "DynamicQuantizeMatMul", given, {})


class _Expander:
    """The graph that gives expanded weights, in the making."""

    def __init__(self, opset: int) -> None:
        self._opset = opset
        self._graph = ir.Graph([], [], nodes=[], opset_imports={"": opset, OWN_DOMAIN: 1}, name="expander")
        self._widths: dict[int, ir.Value] = {}
        self._known: dict[str, list[ir.Value]] = {}
        self.bytes = 0
        """Of all expanded weights."""

    def add(self, graph: ir.Graph, product: ir.Node) -> list[ir.Value]:
        """Expand a product's weight; returns the inputs of its graph that take codes and scales."""
        codes, scales = product.inputs[1:3]
        assert codes is not None and scales is not None and codes.name is not None, f"{product.name} is incomplete"
        if codes.name not in self._known:
            self._known[codes.name] = self._add(graph, product, codes, scales)
        return self._known[codes.name]

    def _add(self, graph: ir.Graph, product: ir.Node, codes: ir.Value, scales: ir.Value) -> list[ir.Value]:
        bits, width, rows = (product.attributes.get_int(name, 4) for name in ("bits", "K", "N"))
        given = [*(self._read(value) for value in (codes, scales)), self._width(width)]
        node = ir.node(f"Expand{bits}Bits", given, domain=OWN_DOMAIN, num_outputs=2)
        shapes = {"int8": (ir.DataType.INT8, (width, rows)), "steps": (ir.DataType.FLOAT, (rows,))}
        inputs = [ir.Value() for _ in shapes]
        for result, taken, (ending, (dtype, shape)) in zip(node.outputs, inputs, shapes.items(), strict=True):
            for value in (result, taken):
                value.name, value.shape, value.type = f"{codes.name}.{ending}", ir.Shape(shape), ir.TensorType(dtype)
        graph.inputs.extend(inputs)
        self._graph.append(node)
        self._graph.outputs.extend(node.outputs)
        self.bytes += (width + 4) * rows
        return inputs

    def _read(self, value: ir.Value) -> ir.Value:
        """An initializer of this graph, from where that of the other one lies."""
        assert value.const_value is not None, f"{value.name} is computed"
        return register(self._graph, value.const_value)

    def _width(self, width: int) -> ir.Value:
        if width not in self._widths:
            self._widths[width] = register(self._graph, ir.Tensor(np.array([width]), name=f"width_{width}"))
        return self._widths[width]

    def model(self, ir_version: int) -> ir.Model:
        """The model."""
        functions = [_function(bits, self._opset) for bits in (4, 8)]
        return ir.Model(self._graph, ir_version=ir_version, producer_name="pochade", functions=functions)


def _function(bits: int, opset: int) -> ir.Function:
    """How codes (rows, blocks, bytes) and scales (rows, blocks) become codes (width, rows) int8 and scales (rows)."""
    ops = FunctionTape()
    codes, scales, width = given = [ir.Value(name=name) for name in ("codes", "scales", "width")]
    if bits == 4:
        byte = np.arange(256)
        # What the two codes in a byte stand for, the lower half first.
        levels = ops.constant("levels", (np.stack((byte & 15, byte >> 4), 1) - 8).astype(np.float32))
        numbers = ops.op("Gather", [levels, ops.op("Cast", [codes], {"to": int(ir.DataType.INT32)})])
        numbers = ops.op("Reshape", [numbers, ops.integers(0, 0, -1)])
    else:
        numbers = ops.op("Cast", [codes], {"to": int(ir.DataType.FLOAT)})
        numbers = ops.op("Sub", [numbers, ops.number(128)])
    first, second = ops.integers(0), ops.integers(1)
    scaled = ops.op("Mul", [numbers, ops.op("Unsqueeze", [scales, ops.integers(2)])])
    rows = ops.op("Slice", [ops.op("Reshape", [scaled, ops.integers(0, -1)]), first, width, second])
    # Two reductions rather than one of Abs, which would be another copy.
    greatest, least = (ops.op(name, [rows, second], {"keepdims": 0}) for name in ("ReduceMax", "ReduceMin"))
    peak = ops.op("Max", [greatest, ops.op("Neg", [least])])
    step = ops.op("Mul", [peak, ops.number(1 / 127)])
    step = ops.op("Max", [step, ops.number(LEAST)])
    zero = ops.op("Cast", [ops.op("Sub", [step, step])], {"to": int(ir.DataType.INT8)})
    rounded = ops.op("QuantizeLinear", [rows, step, zero], {"axis": 0})
    outputs = [ops.op("Transpose", [rounded], {"perm": [1, 0]}), step]
    return ops.function(f"Expand{bits}Bits", given, outputs, opset, {})
