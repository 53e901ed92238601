"""Classifier-free guidance of continuous diffusion (Ho and Salimans 2022, arXiv 2207.12598)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def guided(
    conditional: NDArray[np.float32],
    unconditional: NDArray[np.float32],
    guidance_scale: float,
    guidance_rescale: float = 0.0,
) -> NDArray[np.float32]:
    """Prediction led away from the negative prompt's, (batch, channels, height, width).

    Args:
        conditional: prediction for the prompt, of the same shape.
        unconditional: prediction for the negative prompt, likewise.
        guidance_scale: 1 gives the former, 0 the latter.
        guidance_rescale: share of the result that gets the prompt's standard deviation, each sample over all of its
            values (Lin et al. 2023, arXiv 2305.08891, section 3.4).
    """
    mixed = unconditional + guidance_scale * (conditional - unconditional)
    if not guidance_rescale:
        return mixed
    wanted, found = _deviation(conditional), _deviation(mixed)
    rescaled: NDArray[np.float32] = mixed * (guidance_rescale * (wanted / found) + (1 - guidance_rescale))
    return rescaled


def _deviation(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Standard deviation of each sample, unbiased, (batch, 1, ...)."""
    axes = tuple(range(1, values.ndim))
    deviation = np.std(values, axis=axes, dtype=np.float64, ddof=1, keepdims=True)
    result: NDArray[np.float32] = deviation.astype(np.float32)
    return result
