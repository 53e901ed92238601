"""GPTQ: every column's rounding error is made up for by the columns after it."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pochade.quant.moments import Moment
from pochade.quant.rtn import block_count, codes_of
from pochade.quant.scale_search import round_by_scale_search, search_scales


def round_gptq(
    rows: NDArray[np.floating], bits: int, block_size: int, dtype: DTypeLike, moment: Moment | None
) -> tuple[NDArray[np.floating], NDArray[np.float32]]:
    """Scales (rows, blocks) and signed codes (rows, blocks, block_size).

    Frantar et al. 2022, "GPTQ", arXiv 2210.17323, algorithm 1, columns in their own order; the scale of a block is
    searched when its turn comes, on the weights as they are by then. Without a moment, inputs are taken for independent
    and nothing can be made up for.

    Raises:
        FloatingPointError: a weight is not finite, or too large for a scale of `dtype`.
    """
    if moment is None:
        return round_by_scale_search(rows, bits, block_size, dtype, None)
    factor, width = moment.inverse_factor, rows.shape[1]
    left = rows.astype(np.float64)
    shape = (len(rows), block_count(width, block_size), block_size)
    scales, codes = np.ones(shape[:2], dtype), np.zeros(shape, np.float32)
    for block in range(shape[1]):
        start, end = block * block_size, min((block + 1) * block_size, width)
        here = left[:, start:end]
        weights = moment.importance[None, start:end].astype(np.float32)
        scale = search_scales(here[:, None].astype(np.float32), bits, dtype, weights)
        scales[:, block] = scale[:, 0]
        errors = np.zeros_like(here)
        for i in range(end - start):
            column = codes_of(here[:, i, None, None].astype(np.float32), scale, bits)[:, 0, 0]
            codes[:, block, i] = column
            at = start + i
            errors[:, i] = (here[:, i] - column * scale[:, 0]) / factor[at, at]
            here[:, i:] -= errors[:, i, None] * factor[at, at:end]
        left[:, end:] -= errors @ factor[start:end, end:]
    return scales, codes
