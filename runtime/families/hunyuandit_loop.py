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
from pochade.runtime.painting import Condition, Request
from pochade.runtime.rng import GaussianNoise
from pochade.runtime.schedulers.diffusion import DiffusionScheduler
from pochade.runtime.session import ComponentSession


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
    noise: GaussianNoise
    shape: tuple[int, ...]
    """Of latents."""
    rope: Mapping[str, Any]
    """Angles of every cell, as the transformer takes them."""
    condition: Condition
    transformer: ComponentSession
    sampler: ComponentSession
    controls: Sequence[Control]

    def start(self, first: int, initial: Latent | None) -> Latent:
        """Latents before the first step to be taken: noise, or a picture's with noise."""
        noise = _checked(self.noise.start(self.image, self.shape), self.shape)
        return noise if initial is None else self.scheduler.add_noise(first, initial, noise)

    def run(self, step: int, latent: Any, picture_before: Any = None) -> tuple[Any, Any]:
        """A step, on the transformer's device.

        Args:
            step: index of it.
            latent: before it, on the host or on that device.
            picture_before: that the step before gave; None for the first one that is taken.

        Returns:
            Latents after it, and the picture that the network saw before it, like latents.
        """
        request = self.request
        wanted = away = self._velocity(step, latent, request.prompts[self.image])
        if request.guided:
            away = self._velocity(step, latent, request.negative_prompts[self.image])
        noise = latent
        if self.scheduler.needs_noise:
            noise = _checked(self.noise.step(self.image, step, self.shape), self.shape)
        # What has no weight may be anything: latents are there already.
        outputs = self.sampler.run(
            {
                "latent": latent,
                "noise_pred": wanted,
                "negative_noise_pred": away,
                "picture_before": latent if picture_before is None else picture_before,
                "noise": noise,
                "guidance_scale": np.array([request.guidance_scale if request.guided else 1.0], np.float32),
                "guidance_rescale": np.array([request.guidance_rescale if request.guided else 0.0], np.float32),
                "step_weights": np.array(self.scheduler.step_weights(step, picture_before is None), np.float32),
            }
        )
        return outputs["next_latent"], outputs["picture"]

    def _velocity(self, step: int, latent: Any, text: str) -> Any:
        # Two passes of batch 1 need half the activations of one of batch 2 (docs/families.md).
        inputs = {"latent": latent, "step": np.array([step]), **self.condition[text], **self.rope}
        added: dict[str, Any] = {}
        for control in self.controls:
            added = control.add(text, inputs, added)
        return self.transformer.run(inputs | added)["noise_pred"]


def _checked(noise: NDArray[np.float32], shape: tuple[int, ...]) -> Latent:
    """Noise, once it is what a `GaussianNoise` promises.

    Raises:
        UsageError: another shape, or numbers that are not finite.
    """
    values = np.asarray(noise, np.float32)
    if values.shape != shape or not np.isfinite(values).all():
        raise UsageError(f"noise must be finite numbers of shape {shape}, not {values.shape}")
    return values
