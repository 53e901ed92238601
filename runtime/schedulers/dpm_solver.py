"""DPM-Solver++ of second order, multistep, midpoint form (Lu et al. 2022, arXiv 2211.01095, algorithm 2)."""

from __future__ import annotations

from math import expm1, inf, log, sqrt
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pochade.errors import UsageError
from pochade.runtime.schedulers.diffusion import DiffusionConfig, DiffusionScheduler, StepWeights

FEW_STEPS = 15
"""Runs of fewer steps end with one of first order, for stability."""


class DpmSolver(DiffusionScheduler):
    """Every step extrapolates the picture from the last two predictions of it."""

    reserved_steps: ClassVar[int] = 1
    ends_clean: ClassVar[bool] = True
    """Whether the last step leads to no noise rather than to that of training step 0."""

    def __init__(self, config: DiffusionConfig, timesteps: NDArray[np.int64]) -> None:
        super().__init__(config, timesteps)
        sigmas = np.sqrt((1 - self._alphas) / self._alphas)
        last = 0.0 if self.ends_clean else sigmas[0]
        self._sigmas = [*sigmas[timesteps].tolist(), float(last)]

    def _weights(self, index: int, is_first: bool) -> StepWeights:
        sigma, following = self._sigmas[index : index + 2]
        signal, spread = _levels(following)
        length = _log_ratio(following) - _log_ratio(sigma)
        advance = -signal * expm1(-length)
        is_last = index == len(self._steps) - 1
        low_order = is_first or (is_last and (self.ends_clean or len(self._steps) < FEW_STEPS))
        more = 0.0
        if not low_order:
            more = 0.5 * advance * length / (_log_ratio(sigma) - _log_ratio(self._sigmas[index - 1]))
        weights = self._of_picture(index, advance + more)
        return weights._replace(sample=weights.sample + spread / _levels(sigma)[1], before=-more)


class OriginalDpmSolver(DpmSolver):
    """As in HunyuanDiT's own code: steps evenly over all of the training, the last one to the noise of its start."""

    ends_clean: ClassVar[bool] = False

    @classmethod
    def _spaced(cls, count: int, config: DiffusionConfig) -> NDArray[np.int64]:
        most = config.num_train_timesteps - 1
        if not 1 <= count <= most:
            raise UsageError(f"{count} inference steps cannot be had; take 1 to {most}")
        return np.linspace(0, most, count + 1).round()[:0:-1].astype(np.int64)


def _levels(sigma: float) -> tuple[float, float]:
    """Shares of picture and noise where their ratio is 1 to sigma."""
    signal = 1 / sqrt(1 + sigma * sigma)
    return signal, sigma * signal


def _log_ratio(sigma: float) -> float:
    """Logarithm of picture over noise, in which steps are measured."""
    return -log(sigma) if sigma else inf
