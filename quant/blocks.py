"""Codes and scales of a block-quantized matrix as initializers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pochade.quant.rtn import block_count, block_scales, pack_blocks
from pochade.quant.scheme import Storage
from pochade.quant.select import Weight
from pochade.quant.streamed import Array, read, slabs
from pochade.quant.surgery import add_initializer


def add_blocks(weight: Weight, storage: Storage, padded: bool) -> tuple[ir.Value, ir.Value]:
    """Initializers for the codes, uint8, and the scales, (rows, blocks) of the type the readers compute in.

    Args:
        weight: linear or embedding.
        storage: of kind blocks.
        padded: codes as (rows, blocks, bytes per block), the last block full; else as (rows, bytes per row).
    """
    bits, block_size = storage.bits, storage.block_size
    assert block_size is not None, "not a block storage"
    blocks = block_count(weight.width, block_size)
    row_bytes = weight.width * bits // 8
    dtype = weight.dtype

    def scales(rows: NDArray[np.floating]) -> NDArray[np.floating]:
        return block_scales(rows, bits, block_size, dtype.numpy())

    def code_chunks() -> Iterator[Array]:
        for rows in slabs(_rows(weight)):
            # The scales are computed a second time below: cheaper than to hold them until they are written.
            packed = pack_blocks(rows, scales(rows), bits, block_size)
            yield packed if padded else packed.reshape(len(packed), -1)[:, :row_bytes]

    def scale_chunks() -> Iterator[Array]:
        for rows in slabs(_rows(weight)):
            yield scales(rows)

    code_shape = (weight.rows, blocks, block_size * bits // 8) if padded else (weight.rows, row_bytes)
    return (
        add_initializer(weight, f"int{bits}", ir.DataType.UINT8, code_shape, code_chunks),
        add_initializer(weight, "scales", dtype, (weight.rows, blocks), scale_chunks),
    )


def _rows(weight: Weight) -> NDArray[np.floating]:
    matrix = read(weight.tensor)
    return matrix if weight.axis == 0 else matrix.T
