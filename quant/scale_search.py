"""Scales chosen by the error they leave in the layer's output."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pochade.quant.moments import Moment
from pochade.quant.rtn import codes_of, to_blocks, usable

SHARES = np.linspace(0.55, 1.05, 26)
"""Shares of the full scale that are tried, with either sign."""

REFINEMENTS = 3
"""Times the scale is fitted to the codes by least squares, and the codes to the scale."""


def round_by_scale_search(
    rows: NDArray[np.floating], bits: int, block_size: int, dtype: DTypeLike, moment: Moment | None
) -> tuple[NDArray[np.floating], NDArray[np.float32]]:
    """Scales (rows, blocks) and signed codes (rows, blocks, block_size), rounded to nearest.

    The error of a block is the squared error of its weights, each counted by the mean square of its input; without a
    moment all count the same.

    Raises:
        FloatingPointError: a weight is not finite, or too large for a scale of `dtype`.
    """
    blocks = to_blocks(rows, block_size)
    weights = np.ones(rows.shape[1]) if moment is None else moment.importance
    padded = np.pad(weights, (0, blocks.shape[1] * block_size - len(weights)))
    scales = search_scales(blocks, bits, dtype, padded.reshape(-1, block_size).astype(np.float32))
    return scales, codes_of(blocks, scales, bits)


def search_scales(
    blocks: NDArray[np.float32], bits: int, dtype: DTypeLike, weights: NDArray[np.float32]
) -> NDArray[np.floating]:
    """The best scale of every block, (rows, blocks).

    Args:
        blocks: (rows, blocks, block_size).
        bits: of the codes.
        dtype: of the scales.
        weights: what a squared error counts, (blocks, block_size).
    """
    highest, lowest = blocks.max(axis=2), blocks.min(axis=2)
    full = np.where(highest > -lowest, highest, lowest).astype(np.float32) / (1 << (bits - 1))
    best = usable(-full, dtype)
    least = _error(blocks, best, bits, weights)

    def keep_better(tried: NDArray[np.floating]) -> None:
        nonlocal best, least
        error = _error(blocks, tried, bits, weights)
        best = np.where(error < least, tried, best)
        least = np.minimum(error, least)

    for share in SHARES:
        for sign in (-1.0, 1.0):
            keep_better(usable(full * np.float32(sign * share), dtype))
    for _ in range(REFINEMENTS):
        codes = codes_of(blocks, best, bits)
        products = np.einsum("rbi,rbi,bi->rb", codes, blocks, weights)
        squares = np.einsum("rbi,rbi,bi->rb", codes, codes, weights)
        fitted = np.divide(products, squares, out=best.astype(np.float32), where=squares > 0)
        keep_better(usable(fitted, dtype))
    return best


def _error(
    blocks: NDArray[np.float32], scales: NDArray[np.floating], bits: int, weights: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Weighted squared error of every block, (rows, blocks)."""
    error = codes_of(blocks, scales, bits)
    error *= scales.astype(np.float32)[..., None]
    error -= blocks
    error *= error
    total: NDArray[np.float32] = np.einsum("rbi,bi->rb", error, weights)
    return total
