"""Convolutions on int8 weights and uint8 pictures: QuantizeLinear, QLinearConv, DequantizeLinear.

What a convolution is given and what it gives lie in ranges that were measured beforehand, one for each tensor, and are
cut off beyond them. Weights have a scale for each output channel. The graphs compute strip by strip
(`pochade.export.strips`), and fixed ranges make every strip the same at any number of strips.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pochade.component import FREE_AXIS
from pochade.graph_edit import take_else_branches
from pochade.quant.fidelity import Call
from pochade.quant.rtn import byte_steps, channel_scales, round_channels
from pochade.quant.scheme import Use
from pochade.quant.select import Weight, find_weights
from pochade.quant.streamed import Array, read
from pochade.quant.surgery import add_constant, add_initializer, drop, graphs_around
from pochade.runtime.graph import GraphSession

MARGIN = 1.1
"""How much wider the ranges are than what was seen. Of a trained codec, measured on one picture, it left 46.2 dB of
others and 43.4 dB of the worst of them, where bare ranges left 45.6 and 40.3 dB and a quarter more 45.6 and 42.7."""

WIDE = 256
"""Channels of a convolution's result from which zero points are free, see `_freed`. On a processor with AMX those of
512 channels then took half as long and those of 256 two thirds, but those of 128 a twentieth longer."""

Bounds = tuple[float, float]
"""Least and greatest number of a tensor."""


@dataclass(frozen=True)
class Ranges:
    """What a convolution was seen to take and to give."""

    given: Bounds
    result: Bounds

    def __or__(self, other: Ranges) -> Ranges:
        """Of both."""
        return Ranges(_union(self.given, other.given), _union(self.result, other.result))


def _union(a: Bounds, b: Bounds) -> Bounds:
    return min(a[0], b[0]), max(a[1], b[1])


def measure_ranges(path: Path, calls: Sequence[Call]) -> Mapping[str, Ranges]:
    """Ranges around every convolution in a Scan of a float graph, by the name of its weight.

    Args:
        path: graph file; its data files lie beside it.
        calls: runs of the component to measure.
    """
    model = ir.load(path)
    take_else_branches(model.graph)
    watched = dict(_watch(model))
    session = GraphSession(ir.to_proto(model).SerializeToString(), path.parent)
    found: dict[str, Ranges] = {}
    for call in calls:
        for output, rows in session.run(list(watched), call.inputs).items():
            least, greatest = rows.min(0).tolist(), rows.max(0).tolist()
            here = Ranges((least[0], greatest[1]), (least[2], greatest[3]))
            name = watched[output]
            found[name] = found[name] | here if name in found else here
    return found


def rewrite(model: ir.Model, weights: Sequence[Weight], ranges: Mapping[str, Ranges]) -> None:
    """Let every reader of convolutions' weights multiply 8-bit numbers.

    Args:
        model: that they are of.
        weights: read by Conv nodes in bodies of Scans.
        ranges: by the weight's name.
    """
    around = graphs_around(model.graph)
    axis = functools.cache(lambda: _free_axis(model.graph))
    for group in _together(weights):
        shared = functools.reduce(operator.or_, (ranges[weight.name] for weight in group))
        x, y = (
            [add_constant(group[0], f"{port}_{name}", array, widen=False) for name, array in _named(bounds)]
            for port, bounds in (("input", shared.given), ("output", shared.result))
        )
        taken = [x[0], _freed(x[1], axis())] if group[0].rows >= WIDE else x
        for weight in group:
            _rewrite(weight, x, taken, y, around)


def _free_axis(graph: ir.Graph) -> ir.Node:
    """Tells, at the beginning of a graph of strips, the length of its axis `FREE_AXIS`."""
    strips = next(value for value in graph.inputs if value.name == "strips")
    strips.shape = ir.Shape((FREE_AXIS,))
    length = ir.Value(name=f"{FREE_AXIS}.length", shape=ir.Shape((1,)), type=ir.TensorType(ir.DataType.INT64))
    node = ir.node("Shape", [strips], outputs=[length], name=length.name)
    graph.insert_before(graph[0], node)
    return node


def _freed(zero: ir.Value, axis: ir.Node) -> ir.Value:
    """A zero point (1) that is known when a graph is opened only where its axis `FREE_AXIS` is.

    ONNX Runtime has a kernel for convolutions whose zero points are constant, which knows VNNI but not AMX. The one for
    all others knows both, but first copies out what each output is made of: a ninth slower without AMX.
    """
    free = ir.Value(name=f"{zero.name}.free", shape=ir.Shape((1,)), type=ir.TensorType(ir.DataType.UINT8))
    assert axis.graph is not None, f"node {axis.name} belongs to no graph"
    axis.graph.insert_after(axis, ir.node("Expand", [zero, axis.outputs[0]], outputs=[free], name=free.name))
    return free


def _together(weights: Sequence[Weight]) -> list[list[Weight]]:
    """Weights by the picture that their convolutions are parts of: it has one range, and so have they."""
    groups: dict[Hashable, list[Weight]] = {}
    for weight in weights:
        uses = [use.node for node in weight.readers for use in node.outputs[0].uses()]
        joined = all(node.op_type == "Concat" for node in uses)
        groups.setdefault(frozenset(node.outputs[0] for node in uses) if joined else weight.name, []).append(weight)
    return list(groups.values())


def _rewrite(
    weight: Weight,
    x: Sequence[ir.Value],
    taken: Sequence[ir.Value],
    y: Sequence[ir.Value],
    around: Mapping[ir.Graph, ir.Node],
) -> None:
    """Let every reader of a weight round to x, multiply what is `taken` for x, and give y: scales and zero points."""
    scales = channel_scales(read(weight.tensor), axis=0)

    def codes() -> Iterator[Array]:
        yield round_channels(read(weight.tensor), scales.reshape(-1, *[1] * (len(weight.shape) - 1)))

    assert x[0].const_value is not None, f"the steps of what {weight.name} multiplies are computed"
    steps = scales * x[0].const_value.numpy()
    stored = add_initializer(weight, "int8", ir.DataType.INT8, weight.shape, codes)
    w = [
        add_constant(weight, "scales", scales, widen=False),
        add_constant(weight, "zeros", np.zeros(len(scales), np.int8), widen=False),
    ]
    near: dict[ir.Graph, ir.Value] = {}
    for i, node in enumerate(weight.readers):
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        offset = [] if bias is None else [_offset(weight, i, bias, steps)]
        body = node.graph
        home = around[body].graph if isinstance(body, ir.Graph) and body in around else weight.graph
        assert isinstance(home, ir.Graph), f"node {node.name} belongs to no graph"
        if home not in near:
            near[home] = stored if home is weight.graph else _brought_near(weight, home, stored)
        _replace(node, f"{weight.name}.conv{i}", x, [*taken, near[home], *w, *y, *offset], y)
    drop(weight)


def _brought_near(weight: Weight, home: ir.Graph, stored: ir.Value) -> ir.Value:
    """A weight that belongs to the graph right around the body that reads it, without a copy in the file.

    ONNX Runtime packs a weight for its fast kernel when it opens the session, but looks for it no further than one
    graph around a body. It folds this node there first.
    """
    name = f"{stored.name}.{home.name}"
    shape = add_constant(weight, f"int8.{home.name}.shape", np.array(weight.shape), widen=False)
    value = ir.Value(name=name, shape=stored.shape, type=ir.TensorType(ir.DataType.INT8))
    home.insert_before(home[0], ir.node("Reshape", [stored, shape], outputs=[value], name=name))
    return value


def _replace(
    node: ir.Node, name: str, x: Sequence[ir.Value], operands: Sequence[ir.Value], y: Sequence[ir.Value]
) -> None:
    """Put three nodes in the place of a Conv, the last of which gives what it gave."""
    graph, source, result = node.graph, node.inputs[0], node.outputs[0]
    assert graph is not None and source is not None, f"node {node.name} belongs to no graph"
    rounded = ir.Value(name=f"{name}.input", shape=source.shape, type=ir.TensorType(ir.DataType.UINT8))
    product = ir.Value(name=f"{name}.output", shape=result.shape, type=ir.TensorType(ir.DataType.UINT8))
    graph.insert_before(
        node,
        [
            ir.node("QuantizeLinear", [source, *x], outputs=[rounded], name=f"{name}.quantize"),
            ir.Node("", "QLinearConv", [rounded, *operands], node.attributes.values(), outputs=[product], name=name),
        ],
    )
    node.op_type, node.name = "DequantizeLinear", f"{name}.dequantize"
    node.attributes.clear()
    node.resize_inputs(3)
    for i, value in enumerate((product, *y)):
        node.replace_input_with(i, value)


def _named(bounds: Bounds) -> Iterator[tuple[str, Array]]:
    """Scale and zero point of a range, a little wider."""
    scale, zero = byte_steps(*(MARGIN * end for end in bounds))
    yield "scale", scale
    yield "zero", zero


def _offset(weight: Weight, reader: int, bias: ir.Value, steps: NDArray[np.float32]) -> ir.Value:
    """A bias in steps of the products."""
    assert bias.const_value is not None, f"the bias of {weight.name} is computed"
    codes = np.rint(read(bias.const_value) / steps).clip(-(2**31), 2**31 - 1).astype(np.int32)
    return add_constant(weight, f"bias{reader}", codes, widen=False)


def _watch(model: ir.Model) -> Iterator[tuple[str, str]]:
    """Let a graph tell the bounds around every convolution in a Scan, a row for each strip.

    Yields:
        The name of such an output, and that of the convolution's weight.
    """
    around = graphs_around(model.graph)
    for weight in find_weights(model):
        if weight.use is not Use.CONV:
            continue
        for i, node in enumerate(weight.readers):
            scan = around.get(node.graph) if isinstance(node.graph, ir.Graph) else None
            if scan is not None and scan.op_type == "Scan":
                name = f"{weight.name}.bounds{i}"
                _tell(scan, node, name)
                model.graph.outputs.append(scan.outputs[-1])
                yield name, weight.name


def _tell(scan: ir.Node, conv: ir.Node, name: str) -> None:
    """Another output (strips, 4) of a Scan: the bounds of what a convolution in it is given, and gives."""
    body = scan.attributes["body"].as_graph()
    parts = [
        ir.node(op_type, [value], {"keepdims": 0}, name=f"{name}.{i}{op_type}")
        for i, value in enumerate((conv.inputs[0], conv.outputs[0]))
        for op_type in ("ReduceMin", "ReduceMax")
    ]
    axis = ir.node("Constant", [], {"value_ints": [0]}, name=f"{name}.axis")
    lifted = [ir.node("Unsqueeze", [p.outputs[0], axis.outputs[0]], name=f"{p.name}.lifted") for p in parts]
    joined = ir.node("Concat", [node.outputs[0] for node in lifted], {"axis": 0}, name=f"{name}.joined")
    for node in (*parts, axis, *lifted, joined):
        node.outputs[0].name = str(node.name)
    body.extend([*parts, axis, *lifted, joined])
    told = joined.outputs[0]
    told.shape, told.type = ir.Shape((4,)), ir.TensorType(ir.DataType.FLOAT)
    body.outputs.append(told)
    scan.resize_outputs(len(scan.outputs) + 1)
    scan.outputs[-1].name = name
    scan.outputs[-1].shape, scan.outputs[-1].type = ir.Shape(("strips", 4)), ir.TensorType(ir.DataType.FLOAT)
