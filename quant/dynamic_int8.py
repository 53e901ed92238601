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

from pochade.quant.rtn import channel_scales, round_channels
from pochade.quant.scheme import Storage
from pochade.quant.select import Weight
from pochade.quant.streamed import Array, read, slabs
from pochade.quant.surgery import add_initializer, drop, replace_linear

BIAS_INDEX = 4


def rewrite(weight: Weight, _: Storage) -> None:
    """Replace the readers of a float32 linear weight, a following bias Add included."""

    def columns() -> NDArray[np.floating]:
        matrix = read(weight.tensor)
        return matrix if weight.axis == 1 else matrix.T

    def code_chunks() -> Iterator[Array]:
        scales = channel_scales(columns(), axis=1)
        for part in slabs(columns()):
            yield round_channels(part, scales)

    def scale_chunks() -> Iterator[Array]:
        yield channel_scales(columns(), axis=1)

    codes = add_initializer(weight, "int8", ir.DataType.INT8, (weight.width, weight.rows), code_chunks)
    scales = add_initializer(weight, "scales", ir.DataType.FLOAT, (weight.rows,), scale_chunks)
    replace_linear(weight, "DynamicQuantizeMatMul", [codes, scales], BIAS_INDEX, {})
    drop(weight)
