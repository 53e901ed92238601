"""Text-to-image with Meissonic and Monetico: masked tokens, a few more of them decided on every step.

The loop, as the released pipeline runs it (Bai et al. 2024, arXiv 2410.08261): every cell of the token grid starts
masked; each step predicts all masked cells, draws a code for each, keeps the most confident ones and masks the rest
again, until the last step keeps them all and the codec decodes the grid.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from pochade.bundle import Bundle
from pochade.errors import BundleInvalidError
from pochade.runtime.arguments import (
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_SIDE,
    MAX_STEPS,
    check_number,
    check_side,
    check_whole,
    read_prompts,
    read_temperatures,
)
from pochade.runtime.families.meissonic_memory import MemoryModel
from pochade.runtime.lora import LoraNames
from pochade.runtime.painting import Condition, PaintingPipeline, Request
from pochade.runtime.pipeline import Result, StepEvent
from pochade.runtime.rng import MAX_SEED, Noise, PhiloxNoise, random_seed, uniform_row
from pochade.runtime.schedulers.masked import MaskedSchedule, MaskingSchedule
from pochade.runtime.session import BoundRuns, ComponentSession, put, read_later, to_array
from pochade.runtime.tokenizer import PromptTokenizer

REVISIONS = (2, 3)
"""Of component and tensor names, oldest first; pochade.export.families.meissonic writes the last.

Since 3 the decoder has the input `recompute`."""


@dataclass(frozen=True, kw_only=True)
class MaskedRequest(Request):
    """A call with every default filled in and every value checked."""

    temperature: tuple[float, float]
    """On the first and on the last step."""
    micro_conds: tuple[float, ...]
    """Width, height, crop top and left, aesthetic score, as the transformer was trained on them."""


class DenoiseLoop(Protocol):
    """The steps of all images of a call; a family brings its own."""

    def start(self, image: int, /) -> NDArray[np.int64]:
        """Token grid of an image before its first step, (1, height, width)."""

    def run(self, image: int, step: int, tokens: Any) -> tuple[Any, Any]:
        """Next token grid and this step's draw for every cell, (1, height, width) int64, on the device or the host.

        The grid is good until the next step.
        """


class MeissonicPipeline(PaintingPipeline[MaskedRequest]):
    """Masked-token text-to-image."""

    revisions: ClassVar[tuple[int, ...]] = REVISIONS
    lora_names: ClassVar = LoraNames()
    components: ClassVar = ("text_encoder", "condition", "transformer", "sampler", "vq_decoder")
    decoder: ClassVar = "vq_decoder"
    decoder_input: ClassVar = "tokens"

    def _read_bundle(self, bundle: Bundle) -> None:
        scheduler, defaults = bundle.manifest.scheduler, bundle.manifest.defaults
        try:
            self._factor = int(scheduler["codec_factor"])
            self._multiple = self._factor * int(scheduler["patch"])
            self._mask_token_id = int(scheduler["mask_token_id"])
            self._read_scheduler(scheduler)
            self._defaults = {
                key: defaults[key]
                for key in (
                    "width",
                    "height",
                    "num_inference_steps",
                    "guidance_scale",
                    "temperature",
                    "negative_prompt",
                )
            }
        except (KeyError, TypeError, ValueError) as error:
            raise BundleInvalidError(str(bundle.path), [f"scheduler or defaults lack a usable {error}"]) from None
        if bundle.tokenizer_path is None:
            raise BundleInvalidError(str(bundle.path), ["no tokenizer is declared"])
        self._tokenizer = PromptTokenizer(bundle.tokenizer_path)

    def _read_scheduler(self, scheduler: Mapping[str, Any]) -> None:
        """Keep what the family's steps need; a value that is missing or unusable may raise what it likes to raise."""
        self._schedule: MaskingSchedule = scheduler["masking_schedule"]

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | None = None,
        temperature: tuple[float, float] | float | None = None,
        micro_conditioning_aesthetic_score: float = 6.0,
        micro_conditioning_crop_coord: tuple[int, int] = (0, 0),
        noise: Noise | None = None,
    ) -> Iterator[StepEvent | Result]:
        """Yield a `StepEvent` after every denoise step and last the `Result`; closing the generator cancels.

        Args:
            prompt: what to paint, or several prompts for as many pictures.
            negative_prompt: what to avoid, one for all prompts or one each; None takes the bundle's default. Without
                effect when `guidance_scale` is at most 1.
            width: pixels, a multiple of the model's grid; None takes the bundle's default, as everywhere below.
            height: as `width`.
            num_inference_steps: denoise steps.
            guidance_scale: classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598); above 1 every step
                runs the transformer twice.
            num_images_per_prompt: pictures per prompt, the prompts repeated in turn.
            seed: of the first picture, the next ones count up; None or -1 draws one.
            temperature: weight of the noise in the choice of tokens to keep, first and last step; a single number
                falls to 0.01.
            micro_conditioning_aesthetic_score: the score asked for, as in training.
            micro_conditioning_crop_coord: top and left of the crop pretended, as in training.
            noise: supplies all uniform draws in place of the seed, to repeat a recorded run.

        Raises:
            UsageError: a value that cannot be meant.
            OutOfBudgetError: it does not fit the limit of memory.
            BundleInvalidError: there is a limit, and the bundle, an old one, does not tell enough to keep it.
            CancelledError: `cancel` was called.
        """
        given = {
            "width": width,
            "height": height,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "temperature": temperature,
            "negative_prompt": negative_prompt,
        }
        values = self._defaults | {key: value for key, value in given.items() if value is not None}
        for side in ("width", "height"):
            check_side(side, values[side], self._multiple)
        check_whole("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES)
        temperature = self._read_steps(values)
        if seed is None or seed == -1:
            seed = random_seed()
        check_whole("seed", seed, 0, MAX_SEED)
        micro_conds = (*micro_conditioning_crop_coord, micro_conditioning_aesthetic_score)
        for number in micro_conds:
            check_number("micro condition", number, -MAX_SIDE, MAX_SIDE)
        prompts, negatives = read_prompts(prompt, values["negative_prompt"])
        request = MaskedRequest(
            prompts=prompts * num_images_per_prompt,
            negative_prompts=negatives * num_images_per_prompt,
            width=values["width"],
            height=values["height"],
            num_inference_steps=values["num_inference_steps"],
            guidance_scale=float(values["guidance_scale"]),
            seed=seed,
            temperature=temperature,
            micro_conds=(values["width"], values["height"], *micro_conds),
        )
        self.plan = self._planned(request, MemoryModel.of(self.bundle, self._factor, self.device.on_gpu))
        return self._paint(request, noise or PhiloxNoise(request.seed))

    def read_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """See `Pipeline.read_settings`."""
        arguments = super().read_settings(settings)
        micro, temperature = settings.get("micro_conds"), settings.get("temperature")
        if isinstance(micro, list) and len(micro) == 5:
            arguments["micro_conditioning_crop_coord"] = tuple(micro[2:4])
            arguments["micro_conditioning_aesthetic_score"] = micro[4]
        if isinstance(temperature, list):
            arguments["temperature"] = tuple(temperature)
        return arguments

    def _read_steps(self, values: Mapping[str, Any]) -> tuple[float, float]:
        """Temperature of the first and of the last step, once everything that is said about steps can be meant."""
        check_whole("num_inference_steps", values["num_inference_steps"], 1, MAX_STEPS)
        check_number("guidance_scale", values["guidance_scale"], 0.0, MAX_GUIDANCE)
        return read_temperatures(values["temperature"])

    def _paint(self, request: MaskedRequest, noise: Noise) -> Iterator[StepEvent | Result]:
        """The phases: text, condition, denoise steps, decode; one of them in memory at a time."""
        self._begin()
        start = time.perf_counter()
        states, notes = self._encode(request)
        # Passed on without a name here: two megabytes a step that decoding must not find still in memory.
        finished = yield from self._denoise(request, self._condition(request, states), noise, start)
        yield replace(self._result(request, finished, notes, start), tokens=tuple(finished))

    def _denoise(
        self, request: MaskedRequest, condition: Condition, noise: Noise, start: float
    ) -> Generator[StepEvent, None, list[NDArray[np.int64]]]:
        """Token grid of every image; a method of its own, so that no value of its sessions outlives it."""
        total = len(request.prompts) * request.num_inference_steps
        finished: list[NDArray[np.int64]] = []
        with self._open_denoiser() as transformer, self._open("sampler") as sampler:
            steps = self._loop(request, condition, noise, transformer, sampler)
            for image in range(len(request.prompts)):
                tokens: Any = steps.start(image)
                codes = tokens
                for step in range(request.num_inference_steps):
                    with self._phase("denoise"):
                        tokens, codes = steps.run(image, step, tokens)
                    done = image * request.num_inference_steps + step + 1
                    elapsed = time.perf_counter() - start
                    yield StepEvent(done, total, elapsed, image, partial(self._preview, read_later(codes)))
                    self._stop.check()
                finished.append(to_array(tokens))
        return finished

    def _loop(
        self,
        request: MaskedRequest,
        condition: Condition,
        noise: Noise,
        transformer: ComponentSession,
        sampler: ComponentSession,
    ) -> DenoiseLoop:
        """The steps of all images with sessions that are open."""
        schedule = MaskedSchedule.create(
            request.num_inference_steps, math.prod(self._grid(request)), request.temperature, self._schedule
        )
        tokens = np.full((1, *self._grid(request)), self._mask_token_id, np.int64)
        return _MaskedLoop(tokens, request, schedule, condition, noise, transformer, sampler)

    def _encode(self, request: MaskedRequest) -> tuple[dict[str, tuple[Any, Any]], list[str]]:
        """Text states and pooled vector of every distinct text, and what did not fit."""
        notes, states = [], {}
        with self._phase("text"), self._open("text_encoder") as encoder:
            for text in request.texts:
                encoded = self._tokenizer.encode(text)
                if note := encoded.note(text):
                    notes.append(note)
                outputs = encoder.run({"input_ids": encoded.ids[None]})
                states[text] = (
                    encoder.detached("text_states", outputs["text_states"]),
                    encoder.detached("pooled", outputs["pooled"]),
                )
        return states, notes

    def _condition(self, request: MaskedRequest, states: dict[str, tuple[Any, Any]]) -> Condition:
        """Text stream and modulation of all steps, for every distinct text."""
        micro = np.array([request.micro_conds], np.float32)
        timesteps = np.arange(request.num_inference_steps - 1, -1, -1, dtype=np.float32)
        condition = {}
        with self._phase("condition"), self._open("condition") as session:
            for text, (text_states, pooled) in states.items():
                inputs = {"text_states": text_states, "pooled": pooled, "micro_conds": micro, "timesteps": timesteps}
                outputs = session.run(inputs)
                condition[text] = {name: session.detached(name, outputs[name]) for name in ("context", "modulation")}
        return condition

    @property
    def _sampler_name(self) -> str:
        """What settings call the way that tokens are decided."""
        return f"masked {self._schedule}"

    def _settings(self, request: MaskedRequest) -> dict[str, Any]:
        return super()._settings(request) | {
            "temperature": list(request.temperature),
            "micro_conds": list(request.micro_conds),
            "sampler": self._sampler_name,
        }


class _MaskedLoop:
    """From all cells masked to none: the transformer once or twice, then the sampler.

    What they read and write lies in buffers that stay where they are.
    """

    def __init__(
        self,
        tokens: NDArray[np.int64],
        request: MaskedRequest,
        schedule: MaskedSchedule,
        condition: Condition,
        noise: Noise,
        transformer: ComponentSession,
        sampler: ComponentSession,
    ) -> None:
        grid = dict(zip(("batch", "height", "width"), tokens.shape, strict=True))
        cells = {"batch": 1, "cells": tokens.size}
        self._start = tokens
        self._request = request
        self._schedule = schedule
        self._noise = noise
        self._condition = condition
        self._transformer = transformer
        self._inputs = {"tokens": transformer.buffer("tokens", **grid), "step": transformer.buffer("step")}
        self._features = [transformer.buffer("features", **cells) for _ in range(1 + request.guided)]
        self._passes: dict[tuple[str, int], BoundRuns] = {}
        self._draws = {name: sampler.buffer(name, **cells) for name in ("draw_noise", "keep_noise")}
        self._schedules = {name: sampler.buffer(name) for name in ("temperature", "num_masked")}
        inputs = {
            "tokens": self._inputs["tokens"],
            "features": self._features[0],
            "negative_features": self._features[-1],
            "guidance_scale": np.array([request.guidance_scale if request.guided else 1.0], np.float32),
        }
        following = {"next_tokens": sampler.buffer("next_tokens", **grid)}
        self._sampler = sampler.bind(inputs | self._draws | self._schedules, following)

    def start(self, _image: int) -> NDArray[np.int64]:
        """See `DenoiseLoop.start`."""
        return self._start

    def run(self, image: int, step: int, tokens: Any) -> tuple[Any, Any]:
        """See `DenoiseLoop.run`."""
        put(self._inputs["tokens"], tokens)
        put(self._inputs["step"], np.array([step]))
        # Two passes of batch 1 need half the activations of one of batch 2 (docs/families.md).
        for i, text in enumerate(self._request.texts_of(image)):
            self._pass(text, i).run()
        cells = self._start.size
        last = step == len(self._schedule.timesteps) - 1
        keep = np.zeros(cells, np.float32) if last else self._noise.keep(image, step, cells)
        put(self._draws["draw_noise"], uniform_row(self._noise.draw(image, step, cells), cells))
        put(self._draws["keep_noise"], uniform_row(keep, cells))
        put(self._schedules["temperature"], self._schedule.temperatures[step : step + 1])
        put(self._schedules["num_masked"], self._schedule.num_masked[step : step + 1])
        outputs = self._sampler.run()
        return outputs["next_tokens"], outputs["codes"]

    def _pass(self, text: str, place: int) -> BoundRuns:
        """Runs of the transformer for a text that give the features of that place."""
        key = text, place
        if key not in self._passes:
            inputs = {**self._inputs, **self._condition[text]}
            self._passes[key] = self._transformer.bind(inputs, {"features": self._features[place]})
        return self._passes[key]
