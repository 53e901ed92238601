"""What a Scan of `pochade.export.strips` does with one strip of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import onnx_ir as ir
import torch
from torch import Tensor

from pochade.export.graph_ops import GraphOps, port

F32, I64 = ir.DataType.FLOAT, ir.DataType.INT64
END = 1 << 40
"""As the end of a slice: the last one."""


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


class Shared(Protocol):
    """What bodies take from the graph around them."""

    def ints(self, *values: int) -> ir.Value:
        """An int64 vector."""

    def neighbours(self, side: int, first: int, last: int) -> tuple[ir.Value, ir.Value]:
        """Where to cut rows from a layer (strips, channels, rows, width), for each of its strips.

        Args:
            side: -1 for rows of the strip before it, 1 for those of the one after it; at the ends, of itself.
            first: row of that strip.
            last: row behind the last one.

        Returns:
            Starts and ends (strips, 2) along strips and rows, int64.
        """

    def inside(self, side: int) -> ir.Value:
        """1 for each strip that has one on that side, 0 for the last one there, float32 (strips)."""

    def floats(self, *values: float) -> ir.Value:
        """A float32 vector."""

    def weight(self, name: str) -> ir.Value:
        """A weight."""

    def phase_weight(self, name: str, row: int, column: int) -> ir.Value:
        """The 2x2 kernel that a 3x3 one is to one of four phases of doubled pixels, see `phase_kernel`."""


class Rows(NamedTuple):
    """A strip and some of the rows around it, each (1, channels, rows, width)."""

    above: ir.Value | None
    here: ir.Value
    below: ir.Value | None


class Body:
    """The graph of a Scan in the making. Its inputs are strips of layers and whatever else is known of each strip."""

    def __init__(self, owner: Shared, name: str) -> None:
        """Begin.

        Args:
            owner: the graph around it.
            name: prefix of its values.
        """
        self.name, self.op = name, GraphOps(f"{name}_")
        self._owner = owner
        self._inputs: dict[ir.Value, ir.Value] = {}
        """By what lies around the body, whose first axis is that of strips."""
        self._strips: dict[ir.Value, ir.Value] = {}
        """By their layers, as (1, channels, rows, width)."""

    @property
    def scanned(self) -> list[ir.Value]:
        """What the Scan slices for the inputs, in order."""
        return list(self._inputs)

    def take(self, layer: ir.Value, channels: int, above: int, below: int) -> Rows:
        """This strip of a layer (strips, channels, rows, width), with so many rows of the strips before and after it.

        Beyond the first and last strip they are rows of that strip; see `zeroed`.
        """
        if layer not in self._strips:
            strip = self._input(layer, F32, (channels, "rows", "columns"))
            self._strips[layer] = self.op.Unsqueeze(strip, self._owner.ints(0))
        return Rows(
            self._rows_of(layer, -1, -above, END) if above else None,
            self._strips[layer],
            self._rows_of(layer, 1, 0, below) if below else None,
        )

    def cut(self, rows: ir.Value, above: int, below: int) -> Rows:
        """The parts of a strip that was computed together with the rows around it."""
        op, ints = self.op, self._owner.ints

        def part(start: int, end: int) -> ir.Value:
            value: ir.Value = op.Slice(rows, ints(start), ints(end), ints(2))
            return value

        return Rows(
            part(0, above) if above else None,
            self.trimmed(rows, above, below),
            part(-below, END) if below else None,
        )

    def trimmed(self, rows: ir.Value, above: int, below: int) -> ir.Value:
        """A strip less so many of its first and last rows."""
        if above == below == 0:
            return rows
        inner: ir.Value = self.op.Slice(
            rows, self._owner.ints(above), self._owner.ints(-below if below else END), self._owner.ints(2)
        )
        return inner

    def joined(self, rows: Rows) -> ir.Value:
        """One strip of all the rows."""
        parts = [part for part in rows if part is not None]
        return parts[0] if len(parts) == 1 else self.op.Concat(*parts, axis=2)

    def zeroed(self, rows: Rows) -> Rows:
        """The same, with zeros where the picture ends."""

        def masked(part: ir.Value | None, side: int) -> ir.Value | None:
            return None if part is None else self.op.Mul(part, self._input(self._owner.inside(side), F32, ()))

        return Rows(masked(rows.above, -1), rows.here, masked(rows.below, 1))

    def normalized(self, rows: Rows, parameters: Sequence[ir.Value], epsilon: float, activated: bool) -> Rows:
        """Every part normalized by scale, bias, mean and variance of its channels, and then perhaps SiLU of it."""

        def ready(part: ir.Value | None) -> ir.Value | None:
            if part is None:
                return None
            normed: ir.Value = self.op.BatchNormalization(part, *parameters, epsilon=epsilon)
            return self.microsoft("QuickGelu", normed, alpha=1.0) if activated else normed

        here = ready(rows.here)
        assert here is not None
        return Rows(ready(rows.above), here, ready(rows.below))

    def doubled(self, rows: ir.Value) -> ir.Value:
        """A strip twice as large, less its first and its last row."""
        doubled = self.op.Resize(
            rows,
            None,
            self._owner.floats(1, 1, 2, 2),
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
        return self.trimmed(doubled, 1, 1)

    def phases(self, rows: ir.Value, weight: str, bias: ir.Value) -> ir.Value:
        """The 3x3 convolution of the doubled strip, for all of its rows but the first and the last.

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
            value.type, value.shape = ir.TensorType(F32), ir.Shape(named(shape, self.name))
        inputs = list(self._inputs.values())
        return ir.Graph(inputs, [value for value, _ in outputs], nodes=self.op.nodes, name=self.name)

    def _input(self, scanned: ir.Value, dtype: ir.DataType, shape: tuple[int | str, ...]) -> ir.Value:
        """What belongs to this strip; the Scan finds it without copying."""
        if scanned not in self._inputs:
            name = f"{self.name}_input{len(self._inputs)}"
            self._inputs[scanned] = port(name, dtype, named(shape, name))
        return self._inputs[scanned]

    def _rows_of(self, layer: ir.Value, side: int, first: int, last: int) -> ir.Value:
        """Some rows of a strip next to this one, nothing else of which is copied."""
        starts, ends = (self._input(value, I64, (2,)) for value in self._owner.neighbours(side, first, last))
        rows: ir.Value = self.op.Slice(layer, starts, ends, self._owner.ints(0, 2))
        return rows


def named(shape: Sequence[int | str], owner: str) -> tuple[int | str, ...]:
    """A shape whose free axes bear the name of their owner."""
    return tuple(size if isinstance(size, int) else f"{owner}_{size}" for size in shape)
