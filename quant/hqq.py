"""Half-quadratic quantization: scales that leave a sparse error, from the weights alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pochade.quant.rtn import block_scales, codes_of, to_blocks, usable

NORM = 0.7
"""p of the lp norm of the error; below 1, so that a few large errors are taken for many small ones."""
BETA, GROWTH, ITERATIONS = 10.0, 1.01, 20
"""Start and growth of the penalty, and the number of half-quadratic steps (Badri and Shaji 2023, "Half-Quadratic
Quantization of Large Machine Learning Models")."""


def round_half_quadratic(
    rows: NDArray[np.floating], bits: int, block_size: int, dtype: DTypeLike, _: object = None
) -> tuple[NDArray[np.floating], NDArray[np.float32]]:
    """Scales (rows, blocks) and signed codes (rows, blocks, block_size).

    HQQ fits the zero point; codes here are symmetric, so the same splitting fits the scale: the error's sparse part is
    found by generalized soft thresholding, then the scale by least squares on the rest.

    Raises:
        FloatingPointError: a weight is not finite, or too large for a scale of `dtype`.
    """
    blocks = to_blocks(rows, block_size)
    scales = block_scales(rows, bits, block_size, dtype)
    # Thresholds are for weights of about unit size.
    size = np.abs(blocks).mean(axis=2, keepdims=True)
    size[size == 0] = 1
    beta = BETA
    for _step in range(ITERATIONS):
        codes = codes_of(blocks, scales, bits)
        error = (blocks - codes * scales.astype(np.float32)[..., None]) / size
        magnitude = np.abs(error)
        threshold = np.maximum(magnitude, 1e-8) ** (NORM - 1) / beta
        sparse = np.sign(error) * np.maximum(magnitude - threshold, 0) * size
        products = np.einsum("rbi,rbi->rb", codes, blocks - sparse)
        squares = np.einsum("rbi,rbi->rb", codes, codes)
        fitted = np.divide(products, squares, out=scales.astype(np.float32), where=squares > 0)
        scales = usable(fitted, dtype)
        beta *= GROWTH
    return scales, codes_of(blocks, scales, bits)
