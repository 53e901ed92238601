"""Smoothing: large inputs made smaller, and their weights larger by as much."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pochade.quant.moments import Moment


def smoothing_factors(moment: Moment, weight_peaks: NDArray[np.floating], strength: float) -> NDArray[np.float32]:
    """What each input is divided by, (width).

    max|x|^strength / max|w|^(1 - strength), SmoothQuant (Xiao et al. 2022, arXiv 2211.10438, equation 4).

    Args:
        moment: what the layer is given.
        weight_peaks: largest magnitude of each input's weights, (width).
        strength: 0 leaves the outliers to the activations, 1 to the weights.
    """
    peaks = np.maximum(np.maximum(moment.highest, -moment.lowest), 1e-6).astype(np.float64)
    factors = peaks**strength / np.maximum(weight_peaks, 1e-6).astype(np.float64) ** (1 - strength)
    # Only ratios matter; a mean of 1 keeps numbers near where they were.
    factors /= np.exp(np.log(factors).mean())
    out: NDArray[np.float32] = factors.astype(np.float32)
    return out
