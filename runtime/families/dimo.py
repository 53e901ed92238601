"""Text-to-image with DiMO: Meissonic distilled to one forward pass (Zhu et al. 2025, arXiv 2503.15457).

Some cells of the token grid start masked, the others with codes that mean nothing, and all of them with noise; one pass
of the transformer predicts every cell, each is drawn by itself, and the codec decodes the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pochade.errors import UsageError
from pochade.runtime.arguments import MAX_TEMPERATURE, check_number
from pochade.runtime.families.meissonic import DenoiseLoop, MaskedRequest, MeissonicPipeline
from pochade.runtime.painting import Condition
from pochade.runtime.rng import Noise, StartNoise, uniform_row
from pochade.runtime.session import ComponentSession, to_array

REVISIONS = (1,)
"""Of component and tensor names; pochade.export.families.dimo writes it."""

LEAST_TEMPERATURE = 0.01
"""Below it the softmax is of numbers that float32 cannot hold."""


class DimoPipeline(MeissonicPipeline):
    """Masked-token text-to-image in one step; takes the arguments of Meissonic that have a meaning for one step.

    `num_inference_steps` is 1 and `guidance_scale` is 1, no negative prompt has an effect, and `temperature` is one
    number: the logits are divided by it before the draw. `noise` has to be a `StartNoise`.
    """

    revisions: ClassVar = REVISIONS

    def use_cuda_graphs(self) -> None:
        """See `Pipeline`."""
        raise UsageError("DiMO runs its transformer once, and CUDA graphs are for what runs again; leave them away")

    def _read_scheduler(self, scheduler: Mapping[str, Any]) -> None:
        self._mask_ratio = float(scheduler["mask_ratio"])
        self._codebook_size = int(scheduler["codebook_size"])
        if not 0 <= self._mask_ratio <= 1 or self._codebook_size < 1:
            raise ValueError(f"mask_ratio {self._mask_ratio} or codebook_size {self._codebook_size}")

    def _read_steps(self, values: Mapping[str, Any]) -> tuple[float, float]:
        steps = values["num_inference_steps"]
        if isinstance(steps, bool) or steps != 1:
            raise UsageError(f"num_inference_steps is {steps!r}; DiMO paints in 1 step")
        if values["guidance_scale"] != 1:
            raise UsageError(
                f"guidance_scale is {values['guidance_scale']!r}; DiMO has learned its guidance, leave it out"
            )
        negative = values["negative_prompt"]
        if any([negative] if isinstance(negative, str) else negative):
            raise UsageError("a negative prompt has no effect on DiMO, which paints without guidance; leave it out")
        temperature = values["temperature"]
        if isinstance(temperature, list | tuple):
            raise UsageError(f"temperature is {temperature!r}; DiMO has one step, give one number")
        check_number("temperature", temperature, LEAST_TEMPERATURE, MAX_TEMPERATURE)
        return float(temperature), float(temperature)

    def _loop(
        self,
        request: MaskedRequest,
        condition: Condition,
        noise: Noise,
        transformer: ComponentSession,
        sampler: ComponentSession,
    ) -> DenoiseLoop:
        if not isinstance(noise, StartNoise):
            raise UsageError("noise has no codes, order and normal, which DiMO starts from; see rng.StartNoise")
        return _OneStep(
            partial(self._start, noise, self._grid(request)), request, condition, noise, transformer, sampler
        )

    def _start(self, noise: StartNoise, grid: tuple[int, int], image: int) -> NDArray[np.int64]:
        """Codes at random, and the mask in the same number of cells whatever the seed."""
        cells = grid[0] * grid[1]
        drawn = uniform_row(noise.codes(image, cells), cells)[0].astype(np.float64)
        tokens = (drawn * self._codebook_size).astype(np.int64)
        order = np.argsort(uniform_row(noise.order(image, cells), cells)[0], kind="stable")
        tokens[order[: round(self._mask_ratio * cells)]] = self._mask_token_id
        start: NDArray[np.int64] = tokens.reshape(1, *grid)
        return start

    def _settings(self, request: MaskedRequest) -> dict[str, Any]:
        return super()._settings(request) | {"temperature": request.temperature[0]}

    @property
    def _sampler_name(self) -> str:
        return f"one step, {self._mask_ratio:g} masked"


class _OneStep:
    """The transformer once, then the sampler."""

    def __init__(
        self,
        start: Callable[[int], NDArray[np.int64]],
        request: MaskedRequest,
        condition: Condition,
        noise: StartNoise,
        transformer: ComponentSession,
        sampler: ComponentSession,
    ) -> None:
        self._start = start
        self._request = request
        self._condition = condition
        self._noise = noise
        self._transformer = transformer
        self._sampler = sampler

    def start(self, image: int) -> NDArray[np.int64]:
        """See `DenoiseLoop.start`."""
        return self._start(image)

    def run(self, image: int, step: int, tokens: Any) -> tuple[Any, Any]:
        """See `DenoiseLoop.run`."""
        cells, dim = tokens[0].size, self._width()
        noise = self._noise.normal(image, cells, dim).reshape(*tokens.shape, dim)
        inputs = {"tokens": tokens, "noise": noise, **self._condition[self._request.prompts[image]]}
        features = self._transformer.run(inputs)["features"]
        draw = uniform_row(self._noise.draw(image, step, cells), cells)
        temperature = np.array(self._request.temperature[:1], np.float32)
        outputs = self._sampler.run({"features": features, "draw_noise": draw, "temperature": temperature})
        codes = to_array(outputs["codes"]).reshape(tokens.shape)
        return codes, codes

    def _width(self) -> int:
        spec = next(spec for spec in self._transformer.component.inputs if spec.name == "noise")
        return int(spec.shape[-1])
