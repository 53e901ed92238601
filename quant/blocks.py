"""Codes and scales of a block-quantized matrix as initializers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pochade.errors import InputRefusedError
from pochade.quant.moments import Moment
from pochade.quant.rounding import METHODS
from pochade.quant.rtn import block_count, pack_codes, unpack_blocks
from pochade.quant.scheme import Storage
from pochade.quant.select import Weight
from pochade.quant.streamed import Array, read, slabs
from pochade.quant.surgery import add_initializer


@dataclass(frozen=True)
class Blocks:
    """A matrix in blocks, held in memory."""

    packed: NDArray[np.uint8]
    """(rows, blocks, bytes per block)."""
    scales: NDArray[np.floating]
    """(rows, blocks)."""


def round_blocks(weight: Weight, storage: Storage, method: str, moment: Moment | None) -> Blocks:
    """Round a whole weight by one of METHODS.

    Raises:
        InputRefusedError: it holds NaN or infinity.
    """
    try:
        parts = list(_parts(weight, storage, method, moment))
    except FloatingPointError as error:
        raise InputRefusedError(f"weight {weight.name}", [str(error)]) from error
    packed, scales = zip(*parts, strict=True)
    return Blocks(np.concatenate(packed), np.concatenate(scales))


def rounding_error(weight: Weight, storage: Storage, blocks: Blocks) -> NDArray[np.float32]:
    """What rounding took from the weight, (rows, width)."""
    kept = unpack_blocks(blocks.packed, blocks.scales, storage.bits, weight.width)
    error: NDArray[np.float32] = rows_of(weight).astype(np.float32) - kept
    return error


def add_blocks(weight: Weight, storage: Storage, padded: bool, held: Blocks | None = None) -> tuple[ir.Value, ir.Value]:
    """Initializers for the codes, uint8, and the scales, (rows, blocks) of the type the readers compute in.

    Args:
        weight: linear or embedding.
        storage: of kind blocks.
        padded: codes as (rows, blocks, bytes per block), the last block full; else as (rows, bytes per row).
        held: what to store; without, the weight is rounded to nearest while it is written, and nothing of it stays in
            memory.
    """
    bits, block_size = storage.bits, storage.block_size
    assert block_size is not None, "not a block storage"
    row_bytes = weight.width * bits // 8

    def parts() -> Iterator[tuple[Array, Array]]:
        return iter([(held.packed, held.scales)]) if held else _parts(weight, storage, "rtn", None)

    def codes() -> Iterator[Array]:
        for packed, _ in parts():
            yield packed if padded else packed.reshape(len(packed), -1)[:, :row_bytes]

    def scales() -> Iterator[Array]:
        # Computed a second time: cheaper than to hold them until they are written.
        for _, scale in parts():
            yield scale

    blocks = block_count(weight.width, block_size)
    code_shape = (weight.rows, blocks, block_size * bits // 8) if padded else (weight.rows, row_bytes)
    return (
        add_initializer(weight, f"int{bits}", ir.DataType.UINT8, code_shape, codes),
        add_initializer(weight, "scales", weight.dtype, (weight.rows, blocks), scales),
    )


def rows_of(weight: Weight) -> NDArray[np.floating]:
    """The weight as (rows, width)."""
    matrix = read(weight.tensor)
    return matrix if weight.axis == 0 else matrix.T


def _parts(
    weight: Weight, storage: Storage, method: str, moment: Moment | None
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.floating]]]:
    """Packed codes and scales, some rows at a time."""
    assert storage.block_size is not None, "not a block storage"
    for rows in slabs(rows_of(weight)):
        scales, codes = METHODS[method](rows, storage.bits, storage.block_size, weight.dtype.numpy(), moment)
        yield pack_codes(codes, storage.bits), scales
