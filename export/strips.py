"""Convolutional networks as graphs that compute a strip of rows at a time, exactly.

A graph of this kind holds every layer's output as strips (strips, channels, rows, width). A layer is a Scan over the
strips: its body takes one strip and the row above and below it from the layer before, normalizes, convolves, and
gives one strip of output with its channels' mean and variance. Statistics of the whole picture follow from those of
the strips (Chan, Golub and LeVeque 1979), so a normalization is that of the untiled network and there are no seams at
any number of strips; whole are only a layer's input, its output, and what it adds to that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from pochade.export.graph_ops import GraphOps, port
from pochade.export.trace import IR_VERSION, OPSET, lazy

F32, I64 = ir.DataType.FLOAT, ir.DataType.INT64
END = 1 << 40
"""As the end of a slice: the last one."""


@dataclass(frozen=True)
class Layer:
    """What a layer gives."""

    value: ir.Value
    """(strips, channels, rows, width)."""
    channels: int
    mean: ir.Value | None = None
    """Of each channel in each strip, (strips, channels)."""
    variance: ir.Value | None = None
    """Likewise; of a population."""


PHASE_CHANNELS = 256
"""Widest convolutions of doubled pixels that are split into phases. Wider ones lie where pictures are small: seven
ninths more weights, 24 MB of Meissonic's decoder, would buy 3 % of its products."""


def phase_kernel(kernel: Tensor, row: int, column: int) -> Tensor:
    """What a 3x3 kernel (outputs, inputs, 3, 3) is to pixels that were doubled, as (outputs, inputs, 2, 2).

    Args:
        kernel: applied to the doubled picture.
        row: 0 for its even rows, which see the pixel above once and their own twice, 1 for its odd rows.
        column: likewise for columns.
    """

    def folded(taps: tuple[Tensor, ...], phase: int, axis: int) -> Tensor:
        first, middle, last = taps
        pair = (first + middle, last) if phase else (first, middle + last)
        return torch.stack(pair, axis)

    return folded(folded(kernel.unbind(2), row, 2).unbind(3), column, 3)


class StripGraph:
    """A graph in the making."""

    def __init__(
        self, shapes: Mapping[str, torch.Size], read: Callable[[str], Tensor], groups: int, epsilon: float
    ) -> None:
        """Begin with the port `strips`, the number of strips.

        Args:
            shapes: of the weights, by name.
            read: gives a weight when it is written to disk.
            groups: of every group normalization.
            epsilon: added to their variances.
        """
        self.op = GraphOps()
        self.strips = port("strips", I64, (1,))
        self._shapes, self._read = shapes, read
        self._groups, self._epsilon = groups, epsilon
        self._weights: dict[str, ir.Value] = {}
        self._constants: dict[str, ir.Value] = {}
        self._count = self.op.Squeeze(self.strips, self.ints(0))
        self._indices = self.op.Range(self.number(0), self._count, self.number(1))
        self._indices.type, self._indices.shape = ir.TensorType(I64), ir.Shape(("strips",))
        self._stages = 0

    def ints(self, *values: int) -> ir.Value:
        """An int64 vector, the same value for the same numbers."""
        return self._constant("x".join(map(str, values)), values)

    def number(self, value: int) -> ir.Value:
        """An int64 scalar, the same value for the same number."""
        return self._constant(f"scalar_{value}", value)

    def _constant(self, name: str, values: Sequence[int] | int) -> ir.Value:
        if name not in self._constants:
            self._constants[name] = self.op.ints(name, values)
        return self._constants[name]

    def weight(self, name: str) -> ir.Value:
        """A weight, read when it is written to disk."""
        return self._weight(name, self._shapes[name], lambda: self._read(name))

    def phase_weight(self, name: str, row: int, column: int) -> ir.Value:
        """The 2x2 kernel that a 3x3 one is to one of four phases of doubled pixels, see `phase_kernel`."""
        outputs, inputs, *_ = self._shapes[name]
        shape = torch.Size((outputs, inputs, 2, 2))
        return self._weight(
            f"{name}.phase{row}{column}", shape, lambda: phase_kernel(self._read(name).float(), row, column)
        )

    def _weight(self, name: str, shape: torch.Size, source: Callable[[], Tensor]) -> ir.Value:
        if name not in self._weights:
            value = port(name, F32, tuple(shape))
            value.const_value = lazy(name, shape, torch.float32, lambda: source().float())
            self._weights[name] = value
        return self._weights[name]

    def convolve(
        self,
        x: Layer,
        name: str,
        *,
        norm: str = "",
        skip: Layer | None = None,
        shortcut: str = "",
        resample: str = "",
        measured: bool = True,
    ) -> Layer:
        """One 3x3 convolution with what stands before and after it.

        Args:
            x: its input.
            name: of its weights.
            norm: name of a group normalization of x, followed by SiLU; without, x is taken as it is.
            skip: added to the output.
            shortcut: name of a 1x1 convolution of what is added.
            resample: `up` doubles x by repeating pixels first, in effect (`PHASE_CHANNELS`); `down` takes every second
                output, for which x gets a row of zeros below and a column right of it, and none above and left.
            measured: whether a normalization follows.
        """
        self._stages += 1
        channels = self._shapes[f"{name}.weight"][0]
        body = _Body(self, f"stage{self._stages}", self._count)
        statistics = self._statistics(x, norm) if norm else None

        def ready(part: ir.Value) -> ir.Value:
            if statistics is None:
                return part
            gain, bias = self.weight(f"{norm}.weight"), self.weight(f"{norm}.bias")
            normed = body.op.BatchNormalization(part, gain, bias, *statistics, epsilon=self._epsilon)
            return body.microsoft("QuickGelu", normed, alpha=1.0)

        here = ready(body.take(x.value))
        below = body.beyond(ready(body.take(x.value, +1)), +1)
        if resample == "down":
            rows, options = body.op.Concat(here, below, axis=2), {"strides": [2, 2], "pads": [0, 0, 0, 1]}
        else:
            above = body.beyond(ready(body.take(x.value, -1)), -1)
            rows, options = body.op.Concat(above, here, below, axis=2), {"pads": [0, 1, 0, 1]}
        bias = self.weight(f"{name}.bias")
        if resample == "up" and max(channels, x.channels) <= PHASE_CHANNELS:
            y = body.phases(rows, f"{name}.weight", bias)
        else:
            rows = body.doubled(rows) if resample == "up" else rows
            y = body.op.Conv(rows, self.weight(f"{name}.weight"), bias, **options)
        if skip is not None:
            added = body.take(skip.value)
            if shortcut:
                added = body.op.Conv(added, self.weight(f"{shortcut}.weight"), self.weight(f"{shortcut}.bias"))
            y = body.op.Add(y, added)
        outputs: list[tuple[ir.Value, tuple[int | str, ...]]]
        outputs = [(body.op.Squeeze(y, self.ints(0)), (channels, "rows", "columns"))]
        if measured:
            outputs += [(value, (channels,)) for value in body.moments(y)]
        values = self.op.Scan(self._indices, body=body.graph(outputs), num_scan_inputs=1, _outputs=len(outputs))
        values = [values] if len(outputs) == 1 else list(values)
        for value, (_, shape) in zip(values, outputs, strict=True):
            value.type, value.shape = ir.TensorType(F32), ir.Shape(("strips", *_named(shape, body.name)))
        return Layer(values[0], channels, *values[1:])

    def residual(self, x: Layer, name: str) -> Layer:
        """A published residual block: two normalized convolutions around a skip connection."""
        h = self.convolve(x, f"{name}.conv1", norm=f"{name}.norm1")
        shortcut = f"{name}.conv_shortcut"
        has_shortcut = f"{shortcut}.weight" in self._shapes
        return self.convolve(
            h, f"{name}.conv2", norm=f"{name}.norm2", skip=x, shortcut=shortcut if has_shortcut else ""
        )

    def whole(self, x: Layer) -> ir.Value:
        """A layer in one piece, (1, channels, height, width)."""
        turned = self.op.Transpose(x.value, perm=[1, 0, 2, 3])
        shape = self.op.Concat(self.ints(1, x.channels, -1), self.op.Shape(turned, start=3), axis=0)
        joined: ir.Value = self.op.Reshape(turned, shape)
        return joined

    def finish(self, name: str, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Model:
        """The model; `strips` becomes its last input."""
        graph = ir.Graph(
            [*inputs, self.strips],
            list(outputs),
            nodes=self.op.nodes,
            initializers=[*self._weights.values(), *self.op.constants],
            opset_imports={"": OPSET, "com.microsoft": 1},
            name=name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="pochade")

    def _statistics(self, x: Layer, norm: str) -> tuple[ir.Value, ir.Value]:
        """Mean and variance of each channel's group over the whole picture, each (channels)."""
        assert x.mean is not None and x.variance is not None, f"{norm} follows an unmeasured layer"
        over_strips, over_group = self.ints(0), self.ints(1)
        mean, variance = self._merged(x.mean, x.variance, over_strips, keepdims=0)
        grouped = self.ints(self._groups, x.channels // self._groups)
        mean, variance = (self.op.Reshape(value, grouped) for value in (mean, variance))
        merged = self._merged(mean, variance, over_group, keepdims=1)
        flat = self.ints(-1)
        mean, variance = (self.op.Reshape(self.op.Expand(value, grouped), flat) for value in merged)
        return mean, variance

    def _merged(self, mean: ir.Value, variance: ir.Value, axes: ir.Value, keepdims: int) -> tuple[ir.Value, ir.Value]:
        """Mean and variance of the union of equally large parts."""
        op = self.op
        total = op.ReduceMean(mean, axes, keepdims=1)
        apart = op.Sub(mean, total)
        spread = op.Add(variance, op.Mul(apart, apart))
        joined = total if keepdims else op.Squeeze(total, axes)
        return joined, op.ReduceMean(spread, axes, keepdims=keepdims)


class _Body:
    """What a Scan does with one strip."""

    def __init__(self, owner: StripGraph, name: str, count: ir.Value) -> None:
        self.name, self.op = name, GraphOps(f"{name}_")
        self._owner, self._count = owner, count
        self._index = port(f"{name}_index", I64, ())

    def take(self, layer: ir.Value, offset: int = 0) -> ir.Value:
        """This strip of a layer as (1, channels, rows, width), or the row above (-1) or below (+1) it.

        Beyond the first and last strip it is a row of that strip; see `beyond`.
        """
        op, ints, number = self.op, self._owner.ints, self._owner.number
        index, edge = self._index, None
        if offset < 0:
            index, edge = op.Max(op.Sub(index, number(1)), number(0)), (ints(-1), ints(END))
        elif offset > 0:
            last = op.Sub(self._count, number(1))
            index, edge = op.Min(op.Add(index, number(1)), last), (ints(0), ints(1))
        strip = op.Gather(layer, index, axis=0)
        if edge is not None:
            strip = op.Slice(strip, *edge, ints(1))
        taken: ir.Value = op.Unsqueeze(strip, ints(0))
        return taken

    def beyond(self, row: ir.Value, offset: int) -> ir.Value:
        """A neighbouring row, zero where the picture ends."""
        op, number = self.op, self._owner.number
        last = op.Sub(self._count, number(1))
        inside = op.Greater(self._index, number(0)) if offset < 0 else op.Less(self._index, last)
        zeroed: ir.Value = op.Mul(row, op.Cast(inside, to=int(F32)))
        return zeroed

    def doubled(self, rows: ir.Value) -> ir.Value:
        """A strip with a row above and below, twice as large, with one of the doubled rows above and below."""
        op, ints = self.op, self._owner.ints
        pairs = op.Expand(op.Unsqueeze(rows, ints(3, 5)), ints(1, 1, 1, 2, 1, 2))
        doubled = op.Reshape(pairs, op.Mul(op.Shape(rows), ints(1, 1, 2, 2)))
        inner: ir.Value = op.Slice(doubled, ints(1), ints(-1), ints(2))
        return inner

    def phases(self, rows: ir.Value, weight: str, bias: ir.Value) -> ir.Value:
        """The 3x3 convolution of the doubled strip, from the strip with a row above and below it.

        Of two equal pixels a kernel sees only the sum of its weights, so each of the four phases of the result is a
        2x2 convolution of the strip itself, and 16 products take the place of 36.
        """
        op, ints = self.op, self._owner.ints
        parts = (op.Slice(rows, ints(0), ints(-1), ints(2)), op.Slice(rows, ints(1), ints(END), ints(2)))
        phases = [
            op.Conv(part, self._owner.phase_weight(weight, row, column), bias, pads=[0, 1 - column, 0, column])
            for row, part in enumerate(parts)
            for column in (0, 1)
        ]
        woven: ir.Value = op.DepthToSpace(op.Concat(*phases, axis=1), blocksize=2, mode="DCR")
        return woven

    def moments(self, y: ir.Value) -> list[ir.Value]:
        """Mean and variance of each channel, both (channels)."""
        axes, flat = self._owner.ints(0, 2, 3), self._owner.ints(-1)
        mean = self.op.ReduceMean(y, axes, keepdims=1)
        apart = self.op.Sub(y, mean)
        return [self.op.Reshape(mean, flat), self.op.ReduceMean(self.op.Mul(apart, apart), axes, keepdims=0)]

    def microsoft(self, op_type: str, *inputs: ir.Value, **attributes: float) -> ir.Value:
        """An operator of com.microsoft."""
        value: ir.Value = getattr(self.op, op_type)(*inputs, **attributes)
        producer = value.producer()
        assert producer is not None
        producer.domain = "com.microsoft"
        return value

    def graph(self, outputs: Sequence[tuple[ir.Value, tuple[int | str, ...]]]) -> ir.Graph:
        """The graph, with the shapes of its outputs."""
        for value, shape in outputs:
            value.type, value.shape = ir.TensorType(F32), ir.Shape(_named(shape, self.name))
        return ir.Graph([self._index], [value for value, _ in outputs], nodes=self.op.nodes, name=self.name)


def _named(shape: Sequence[int | str], owner: str) -> tuple[int | str, ...]:
    """A shape whose free axes bear the name of their owner."""
    return tuple(size if isinstance(size, int) else f"{owner}_{size}" for size in shape)
