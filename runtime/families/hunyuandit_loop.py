"""A call of HunyuanDiT, and the steps of one of its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pochade.errors import UsageError
from pochade.runtime.families.hunyuandit_controlnet import Control, Latent
from pochade.runtime.guidance import guided
from pochade.runtime.painting import Condition, Request
from pochade.runtime.rng import GaussianNoise
from pochade.runtime.schedulers.diffusion import DiffusionScheduler
from pochade.runtime.session import ComponentSession, to_array


@dataclass(frozen=True, kw_only=True)
class DiffusionRequest(Request):
    """A call with every default filled in and every value checked."""

    guidance_rescale: float
    sampler: str
    image: Image.Image | None
    """To begin with, of any size."""
    strength: float
    control_images: tuple[Image.Image, ...]
    """What each ControlNet looks at, of any size; empty where none takes part."""
    control_scales: tuple[float, ...]


@dataclass(frozen=True)
class DiffusionLoop:
    """The steps of one picture: the transformer once or twice, then the sampler."""

    request: DiffusionRequest
    image: int
    """Which picture of the call it is."""
    scheduler: DiffusionScheduler
    """Of this picture alone; some remember the step before."""
    noise: GaussianNoise
    shape: tuple[int, ...]
    """Of latents."""
    rope: Mapping[str, Any]
    """Angles of every cell, as the transformer takes them."""
    condition: Condition
    transformer: ComponentSession
    controls: Sequence[Control]

    def start(self, first: int, initial: Latent | None) -> Latent:
        """Latents before the first step to be taken: noise, or a picture's with noise."""
        noise = _checked(self.noise.start(self.image, self.shape), self.shape)
        return noise if initial is None else self.scheduler.add_noise(first, initial, noise)

    def run(self, step: int, latent: Latent) -> Latent:
        """Latents after a step."""
        velocity = self._velocity(step, latent, self.request.prompts[self.image])
        if self.request.guided:
            away = self._velocity(step, latent, self.request.negative_prompts[self.image])
            velocity = guided(velocity, away, self.request.guidance_scale, self.request.guidance_rescale)
        noise = None
        if self.scheduler.needs_noise:
            noise = _checked(self.noise.step(self.image, step, self.shape), self.shape)
        return np.asarray(self.scheduler.step(step, velocity, latent, noise), np.float32)

    def _velocity(self, step: int, latent: Latent, text: str) -> Latent:
        # Two passes of batch 1 need half the activations of one of batch 2 (docs/families.md).
        inputs = {"latent": latent, "step": np.array([step]), **self.condition[text], **self.rope}
        added: dict[str, Any] = {}
        for control in self.controls:
            added = control.add(text, inputs, added)
        return to_array(self.transformer.run(inputs | added)["noise_pred"])


def _checked(noise: NDArray[np.float32], shape: tuple[int, ...]) -> Latent:
    """Noise, once it is what a `GaussianNoise` promises.

    Raises:
        UsageError: another shape, or numbers that are not finite.
    """
    values = np.asarray(noise, np.float32)
    if values.shape != shape or not np.isfinite(values).all():
        raise UsageError(f"noise must be finite numbers of shape {shape}, not {values.shape}")
    return values
