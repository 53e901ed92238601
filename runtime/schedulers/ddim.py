"""Deterministic implicit sampling (Song et al. 2020, arXiv 2010.02502, equation 12, eta 0)."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from typing import Self

from pochade.runtime.schedulers.diffusion import DiffusionConfig, DiffusionScheduler, StepWeights


class Ddim(DiffusionScheduler):
    """Every step takes out the noise that the network sees and puts less of it back."""

    def _weights(self, index: int, is_first: bool) -> StepWeights:  # noqa: ARG002 - samplers look alike
        after = self._alpha_after(index, 1.0 if self.config.set_alpha_to_one else float(self._alphas[0]))
        return self._of_picture(index, sqrt(after), sqrt(1 - after))


class OriginalDdim(Ddim):
    """As in HunyuanDiT's own code, which ends without noise whatever the published JSON says."""

    @classmethod
    def create(cls, num_inference_steps: int, config: DiffusionConfig) -> Self:
        """See `DiffusionScheduler.create`."""
        return super().create(num_inference_steps, replace(config, set_alpha_to_one=True))
