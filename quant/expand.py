"""Weights that are small in the file and float again when the session opens.

The graph gets the nodes that expand them, all with constant inputs, so that ONNX Runtime computes them once while it
opens the session and the operator runs on a plain float weight, as fast as before. Its optimizer leaves
DequantizeLinear alone on purpose, hence Cast and Mul. The arithmetic is in float32 also for float16 weights: there
is no float16 Mul on CPU, and what the CPU cannot compute is not folded but computed on every run.

The largest convolutions are expanded on every run after all, by DequantizeLinear: they belong to the smallest
pictures of a codec and are long over when the largest ones need the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from pochade.quant.rtn import channel_scales, round_channels
from pochade.quant.scheme import Kind, Storage, Use
from pochade.quant.select import Weight
from pochade.quant.streamed import Array, read, slabs
from pochade.quant.surgery import add_initializer, drop

LATE_ELEMENTS = 4 << 20
"""Convolutions of so many numbers are expanded late. In Meissonic's codec those of 768 channels: 224 MB of float32
while pictures of 64x64 to 128x128 are convolved, one run of which expands all in a tenth of a second."""


Chunks = Callable[[], Iterator[Array]]


def rewrite(weight: Weight, storage: Storage) -> None:
    """Let every reader of a weight read its expanded form."""
    nodes = _from_half(weight) if storage.kind is Kind.HALF else _from_channels(weight)
    weight.graph.insert_before(weight.graph[0], nodes)
    weight.source.replace_all_uses_with(nodes[-1].outputs[0])
    drop(weight)


def _from_half(weight: Weight) -> list[ir.Node]:
    """Nodes that expand a float16 copy."""

    def chunks() -> Iterator[Array]:
        for part in slabs(read(weight.tensor)):
            with np.errstate(over="ignore"):
                half = part.astype(np.float16)
            if not np.isfinite(half).all():
                raise FloatingPointError("it holds numbers that are not finite, or too large for float16")
            yield half

    half = add_initializer(weight, "float16", ir.DataType.FLOAT16, weight.shape, chunks)
    return [_cast(weight, half, weight.dtype, "expanded")]


def _from_channels(weight: Weight) -> list[ir.Node]:
    """Nodes that expand int8 codes and a float32 scale per output channel."""
    shape = tuple(size if axis == weight.axis else 1 for axis, size in enumerate(weight.shape))

    def code_chunks() -> Iterator[Array]:
        scales = channel_scales(read(weight.tensor), weight.axis).reshape(shape)
        start = 0
        for part in slabs(read(weight.tensor)):
            # Slabs run along axis 0, where the scales either run too or are broadcast.
            yield round_channels(part, scales[start : start + len(part)] if weight.axis == 0 else scales)
            start += len(part)

    def scale_chunks() -> Iterator[Array]:
        yield channel_scales(read(weight.tensor), weight.axis)

    if weight.use is Use.CONV and weight.tensor.size >= LATE_ELEMENTS and weight.dtype is ir.DataType.FLOAT:
        return [_dequantized(weight, code_chunks, scale_chunks)]
    codes = add_initializer(weight, "int8", ir.DataType.INT8, weight.shape, code_chunks)
    scales = add_initializer(weight, "scales", ir.DataType.FLOAT, shape, scale_chunks)
    cast = _cast(weight, codes, ir.DataType.FLOAT, "codes")
    scaled = _value(weight, ir.DataType.FLOAT, "scaled")
    nodes = [cast, ir.node("Mul", [cast.outputs[0], scales], outputs=[scaled], name=scaled.name)]
    if weight.dtype is not ir.DataType.FLOAT:
        nodes.append(_cast(weight, scaled, weight.dtype, "expanded"))
    return nodes


def _dequantized(weight: Weight, int8_chunks: Chunks, scale_chunks: Chunks) -> ir.Node:
    """The node that expands codes on every run.

    They are uint8 around 128: where ONNX Runtime avoids int8 (`session.x64quantprecision`) it makes them so itself,
    and gives a scale per channel a zero point that its own operator refuses.
    """

    def code_chunks() -> Iterator[Array]:
        for chunk in int8_chunks():
            yield chunk.view(np.uint8) ^ np.uint8(128)

    def zero_chunks() -> Iterator[Array]:
        yield np.full(weight.rows, 128, np.uint8)

    operands = [
        add_initializer(weight, "uint8", ir.DataType.UINT8, weight.shape, code_chunks),
        add_initializer(weight, "scales", ir.DataType.FLOAT, (weight.rows,), scale_chunks),
        add_initializer(weight, "zeros", ir.DataType.UINT8, (weight.rows,), zero_chunks),
    ]
    output = _value(weight, weight.dtype, "expanded")
    return ir.node("DequantizeLinear", operands, {"axis": weight.axis}, outputs=[output], name=output.name)


def _cast(weight: Weight, value: ir.Value, dtype: ir.DataType, suffix: str) -> ir.Node:
    output = _value(weight, dtype, suffix)
    return ir.node("Cast", [value], {"to": int(dtype)}, outputs=[output], name=output.name)


def _value(weight: Weight, dtype: ir.DataType, suffix: str) -> ir.Value:
    return ir.Value(name=f"{weight.name}.{suffix}", shape=ir.Shape(weight.shape), type=ir.TensorType(dtype))
