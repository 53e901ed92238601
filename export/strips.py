"""Convolutional networks as graphs that compute a strip of rows at a time, exactly.

A graph of this kind holds every layer's output as strips (strips, channels, rows, width). A layer is a Scan over the
strips: its body takes one strip and the rows above and below it from the layer before, normalizes, convolves, and
gives one strip of output with its channels' mean and variance. Statistics of the whole picture follow from those of
the strips (Chan, Golub and LeVeque 1979), so a normalization is that of the untiled network and there are no seams at
any number of strips; whole are only a layer's input, its output, and what it adds to that.

A layer need not be kept: then its Scan gives the statistics alone, and whoever reads the layer computes the rows it
needs anew, from the layer before (`StripGraph.choose`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from pochade.export.graph_ops import GraphOps, port
from pochade.export.strip_body import F32, I64, Body, Rows, named, phase_kernel
from pochade.export.trace import IR_VERSION, OPSET, lazy

__all__ = ["F32", "I64", "Layer", "StripGraph"]

Reader = Callable[[Body, int, int], Rows]
"""Gives, in a body, the strip with so many rows above and below it; beyond the picture they may be anything."""

PHASE_CHANNELS = 256
"""Widest convolutions of doubled pixels that are split into phases. Wider ones lie where pictures are small: seven
ninths more weights, 24 MB of Meissonic's decoder, would buy 3 % of its products."""


@dataclass(frozen=True)
class Layer:
    """What a layer gives."""

    channels: int
    read: Reader
    value: ir.Value | None
    """(strips, channels, rows, width), of a layer that is kept."""
    mean: ir.Value | None = None
    """Of each channel in each strip, (strips, channels)."""
    variance: ir.Value | None = None
    """Likewise; of a population."""

    @classmethod
    def kept(cls, value: ir.Value, channels: int, *moments: ir.Value) -> Layer:
        """A layer that is in memory."""
        return cls(channels, lambda body, above, below: body.take(value, channels, above, below), value, *moments)

    @property
    def parts(self) -> list[ir.Value]:
        """Value, mean and variance, as far as there are any."""
        return [value for value in (self.value, self.mean, self.variance) if value is not None]


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
        self.op = self._main = GraphOps()
        self.strips = port("strips", I64, (1,))
        self.recompute: ir.Value | None = None
        """Port that says whether to save memory, once something can be chosen."""
        self._shapes, self._read = shapes, read
        self._groups, self._epsilon = groups, epsilon
        self._weights: dict[str, ir.Value] = {}
        self._constants: dict[str, ir.Value] = {}
        self._known: dict[tuple[int, ...], ir.Value] = {}
        """What is known of each strip, (strips) and (strips, 2)."""
        count = self.op.Squeeze(self.strips, self.ints(0))
        self._last = self.op.Sub(count, self.number(1))
        self._indices = self.op.Range(self.number(0), count, self.number(1))
        self._stages = self._choices = 0

    def ints(self, *values: int) -> ir.Value:
        """An int64 vector, the same value for the same numbers."""
        return self._constant("x".join(map(str, values)), lambda name: self._main.ints(name, values))

    def number(self, value: int) -> ir.Value:
        """An int64 scalar, the same value for the same number."""
        return self._constant(f"scalar_{value}", lambda name: self._main.ints(name, value))

    def floats(self, *values: float) -> ir.Value:
        """A float32 vector, the same value for the same numbers."""
        return self._constant(
            "x".join(f"{value:.9g}f" for value in values), lambda name: self._main.floats(name, values)
        )

    def _constant(self, name: str, make: Callable[[str], ir.Value]) -> ir.Value:
        if name not in self._constants:
            self._constants[name] = make(name)
        return self._constants[name]

    def neighbours(self, side: int, first: int, last: int) -> tuple[ir.Value, ir.Value]:
        """Where to cut rows of each strip's neighbours from a layer, see `strip_body.Shared`."""
        return self._corners(side, 0, first), self._corners(side, 1, last)

    def inside(self, side: int) -> ir.Value:
        """Whether each strip has a neighbour on that side, see `strip_body.Shared`."""
        if (side,) not in self._known:
            op, i = self._main, self._indices
            has_one = op.Greater(i, self.number(0)) if side < 0 else op.Less(i, self._last)
            self._known[side,] = op.Cast(has_one, to=int(F32))
        return self._known[side,]

    def _corners(self, side: int, beyond: int, row: int) -> ir.Value:
        """The index of each strip's neighbour, or the next one, and a row: (strips, 2), the same for the same ones."""
        key = side, beyond, row
        if key not in self._known:
            op = self._main
            moved = op.Add(self._indices, self.number(side))
            within = op.Max(moved, self.number(0)) if side < 0 else op.Min(moved, self._last)
            strips = op.Unsqueeze(op.Add(within, self.number(beyond)), self.ints(1))
            self._known[key] = op.Concat(strips, op.Expand(self.ints(row), op.Shape(strips)), axis=1)
        return self._known[key]

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
        activated: bool = True,
        skip: Layer | None = None,
        shortcut: str = "",
        resample: str = "",
        measured: bool = True,
        keep: bool = True,
    ) -> Layer:
        """One 3x3 or 1x1 convolution with what stands before and after it.

        Args:
            x: its input.
            name: of its weights.
            norm: name of a group normalization of x; without, x is taken as it is.
            activated: whether SiLU follows the normalization.
            skip: added to the output.
            shortcut: name of a 1x1 convolution of what is added.
            resample: `up` doubles x by repeating pixels first, in effect (`PHASE_CHANNELS`); `down` takes every second
                output, for which x gets a row of zeros below and a column right of it, and none above and left.
            measured: whether a normalization follows.
            keep: whether the layer is kept in memory; otherwise whoever reads it computes it again.
        """
        compute = self._convolution(x, name, norm, resample, activated)
        body = self._body()
        y = compute(body, 0, 0).here
        if skip is not None:
            added = skip.read(body, 0, 0).here
            if shortcut:
                added = body.op.Conv(added, self.weight(f"{shortcut}.weight"), self.weight(f"{shortcut}.bias"))
            y = body.op.Add(y, added)
        channels = self._shapes[f"{name}.weight"][0]
        outputs: list[tuple[ir.Value, tuple[int | str, ...]]] = []
        if keep:
            outputs.append((body.op.Squeeze(y, self.ints(0)), (channels, "rows", "columns")))
        if measured:
            outputs += [(value, (channels,)) for value in body.moments(y)]
        values = self._scan(body, outputs)
        for value, (_, shape) in zip(values, outputs, strict=True):
            _describe(value, shape, body.name)
        return Layer.kept(values[0], channels, *values[1:]) if keep else Layer(channels, compute, None, *values)

    def _scan(self, body: Body, outputs: Sequence[tuple[ir.Value, tuple[int | str, ...]]]) -> list[ir.Value]:
        """What a body gives of all strips."""
        graph = body.graph(outputs)
        scanned = body.scanned
        values = self.op.Scan(*scanned, body=graph, num_scan_inputs=len(scanned), _outputs=len(outputs))
        return [values] if len(outputs) == 1 else list(values)

    def _convolution(self, x: Layer, name: str, norm: str, resample: str, activated: bool = True) -> Reader:
        """Computes rows of the layer that a convolution of x is."""
        parameters: tuple[ir.Value, ...] = ()
        if norm:
            parameters = (self.weight(f"{norm}.weight"), self.weight(f"{norm}.bias"), *self._statistics(x, norm))
        kernel, bias = f"{name}.weight", self.weight(f"{name}.bias")
        reach = self._shapes[kernel][-1] // 2
        in_phases = resample == "up" and max(self._shapes[kernel][0], x.channels) <= PHASE_CHANNELS

        def compute(body: Body, above: int, below: int) -> Rows:
            # Two rows of the doubled picture are one of x, and each convolution takes one more on either side.
            before, after = (1 + (n + 1) // 2 if resample == "up" else n + reach for n in (above, below))
            rows = x.read(body, 0 if resample == "down" else before, after)
            rows = body.zeroed(body.normalized(rows, parameters, self._epsilon, activated) if norm else rows)
            joined = body.joined(rows)
            if resample == "down":
                y = body.op.Conv(joined, self.weight(kernel), bias, strides=[2, 2], pads=[0, 0, 0, 1])
            elif in_phases:
                y = body.phases(joined, kernel, bias)
            else:
                joined = body.doubled(joined) if resample == "up" else joined
                y = body.op.Conv(joined, self.weight(kernel), bias, pads=[0, reach, 0, reach])
            if resample == "up":
                y = body.trimmed(y, 2 * (before - 1) - above, 2 * (after - 1) - below)
            return body.cut(y, above, below)

        return compute

    def recomputed(self, x: Layer, name: str, mean: ir.Value, variance: ir.Value, resample: str = "") -> Layer:
        """The layer that `convolve` makes of x as it is, not kept, where its statistics are known already."""
        return Layer(self._shapes[f"{name}.weight"][0], self._convolution(x, name, "", resample), None, mean, variance)

    def residual(self, x: Layer, name: str, keep_inner: bool = True) -> Layer:
        """A published residual block: two normalized convolutions around a skip connection.

        Args:
            x: its input.
            name: of the block.
            keep_inner: whether what is between the convolutions is kept in memory.
        """
        h = self.convolve(x, f"{name}.conv1", norm=f"{name}.norm1", keep=keep_inner)
        shortcut = f"{name}.conv_shortcut"
        has_shortcut = f"{shortcut}.weight" in self._shapes
        return self.convolve(
            h, f"{name}.conv2", norm=f"{name}.norm2", skip=x, shortcut=shortcut if has_shortcut else ""
        )

    def attend(self, x: Layer, name: str) -> Layer:
        """A published attention block: one head, of every cell of x to every other, around a skip connection.

        Keys and values are whole, queries two rows of cells at a time, or one where rows are odd, at any number of
        strips: of a 1024x1024 picture whose cells are 8 pixels wide the scores would be a gigabyte.

        Args:
            x: its input.
            name: of the block; its four matrices are 1x1 convolutions, `to_q` divided by the root of its width.
        """
        q, k, v = (
            self.convolve(x, f"{name}.{part}", norm=f"{name}.group_norm", activated=False, measured=False).value
            for part in ("to_q", "to_k", "to_v")
        )
        op, ints, channels = self.op, self.ints, self.ints(x.channels)
        # (strips, channels, rows, width) to (chunks, cells, channels), (channels, cells) and (cells, channels).
        height = op.Mul(self.strips, op.Shape(q, start=2, end=3))
        chunks = op.Div(height, op.Sub(ints(2), op.Mod(height, ints(2))))
        queries = op.Reshape(op.Transpose(q, perm=[0, 2, 3, 1]), op.Concat(chunks, ints(-1), channels, axis=0))
        keys = op.Reshape(op.Transpose(k, perm=[1, 0, 2, 3]), ints(x.channels, -1))
        values = op.Reshape(op.Transpose(v, perm=[0, 2, 3, 1]), ints(-1, x.channels))
        self._stages += 1
        body = GraphOps(f"stage{self._stages}_")
        chunk = port(f"stage{self._stages}_queries", F32, ("queries", x.channels))
        mixed = body.MatMul(body.Softmax(body.MatMul(chunk, keys), axis=-1), values)
        mixed.type, mixed.shape = ir.TensorType(F32), ir.Shape(("queries", x.channels))
        graph = ir.Graph([chunk], [mixed], nodes=body.nodes, name=f"stage{self._stages}")
        y = op.Scan(queries, body=graph, num_scan_inputs=1)
        strips = op.Concat(self.strips, ints(-1), op.Shape(q, start=3), channels, axis=0)
        y = op.Transpose(op.Reshape(y, strips), perm=[0, 3, 1, 2])
        return self.convolve(Layer.kept(y, x.channels), f"{name}.to_out.0", skip=x)

    def choose(self, make: Callable[[bool], Sequence[ir.Value]]) -> list[ir.Value]:
        """The results of `make(True)`, or those of `make(False)` where the port `recompute` is true.

        Args:
            make: adds to the graph what fast (True) or small (False) takes; both give values of the same kinds.
        """
        if self.recompute is None:
            self.recompute = port("recompute", ir.DataType.BOOL, ())
        self._choices += 1
        around, branches, results = self.op, [], []
        for keep, name in ((False, f"small{self._choices}"), (True, f"fast{self._choices}")):
            self.op = GraphOps(f"{name}_")
            results.append(list(make(keep)))
            branches.append(ir.Graph([], results[-1], nodes=self.op.nodes, name=name))
        self.op = around
        small, fast = branches
        values = self.op.If(self.recompute, then_branch=small, else_branch=fast, _outputs=len(results[0]))
        for value, example in zip(values, results[1], strict=True):
            assert example.shape is not None
            sizes = [size if isinstance(size, int) else str(axis) for axis, size in enumerate(example.shape)]
            _describe(value, tuple(sizes[1:]), value.name)
        return list(values)

    def again(self, value: ir.Value, keep: bool) -> ir.Value:
        """A layer's value (strips, ...) under another name, or no strip of it."""
        taken: ir.Value = (
            self.op.Identity(value) if keep else self.op.Slice(value, self.ints(0), self.ints(0), self.ints(0))
        )
        taken.type, taken.shape = value.type, value.shape
        return taken

    def whole(self, x: Layer) -> ir.Value:
        """A layer in one piece, (1, channels, height, width)."""
        turned = self.op.Transpose(x.value, perm=[1, 0, 2, 3])
        shape = self.op.Concat(self.ints(1, x.channels, -1), self.op.Shape(turned, start=3), axis=0)
        joined: ir.Value = self.op.Reshape(turned, shape)
        return joined

    def finish(self, name: str, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Model:
        """The model; `strips` becomes an input after those given, and `recompute` one after that."""
        graph = ir.Graph(
            [*inputs, self.strips, *([] if self.recompute is None else [self.recompute])],
            list(outputs),
            nodes=self.op.nodes,
            initializers=[*self._weights.values(), *self.op.constants],
            opset_imports={"": OPSET, "com.microsoft": 1},
            name=name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="pochade")

    def _body(self) -> Body:
        self._stages += 1
        return Body(self, f"stage{self._stages}")

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


def _describe(value: ir.Value, shape: tuple[int | str, ...], owner: str | None) -> None:
    """Say that a value is float32 strips of this shape."""
    value.type, value.shape = ir.TensorType(F32), ir.Shape(("strips", *named(shape, str(owner))))
