"""A thin pair of matrices beside a quantized layer that carries the largest part of its rounding error."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pochade.quant.moments import Moment


def low_rank_correction(
    error: NDArray[np.float32], moment: Moment | None, rank: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Matrices down (inputs, rank) and up (rank, outputs) with x @ down @ up close to x @ error.T.

    The best ones for inputs with the given second moment M = L L^T, those that minimise |(error - (down up)^T) L|: the
    singular vectors of error L (Eckart and Young 1936). SVDQuant (Li et al. 2024, arXiv 2411.05007) takes them of the
    weight; of the error they need no larger rank and leave the codes alone.

    Args:
        error: what rounding took from the weight, (outputs, inputs).
        moment: of the inputs; None takes them for independent.
        rank: columns of `down`.
    """
    width = error.shape[1]
    factor = np.eye(width) if moment is None else np.linalg.cholesky(moment.damped)
    seen = error.astype(np.float64) @ factor
    # Left vectors from the smaller Gram matrix: an SVD of a wide layer takes a minute.
    if len(seen) <= width:
        _, left = np.linalg.eigh(seen @ seen.T)
        left = left[:, -rank:]
    else:
        _, right = np.linalg.eigh(seen.T @ seen)
        left, _ = np.linalg.qr(seen @ right[:, -rank:])
    # error ~ left left^T error, so the weight of the branch is a projection of the error itself.
    down = left.T @ error
    return np.ascontiguousarray(down.T, np.float32), np.ascontiguousarray(left.T, np.float32)
