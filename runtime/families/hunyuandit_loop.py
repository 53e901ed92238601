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
from pochade.runtime.session import BoundRuns, ComponentSession, put


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


class DiffusionLoop:
    """The steps of all pictures of a call: the transformer once or twice, then the sampler.

    What they read and write lies in buffers that stay where they are.
    """

    def __init__(
        self,
        request: DiffusionRequest,
        scheduler: DiffusionScheduler,
        noise: GaussianNoise,
        shape: tuple[int, ...],
        rope: Mapping[str, Any],
        condition: Condition,
        transformer: ComponentSession,
        sampler: ComponentSession,
        controls: Sequence[Control],
    ) -> None:
        """Lay the buffers out.

        Args:
            request: what was asked for.
            scheduler: of it.
            noise: to begin with, and that steps add.
            shape: of latents.
            rope: angles of every cell, as the transformer takes them.
            condition: of every text.
            transformer: open, as the next two.
            sampler: that guides and takes the step.
            controls: ControlNets at work.
        """
        self._request = request
        self._scheduler = scheduler
        self._noise = noise
        self._shape = shape
        self._condition = condition
        self._transformer = transformer
        self._controls = controls
        axes = dict(zip(("batch", "height", "width"), (shape[0], *shape[2:]), strict=True))
        self._latent, self._step = transformer.buffer("latent", **axes), transformer.buffer("step")
        # Once for all steps where they are read.
        self._inputs = {"latent": self._latent, "step": self._step, **transformer.brought(rope)}
        self._predictions = [transformer.buffer("noise_pred", **axes) for _ in range(1 + request.guided)]
        self._passes: dict[tuple[str, int], BoundRuns] = {}
        added = {"noise": sampler.buffer("noise", **axes)} if scheduler.needs_noise else {}
        self._given = {"picture_before": sampler.buffer("picture_before", **axes)} | added
        self._weights = sampler.buffer("step_weights")
        inputs = {
            "latent": self._latent,
            "noise_pred": self._predictions[0],
            "negative_noise_pred": self._predictions[-1],
            "guidance_scale": np.array([request.guidance_scale if request.guided else 1.0], np.float32),
            "guidance_rescale": np.array([request.guidance_rescale if request.guided else 0.0], np.float32),
            "step_weights": self._weights,
            # What has no weight may be anything: latents are there already.
            "noise": self._latent,
        }
        self._sampler = sampler.bind(inputs | self._given)

    def start(self, image: int, first: int, initial: Latent | None) -> Latent:
        """Latents before the first step to be taken: noise, or a picture's with noise."""
        noise = _checked(self._noise.start(image, self._shape), self._shape)
        return noise if initial is None else self._scheduler.add_noise(first, initial, noise)

    def run(self, image: int, step: int, latent: Any, picture_before: Any = None) -> tuple[Any, Any]:
        """A step, on the transformer's device.

        Args:
            image: which picture of the call.
            step: index of it.
            latent: before it, on the host or on that device.
            picture_before: that the step before gave; None for the first one that is taken.

        Returns:
            Latents after it, and the picture that the network saw before it, like latents.
        """
        put(self._latent, latent)
        put(self._step, np.array([step]))
        # Two passes of batch 1 need half the activations of one of batch 2 (docs/families.md).
        for i, text in enumerate(self._request.texts_of(image)):
            self._predict(text, i)
        put(self._given["picture_before"], latent if picture_before is None else picture_before)
        if self._scheduler.needs_noise:
            put(self._given["noise"], _checked(self._noise.step(image, step, self._shape), self._shape))
        put(self._weights, np.array(self._scheduler.step_weights(step, picture_before is None), np.float32))
        outputs = self._sampler.run()
        return outputs["next_latent"], outputs["picture"]

    def _predict(self, text: str, place: int) -> None:
        """What the transformer says for a text, in the prediction of that place."""
        inputs, kept = {**self._inputs, **self._condition[text]}, {"noise_pred": self._predictions[place]}
        if self._controls:
            added: dict[str, Any] = {}
            for control in self._controls:
                added = control.add(text, inputs, added)
            # Not bound for longer: what nets add are the largest values of all.
            self._transformer.run(inputs | added, kept)
            return
        if (text, place) not in self._passes:
            self._passes[text, place] = self._transformer.bind(inputs, kept)
        self._passes[text, place].run()


def _checked(noise: NDArray[np.float32], shape: tuple[int, ...]) -> Latent:
    """Noise, once it is what a `GaussianNoise` promises.

    Raises:
        UsageError: another shape, or numbers that are not finite.
    """
    values = np.asarray(noise, np.float32)
    if values.shape != shape or not np.isfinite(values).all():
        raise UsageError(f"noise must be finite numbers of shape {shape}, not {values.shape}")
    return values
