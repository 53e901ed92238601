"""Ancestral sampling (Ho et al. 2020, arXiv 2006.11239, equations 6 and 7), HunyuanDiT's published sampler."""

from __future__ import annotations

from math import sqrt
from typing import ClassVar

import numpy as np

from pochade.runtime.schedulers.diffusion import DiffusionScheduler, StepWeights

MIN_VARIANCE = 1e-20
"""As published: noise is added after the last step also, invisibly."""


class Ddpm(DiffusionScheduler):
    """Every step leads to the mean of the posterior and adds noise of its variance."""

    needs_noise: ClassVar[bool] = True

    def _weights(self, index: int, is_first: bool) -> StepWeights:  # noqa: ARG002 - samplers look alike
        alpha, after = float(self._alphas[self._steps[index]]), self._alpha_after(index, 1.0)
        # To float32 as in the reference: what is left of 1 minus it shows the difference.
        ratio = float(np.float32(alpha / after))
        weights = self._of_picture(index, sqrt(after) * (1 - ratio) / (1 - alpha))
        spread = sqrt(max((1 - after) / (1 - alpha) * (1 - ratio), MIN_VARIANCE)) if self._steps[index] else 0.0
        return weights._replace(sample=weights.sample + sqrt(ratio) * (1 - after) / (1 - alpha), noise=spread)
