"""Ancestral sampling (Ho et al. 2020, arXiv 2006.11239, equations 6 and 7), HunyuanDiT's published sampler."""

from __future__ import annotations

from math import sqrt
from typing import ClassVar

import numpy as np

from pochade.runtime.schedulers.diffusion import DiffusionScheduler, Sample

MIN_VARIANCE = 1e-20
"""As published: noise is added after the last step also, invisibly."""


class Ddpm(DiffusionScheduler):
    """Every step leads to the mean of the posterior and adds noise of its variance."""

    needs_noise: ClassVar[bool] = True

    def step(self, index: int, model_output: Sample, sample: Sample, noise: Sample | None = None) -> Sample:
        """See `DiffusionScheduler.step`.

        Raises:
            ValueError: there is no noise.
        """
        if noise is None:
            raise ValueError("DDPM steps take noise")
        picture, _ = self._split(index, model_output, sample)
        alpha, after = float(self._alphas[self._steps[index]]), self._alpha_after(index, 1.0)
        # To float32 as in the reference: what is left of 1 minus it shows the difference.
        ratio = float(np.float32(alpha / after))
        to_picture = sqrt(after) * (1 - ratio) / (1 - alpha)
        to_sample = sqrt(ratio) * (1 - after) / (1 - alpha)
        mean: Sample = to_picture * picture + to_sample * sample
        if self._steps[index] == 0:
            return mean
        return mean + sqrt(max((1 - after) / (1 - alpha) * (1 - ratio), MIN_VARIANCE)) * noise
