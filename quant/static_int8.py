"""Linear layers on int8 weights and activations with a range measured beforehand: QuantizeLinear, MatMulIntegerToFloat.

Inputs of `com.microsoft.MatMulIntegerToFloat` are x uint8, B (inputs, outputs) int8, the scales of both, their zero
points and the bias. Inputs beyond the measured range are cut off.
"""

from __future__ import annotations

import onnx_ir as ir

from pochade.quant.dynamic_int8 import add_channels
from pochade.quant.moments import Moment
from pochade.quant.rtn import byte_steps
from pochade.quant.select import Weight
from pochade.quant.surgery import add_constant, drop, quantize_input, replace_linear

BIAS_INDEX = 6


def rewrite(weight: Weight, moment: Moment) -> None:
    """Replace the readers of a float32 linear weight, a following bias Add included."""
    scale, zero = byte_steps(float(moment.lowest.min()), float(moment.highest.max()))
    codes, scales = add_channels(weight, None)
    constants = [
        add_constant(weight, "input_scale", scale, widen=False),
        add_constant(weight, "input_zero", zero, widen=False),
    ]
    operands: list[ir.Value] = [codes, constants[0], scales, constants[1]]
    products = replace_linear(weight, "MatMulIntegerToFloat", operands, BIAS_INDEX, {})
    quantize_input(weight, products, *constants)
    drop(weight)
