"""Schedule of masked-token sampling (Chang et al. 2022, arXiv 2202.04200, section 3.3), as released.

Everything is float32 in the order of the released code: for some step counts the linear counts differ by one from
exact arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

MaskingSchedule = Literal["cosine", "linear"]


@dataclass(frozen=True)
class MaskedSchedule:
    """What each denoise step of a run needs to know beside the tokens."""

    timesteps: NDArray[np.int64]
    """T-1 ... 0; the transformer takes the number itself, not a ratio."""
    temperatures: NDArray[np.float32]
    """Weight of the Gumbel noise on the confidence, per step."""
    num_masked: NDArray[np.int64]
    """Cells to mask again after each step; 0 after the last."""

    @classmethod
    def create(
        cls,
        num_steps: int,
        cells: int,
        temperature: tuple[float, float] | float,
        schedule: MaskingSchedule,
        start_ratio: float = 1.0,
    ) -> MaskedSchedule:
        """Schedule of a whole run.

        Args:
            num_steps: T, at least 1.
            cells: number of cells in the token grid.
            temperature: first and last value, or the first alone (the last is then 0.01).
            schedule: how the masked share falls.
            start_ratio: share of cells masked at the start, below 1 when a part of the picture is kept.
        """
        first, last = temperature if isinstance(temperature, tuple) else (temperature, 0.01)
        counts = [mask_count(i, num_steps, cells, schedule, start_ratio) for i in range(num_steps - 1)]
        return cls(
            np.arange(num_steps - 1, -1, -1, dtype=np.int64),
            np.linspace(first, last, num_steps).astype(np.float32),
            np.array([max(1, count) for count in counts] + [0], np.int64),
        )


def mask_ratio(step: int, num_steps: int, schedule: MaskingSchedule) -> np.float32:
    """Share of cells still masked after this step."""
    ratio = np.float32((step + 1) / num_steps)
    if schedule == "linear":
        return np.float32(1) - ratio
    return np.float32(np.cos(ratio * np.float32(np.pi) / np.float32(2)))


def mask_count(step: int, num_steps: int, cells: int, schedule: MaskingSchedule, start_ratio: float) -> int:
    """Cells that stay masked after this step, before the sampler's own bounds."""
    return int(np.floor(np.float32(cells) * (np.float32(start_ratio) * mask_ratio(step, num_steps, schedule))))
