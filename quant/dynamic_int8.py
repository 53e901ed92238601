"""Linear layers on int8 weights and activations: MatMul and Gemm become `com.microsoft.DynamicQuantizeMatMul`.

Inputs of the operator are x float32, B (inputs, outputs) int8, scales (outputs) float32, a zero point and the bias.
At run time it rounds x to uint8 with one scale for the whole tensor. No zero point is given: absent means 0, and
the kernel for signed weights runs twice as fast as the one for unsigned weights with zero point 128.

Codes use the whole range -127..127, so on x86 processors without VNNI instructions the kernel for signed weights
saturates: it adds pairs of products in 16 bits, and 2 * 255 * 127 does not fit. There the session needs
`session.x64quantprecision=1`, which turns the weights into unsigned ones when it opens, exact and half as fast. With
VNNI the option costs the same and brings nothing, so whoever opens the session has to know the processor.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pochade.quant.moments import Moment
from pochade.quant.rtn import channel_scales, round_channels
from pochade.quant.scheme import Storage
from pochade.quant.select import Weight
from pochade.quant.smooth import smoothing_factors
from pochade.quant.streamed import Array, read, slabs
from pochade.quant.surgery import add_initializer, drop, replace_linear, scale_input

BIAS_INDEX = 4


def rewrite(weight: Weight, _: Storage) -> None:
    """Replace the readers of a float32 linear weight, a following bias Add included."""
    replace_linear(weight, "DynamicQuantizeMatMul", add_channels(weight, None), BIAS_INDEX, {})
    drop(weight)


def rewrite_smoothed(weight: Weight, moment: Moment, strength: float) -> None:
    """The same with inputs divided by their smoothing factors, and the weight multiplied by them."""
    rows = _columns(weight)
    factors = smoothing_factors(moment, np.maximum(rows.max(1), -rows.min(1)), strength)
    products = replace_linear(weight, "DynamicQuantizeMatMul", add_channels(weight, factors), BIAS_INDEX, {})
    scale_input(weight, products, 1 / factors)
    drop(weight)


def add_channels(weight: Weight, factors: NDArray[np.float32] | None) -> list[ir.Value]:
    """Initializers for int8 codes (inputs, outputs) and scales (outputs) of the weight, times factors of the inputs."""

    def scaled(rows: NDArray[np.floating], start: int) -> NDArray[np.floating]:
        return rows if factors is None else rows * factors[start : start + len(rows), None]

    def scales() -> NDArray[np.float32]:
        whole = _columns(weight)
        return channel_scales(scaled(whole, 0), axis=1)

    def code_chunks() -> Iterator[Array]:
        by_output, start = scales(), 0
        for part in slabs(_columns(weight)):
            yield round_channels(scaled(part, start), by_output)
            start += len(part)

    def scale_chunks() -> Iterator[Array]:
        yield scales()

    codes = add_initializer(weight, "int8", ir.DataType.INT8, (weight.width, weight.rows), code_chunks)
    return [codes, add_initializer(weight, "scales", ir.DataType.FLOAT, (weight.rows,), scale_chunks)]


def _columns(weight: Weight) -> NDArray[np.floating]:
    """The weight as (inputs, outputs)."""
    matrix = read(weight.tensor)
    return matrix if weight.axis == 1 else matrix.T
