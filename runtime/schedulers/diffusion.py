"""What samplers of continuous diffusion share: the noise of the training steps and the form of a run.

At training step t a sample is sqrt(a_t) x_0 + sqrt(1 - a_t) noise, a_t being the product of 1 - beta up to t (Ho et al.
2020, arXiv 2006.11239). Networks predict the velocity v = sqrt(a_t) noise - sqrt(1 - a_t) x_0 (Salimans and Ho 2022,
arXiv 2202.00512). All samplers here give a weighted sum of what there is, so a sampler is a table of weights, computed
in float64, and the component `sampler` adds up on the device where latents are (`pochade.export.diffusion_sampler`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from pochade.errors import UsageError

Sample = NDArray[np.float32]
"""(batch, channels, height, width)"""

FIXED: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "leading",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "clip_sample": False,
    "thresholding": False,
    "variance_type": "fixed_small",
}
"""Values of `scheduler_config.json` that every released checkpoint has; a missing one counts as this."""


@dataclass(frozen=True)
class DiffusionConfig:
    """How a network was trained; the values of `scheduler_config.json` that samplers use."""

    beta_end: float
    """0.018 for HunyuanDiT 1.2, 0.03 before."""
    beta_start: float = 0.00085
    num_train_timesteps: int = 1000
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    """Whether DDIM ends at a picture without noise rather than at the noise of training step 0."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiffusionConfig:
        """Config from the published JSON; other keys are not looked at.

        Raises:
            KeyError: a value is missing.
            ValueError: a kind of noise or prediction that no released checkpoint has.
        """
        for name, expected in FIXED.items():
            if values.get(name, expected) != expected:
                raise ValueError(f"{name} is {values[name]!r}, released checkpoints have {expected!r}")
        names = ("beta_start", "beta_end", "num_train_timesteps", "steps_offset", "set_alpha_to_one")
        return cls(**{name: values[name] for name in names})

    def alphas(self) -> NDArray[np.float64]:
        """a_t of every training step, rounded to float32 where the reference rounds."""
        first, last = sqrt(self.beta_start), sqrt(self.beta_end)
        betas = np.linspace(first, last, self.num_train_timesteps).astype(np.float32) ** 2
        products = np.cumprod(np.float32(1) - betas, dtype=np.float64)
        return products.astype(np.float32).astype(np.float64)


class StepWeights(NamedTuple):
    """How much of everything makes up the sample after a step, and the picture that the network sees before it."""

    sample: float
    """Of the sample before the step."""
    velocity: float
    before: float = 0.0
    """Of the picture that the network saw one step earlier."""
    noise: float = 0.0
    """Of standard normal noise."""
    picture_sample: float = 0.0
    """Of the sample, in the picture."""
    picture_velocity: float = 0.0


class DiffusionScheduler(ABC):
    """A run of one sampler."""

    needs_noise: ClassVar[bool] = False
    """Whether steps add noise."""
    reserved_steps: ClassVar[int] = 0
    """Steps that spacing counts beyond those of a run."""

    def __init__(self, config: DiffusionConfig, timesteps: NDArray[np.int64]) -> None:
        self.config = config
        self.timesteps: NDArray[np.float32] = timesteps.astype(np.float32)
        """What the network is told at each step, first to last."""
        self._steps = timesteps
        self._alphas = config.alphas()

    @classmethod
    def create(cls, num_inference_steps: int, config: DiffusionConfig) -> Self:
        """A whole run.

        Raises:
            UsageError: fewer than one step, or more than the network was trained on.
        """
        return cls(config, cls._spaced(num_inference_steps, config))

    @classmethod
    def _spaced(cls, count: int, config: DiffusionConfig) -> NDArray[np.int64]:
        """Training steps `trained // (count + reserved_steps)` apart, counted from the start ("leading")."""
        most = config.num_train_timesteps - cls.reserved_steps
        spaces = count + cls.reserved_steps
        if 1 <= count <= most:
            ratio = config.num_train_timesteps // spaces
            steps = np.arange(cls.reserved_steps, spaces)[::-1] * ratio + config.steps_offset
            if steps[0] < config.num_train_timesteps:
                return steps
        raise UsageError(f"{count} inference steps cannot be had; take 1 to {most - config.steps_offset}")

    def start(self, strength: float) -> int:
        """Index of the first step when a picture is given: earlier ones are left out.

        Args:
            strength: share of the steps to be taken, in [0, 1]; the number is rounded down. At 0 none is left and the
                index is that after the last step.

        Raises:
            UsageError: another strength.
        """
        if not 0 <= strength <= 1:
            raise UsageError(f"strength {strength} is not between 0 and 1")
        count = len(self._steps)
        return count - min(int(count * strength), count)

    def add_noise(self, index: int, sample: Sample, noise: Sample) -> Sample:
        """A picture's latents as they are before the step of this index."""
        signal, spread = self._levels(index)
        return signal * sample + spread * noise

    def step_weights(self, index: int, is_first: bool) -> StepWeights:
        """What a step gives.

        Args:
            index: of the step.
            is_first: whether there is no picture of the step before.
        """
        signal, spread = self._levels(index)
        weights = self._weights(index, is_first)
        return weights._replace(picture_sample=signal, picture_velocity=-spread)

    @abstractmethod
    def _weights(self, index: int, is_first: bool) -> StepWeights:
        """See `step_weights`; without those of the picture."""

    def _of_picture(self, index: int, share: float, noise: float = 0.0) -> StepWeights:
        """So much of the picture x_0, and so much of the noise, that the network says a sample is made of."""
        signal, spread = self._levels(index)
        return StepWeights(share * signal + noise * spread, noise * signal - share * spread)

    def _levels(self, index: int) -> tuple[float, float]:
        """Shares of picture and noise before a step: sqrt(a_t) and sqrt(1 - a_t)."""
        alpha = self._alphas[self._steps[index]]
        return sqrt(alpha), sqrt(1 - alpha)

    def _alpha_after(self, index: int, last: float) -> float:
        """a_t of the training step that a step leads to; `last` beyond the first of them."""
        step = self._steps[index] - self.config.num_train_timesteps // len(self._steps)
        return float(self._alphas[step]) if step >= 0 else last
