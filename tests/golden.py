"""Recorded values of the reference implementation, and bundles made from its tiny checkpoints."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "golden"
MODELS = ("meissonic-tiny", "monetico-tiny")

TOLERANCE = 5e-5
"""Components; erf in place of tanh GELU already costs 4e-4."""
GUIDED_TOLERANCE = 3e-4
"""Logits after guidance 9."""


@functools.cache
def arrays(model: str) -> dict[str, NDArray[Any]]:
    """Every recorded array of a tiny model."""
    return load_file(GOLDEN / model / "golden.safetensors")


@functools.cache
def facts(model: str) -> dict[str, Any]:
    """Arguments and remarks of the recorded runs."""
    values: dict[str, Any] = json.loads((GOLDEN / model / "golden.json").read_text())
    return values


def uniform_for(probabilities: NDArray[np.float64], codes: NDArray[Any]) -> NDArray[np.float32]:
    """Uniform numbers that draw `codes`: the middle of each code's interval of the cumulative distribution.

    The reference draws by an exponential race, which one number per cell cannot repeat; it can repeat its outcome.

    Args:
        probabilities: (..., codes).
        codes: (...).
    """
    index = codes[..., None]
    upto = np.take_along_axis(probabilities.cumsum(-1), index, -1)[..., 0]
    return (upto - np.take_along_axis(probabilities, index, -1)[..., 0] / 2).astype(np.float32)


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Over the last axis, float64."""
    wide = logits.astype(np.float64)
    powers = np.exp(wide - wide.max(-1, keepdims=True))
    shares: NDArray[np.float64] = powers / powers.sum(-1, keepdims=True)
    return shares
