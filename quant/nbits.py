"""Linear layers on block-quantized weights: MatMul and Gemm become `com.microsoft.MatMulNBits`.

Inputs of the operator are x, B (outputs, blocks, block_size * bits / 8) uint8, scales (outputs, blocks) of x's type,
two unused ones (zero points, group index) and the bias. Without zero points it takes the middle of the code range.
"""

from __future__ import annotations

from pochade.quant.blocks import add_blocks
from pochade.quant.scheme import Storage
from pochade.quant.select import Weight
from pochade.quant.surgery import drop, replace_linear

BIAS_INDEX = 5


def rewrite(weight: Weight, storage: Storage) -> None:
    """Replace the readers of a linear weight, a following bias Add included."""
    assert storage.block_size is not None, "not a block storage"
    attributes = {"K": weight.width, "N": weight.rows, "bits": storage.bits, "block_size": storage.block_size}
    if storage.accuracy_level is not None:
        attributes["accuracy_level"] = storage.accuracy_level
    replace_linear(weight, "MatMulNBits", add_blocks(weight, storage, padded=True), BIAS_INDEX, attributes)
    drop(weight)
