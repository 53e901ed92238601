"""Factors of whole strips, folded into numbers of which there are few.

Graphs that compute strip by strip keep layers in other units than their own: divided in float16 (`half_layers`), in
steps of 8-bit numbers (`int8_conv`). Going from one to the other reads and writes a whole strip. Whatever comes next
can do that by the way: a rounding by its step, a normalization by what it knows of each channel, a sum by giving what
it adds to in the same units, so that a residual layer never leaves those it is stored in.
"""

from __future__ import annotations

from math import frexp

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pochade.graph_edit import home, register, subgraphs
from pochade.quant.int8_strips import codes_of
from pochade.quant.surgery import hand_on

SIGNIFICAND = 0.5
"""Of every power of two, by `math.frexp`."""


def rewrite(model: ir.Model) -> None:
    """Fold what multiplies whole strips in all bodies of Scans; to be called last."""
    for scan in list(model.graph.all_nodes()):
        for body in subgraphs(scan) if scan.op_type == "Scan" else ():
            folds = _Folds(model.graph, scan)
            while any(folds.pass_factor(node) for node in list(body)):
                pass
            for node in list(body):
                folds.widen_normalized(node)


class _Folds:
    """Folds of one Scan's body, and the few numbers that are computed before it."""

    def __init__(self, graph: ir.Graph, scan: ir.Node) -> None:
        self._graph, self._scan = graph, scan
        self._prefix = scan.outputs[0].name
        self._made: dict[tuple[object, ...], ir.Value] = {}

    def pass_factor(self, product: ir.Node) -> bool:
        """Let a reader of a product with a power of two, which rounds nothing, take what was multiplied.

        Returns:
            Whether one could, or all, where the power is 1.
        """
        factor = _factor(product)
        if factor is None:
            return False
        result, x = product.outputs[0], product.inputs[0]
        assert x is not None
        if factor == 1 and not result.is_graph_output():
            result.replace_all_uses_with(x)
            _drop_unused(product)
            return True
        for reader, index in [(use.node, use.idx) for use in result.uses()]:
            left = self._absorb(reader, index, factor)
            if left is None:
                continue
            for i, value in enumerate(reader.inputs):
                if value is result:
                    reader.replace_input_with(i, x)
            if left != 1:
                self._multiply(reader, left)
            _drop_unused(product)
            return True
        return False

    def _absorb(self, reader: ir.Node, index: int, factor: float) -> float | None:
        """Prepare a reader for an input without its factor; the factor of what it gives then, None if it cannot."""
        match reader.op_type:
            case "Squeeze" | "ReduceMean":
                return factor
            case "Mul" if reader.inputs[0] is reader.inputs[1]:
                return factor**2
            case "Mul" if index == 0 and (second := _factor(reader)) is not None:
                reader.replace_input_with(1, self._number(factor * second))
                return 1
            case "Add" if self._divide(reader, 1 - index, factor):
                return factor
            case "Conv" if index == 0:
                self._scale(reader, 2, 1 / factor)
                return factor
            case "QuantizeLinear" if index == 0:
                self._scale(reader, 1, 1 / factor)
                return 1
            case "BatchNormalization" if index == 0:
                self._scale(reader, 3, 1 / factor)
                self._scale(reader, 4, 1 / factor**2)
                epsilon = reader.attributes["epsilon"].as_float() / factor**2
                reader.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon)
                return 1
        return None

    def _divide(self, total: ir.Node, index: int, factor: float) -> bool:
        """Have the other term of a sum without a factor too, if what gives it can do that by the way."""
        term = total.inputs[index]
        maker = None if term is None else term.producer()
        if term is None or maker is None:
            return False
        if _factor(maker) == factor:
            total.replace_input_with(index, maker.inputs[0])
            _drop_unused(maker)
            return True
        if codes_of(term) is not None and len(term.uses()) == 1:
            self._scale(maker, 1, 1 / factor)
            return True
        return False

    def _multiply(self, node: ir.Node, factor: float) -> None:
        """Let the readers of what a node gives read that times a factor."""
        value = node.outputs[0]
        product = ir.node("Mul", [value, self._number(factor)], name=f"{value.name}.times")
        result = product.outputs[0]
        result.name, result.shape, result.type = product.name, value.shape, value.type
        home(node).insert_after(node, product)
        hand_on(value, product, result)

    def _scale(self, node: ir.Node, index: int, factor: float) -> None:
        """Multiply a small input of a node."""
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            return
        if value.const_value is None:
            node.replace_input_with(index, self._before("Mul", value, self._number(factor)))
        else:
            scaled = (value.const_value.numpy() * factor).astype(np.float32)
            node.replace_input_with(index, self._constant(f"{value.name}.times{factor:g}", scaled))

    def widen_normalized(self, norm: ir.Node) -> None:
        """Let the normalization of 8-bit numbers that nothing else widens be a step for each channel, and a sum.

        ONNX Runtime normalizes in one thread.
        """
        source = norm.inputs[0] if norm.op_type == "BatchNormalization" else None
        widened = None if source is None or codes_of(source) is None else source.producer()
        if source is None or widened is None or len(source.uses()) != 1:
            return
        gain, bias, mean, variance = (value for value in norm.inputs[1:] if value is not None)
        step, zero = (value for value in widened.inputs[1:] if value is not None)
        assert gain.shape is not None and zero.const_value is not None, f"{norm.name} has no fixed channels"
        channels = int(gain.shape.numpy()[0])
        known = self._before("Add", variance, self._number(norm.attributes["epsilon"].as_float()))
        gains = self._before("Div", gain, self._before("Sqrt", known))
        offsets = self._before("Sub", bias, self._before("Mul", mean, gains))
        column = self._constant(f"column{channels}", np.array([channels, 1, 1]))
        zeros = self._constant(f"{zero.name}.for{channels}", np.full(channels, zero.const_value.numpy()))
        widened.replace_input_with(1, self._before("Mul", gains, step))
        widened.replace_input_with(2, zeros)
        widened.attributes["axis"] = ir.AttrInt64("axis", 1)
        norm.op_type = "Add"
        norm.attributes.clear()
        norm.resize_inputs(2)
        norm.replace_input_with(1, self._before("Reshape", offsets, column))

    def _before(self, op_type: str, *inputs: ir.Value) -> ir.Value:
        """What a node before the Scan gives, the same for equal ones."""
        key = (op_type, *inputs)
        if key not in self._made:
            node = ir.node(op_type, inputs, name=f"{self._prefix}.{op_type}{len(self._made)}")
            value = node.outputs[0]
            value.name, value.type = node.name, ir.TensorType(ir.DataType.FLOAT)
            home(self._scan).insert_before(self._scan, node)
            self._made[key] = value
        return self._made[key]

    def _number(self, number: float) -> ir.Value:
        return self._constant(f"number{number:.9g}", np.array(number, np.float32))

    def _constant(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        name = f"strip_folds.{name}"
        known = self._graph.initializers.get(name)
        return register(self._graph, ir.Tensor(array, name=name)) if known is None else known


def _factor(node: ir.Node) -> float | None:
    """The power of two that a node multiplies its first input by, if that is what it does."""
    if node.op_type != "Mul" or node.inputs[1] is None or node.inputs[1].const_value is None:
        return None
    stored = node.inputs[1].const_value
    # What takes its place is a scalar of this type.
    if stored.dtype is not ir.DataType.FLOAT or len(stored.shape) != 0:
        return None
    number = float(stored.numpy().item())
    return number if frexp(number)[0] == SIGNIFICAND else None


def _drop_unused(node: ir.Node) -> None:
    """Remove a node whose result nothing reads."""
    result = node.outputs[0]
    if not result.uses() and not result.is_graph_output():
        home(node).remove(node, safe=True)
