"""Linear layers on block-quantized weights: MatMul and Gemm become `com.microsoft.MatMulNBits`.

Inputs of the operator are x, B (outputs, blocks, block_size * bits / 8) uint8, scales (outputs, blocks) of x's type,
two unused ones (zero points, group index) and the bias. Without zero points it takes the middle of the code range.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pochade.quant.blocks import add_blocks, round_blocks, rounding_error
from pochade.quant.low_rank import low_rank_correction
from pochade.quant.moments import Moment
from pochade.quant.scheme import Storage
from pochade.quant.select import Weight
from pochade.quant.surgery import add_branch, add_constant, drop, replace_linear

BIAS_INDEX = 5


def rewrite(weight: Weight, storage: Storage) -> None:
    """Replace the readers of a linear weight, a following bias Add included, rounded to nearest."""
    _replace(weight, storage, add_blocks(weight, storage, padded=True))
    drop(weight)


def rewrite_calibrated(weight: Weight, storage: Storage, method: str, moment: Moment | None, low_rank: int) -> None:
    """The same with codes and scales of another method, computed now, and a low-rank branch if asked for.

    Args:
        weight: linear.
        storage: of kind blocks.
        method: one of METHODS.
        moment: of the layer's input; None where it is not known.
        low_rank: columns of the branch that carries the rounding error, 0 for none.
    """
    blocks = round_blocks(weight, storage, method, moment)
    products = _replace(weight, storage, add_blocks(weight, storage, padded=True, held=blocks))
    if low_rank:
        down, up = low_rank_correction(rounding_error(weight, storage, blocks), moment, low_rank)
        half = (add_constant(weight, name, matrix.astype(np.float16)) for name, matrix in (("down", down), ("up", up)))
        add_branch(weight, products, *half)
    drop(weight)


def _replace(weight: Weight, storage: Storage, operands: tuple[ir.Value, ir.Value]) -> list[ir.Node]:
    assert storage.block_size is not None, "not a block storage"
    attributes = {"K": weight.width, "N": weight.rows, "bits": storage.bits, "block_size": storage.block_size}
    if storage.accuracy_level is not None:
        attributes["accuracy_level"] = storage.accuracy_level
    return replace_linear(weight, "MatMulNBits", operands, BIAS_INDEX, attributes)
