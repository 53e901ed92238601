"""Text-to-image with HunyuanDiT: latents of continuous diffusion, less noisy on every step.

The loop, as the published pipelines run it (Li et al. 2024, arXiv 2405.08748): two text encoders read the prompt, the
transformer predicts the velocity of a latent picture for it and for the negative prompt, a sampler takes the step, and
the codec decodes what is left.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pochade.bundle import Bundle
from pochade.errors import BundleInvalidError, UsageError
from pochade.runtime.arguments import (
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_STEPS,
    check_number,
    check_side,
    check_whole,
    read_prompts,
)
from pochade.runtime.families.hunyuandit_controlnet import Control, HunyuanControlNet, Latent, read_controls
from pochade.runtime.families.hunyuandit_loop import DiffusionLoop, DiffusionRequest
from pochade.runtime.families.hunyuandit_lora import LORA_NAMES
from pochade.runtime.families.hunyuandit_memory import MemoryModel
from pochade.runtime.hunyuan_grid import nearest_size, rotary_tables
from pochade.runtime.image import from_image
from pochade.runtime.painting import Condition, PaintingPipeline
from pochade.runtime.pipeline import Pipeline, Result, StepEvent
from pochade.runtime.rng import MAX_SEED, GaussianNoise, PhiloxGaussianNoise, random_seed
from pochade.runtime.schedulers import SAMPLERS
from pochade.runtime.schedulers.diffusion import DiffusionConfig, DiffusionScheduler
from pochade.runtime.session import read_later, to_array
from pochade.runtime.tokenizer import EncodedPrompt, PromptTokenizer

REVISIONS = (2,)
"""Of component and tensor names; pochade.export.families.hunyuandit writes the last."""

ORIGINAL_SIZE = (1024.0, 1024.0)
"""Of the picture that versions up to 1.1 are told the result was cut from, as in the published pipeline."""
ENCODERS = {"text_encoder": "", "text_encoder_2": "_2"}
"""Text encoders, and what is put behind the names of their tensors."""


class HunyuanDiTPipeline(PaintingPipeline[DiffusionRequest]):
    """Text-to-image and image-to-image by latent diffusion, in Chinese and English."""

    revisions: ClassVar = REVISIONS
    lora_names: ClassVar = LORA_NAMES
    components: ClassVar = (*ENCODERS, "condition", "transformer", "sampler", "vae_decoder")
    decoder: ClassVar = "vae_decoder"
    decoder_input: ClassVar = "latent"

    _nets: tuple[HunyuanControlNet, ...] = ()

    def add_controlnet(self, net: Pipeline) -> None:
        """See `Pipeline`."""
        if not isinstance(net, HunyuanControlNet):
            raise UsageError(f"{net.bundle.path} is no ControlNet but a bundle of {net.bundle.manifest.family}")
        if self.cuda_graphs:
            raise UsageError(
                "what a ControlNet adds lies elsewhere on every step, which no CUDA graph can follow; leave one away"
            )
        net.check_model(self.bundle)
        self._nets += (net,)

    def _read_bundle(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        scheduler, defaults = manifest.scheduler, manifest.defaults
        try:
            self._factor = int(scheduler["codec_factor"])
            self._multiple = self._factor * int(scheduler["patch"])
            self._noise_config = DiffusionConfig.from_dict(scheduler)
            latent, cosines = (self._input("transformer", name) for name in ("latent", "rope_cos"))
            self._channels, self._head_dim = int(latent[1]), 2 * int(cosines[1])
            names = ("width", "height", "num_inference_steps", "guidance_scale", "negative_prompt", "sampler")
            self._defaults = {key: defaults[key] for key in names}
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise BundleInvalidError(str(bundle.path), [f"scheduler or defaults lack a usable {error}"]) from None
        paths = {"text_encoder": bundle.tokenizer_path, **bundle.more_tokenizer_paths}
        missing = [name for name in ENCODERS if paths.get(name) is None]
        if missing:
            raise BundleInvalidError(str(bundle.path), [f"no tokenizer of {name} is declared" for name in missing])
        self._tokenizers = {name: path for name in ENCODERS if (path := paths[name]) is not None}
        self._takes_sizes = any(spec.name == "image_meta_size" for spec in manifest.components["condition"].inputs)

    def _input(self, component: str, name: str) -> Sequence[int | str]:
        """Shape of an input."""
        specs = self.bundle.manifest.components[component].inputs
        return {spec.name: spec.shape for spec in specs}[name]

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        num_images_per_prompt: int = 1,
        seed: int | None = None,
        sampler: str | None = None,
        image: Image.Image | None = None,
        strength: float = 0.8,
        control_image: Image.Image | Sequence[Image.Image] | None = None,
        controlnet_conditioning_scale: float | Sequence[float] | None = None,
        noise: GaussianNoise | None = None,
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
            guidance_rescale: share of the guided prediction that gets the deviation of the prompt's own (Lin et al.
                2023, arXiv 2305.08891, section 3.4), in [0, 1].
            num_images_per_prompt: pictures per prompt, the prompts repeated in turn.
            seed: of the first picture, the next ones count up; None or -1 draws one.
            sampler: a name of `pochade.runtime.schedulers.SAMPLERS`.
            image: a picture to begin with, brought to width and height; needs a bundle with `vae_encoder`.
            strength: share of the steps that are taken on `image`, above 0 and at most 1.
            control_image: what the ControlNets follow, a map of edges, depth or pose as they were trained on, for all
                of them or one each; brought to width and height.
            controlnet_conditioning_scale: how strictly, for all of them or one each.
            noise: supplies all noise in place of the seed, to repeat a recorded run.

        Raises:
            UsageError: a value that cannot be meant.
            OutOfBudgetError: it does not fit the limit of memory.
            CancelledError: `cancel` was called.
        """
        given = {
            "width": width,
            "height": height,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt,
            "sampler": sampler,
        }
        values = self._defaults | {key: value for key, value in given.items() if value is not None}
        for side in ("width", "height"):
            check_side(side, values[side], self._multiple)
        check_whole("num_inference_steps", values["num_inference_steps"], 1, MAX_STEPS)
        check_number("guidance_scale", values["guidance_scale"], 0.0, MAX_GUIDANCE)
        check_number("guidance_rescale", guidance_rescale, 0.0, 1.0)
        check_whole("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES)
        if values["sampler"] not in SAMPLERS:
            raise UsageError(f"sampler {values['sampler']!r} is unknown; there are {', '.join(SAMPLERS)}")
        if seed is None or seed == -1:
            seed = random_seed()
        check_whole("seed", seed, 0, MAX_SEED)
        check_number("strength", strength, 0.0, 1.0)
        if image is not None:
            self._check_image(values["num_inference_steps"], strength)
        control_images, control_scales = read_controls(self._nets, control_image, controlnet_conditioning_scale)
        prompts, negatives = read_prompts(prompt, values["negative_prompt"])
        request = DiffusionRequest(
            # Published pipelines take the white space around a prompt away.
            prompts=tuple(text.strip() for text in prompts) * num_images_per_prompt,
            negative_prompts=negatives * num_images_per_prompt,
            width=values["width"],
            height=values["height"],
            num_inference_steps=values["num_inference_steps"],
            guidance_scale=float(values["guidance_scale"]),
            seed=seed,
            guidance_rescale=float(guidance_rescale),
            sampler=values["sampler"],
            image=image,
            strength=float(strength),
            control_images=control_images,
            control_scales=control_scales,
        )
        self._scheduler(request)  # says what is wrong with the number of steps before anything is loaded
        memory = MemoryModel.of(self.bundle, self._factor, self._used_nets(request), self.device.on_gpu)
        self.plan = self._planned(request, memory, encodes=image is not None or bool(control_images))
        return self._paint(request, noise or PhiloxGaussianNoise(request.seed))

    def read_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """See `Pipeline.read_settings`."""
        if settings.get("strength") is not None:
            raise UsageError("it was begun with another picture, which it does not carry")
        if settings.get("controlnets"):
            raise UsageError("it follows a control image, which it does not carry")
        return super().read_settings(settings)

    def _check_image(self, steps: int, strength: float) -> None:
        """Whether painting can begin with a picture.

        Raises:
            UsageError: the bundle has no encoder, or no step would be taken.
        """
        if "vae_encoder" not in self.bundle.manifest.components:
            raise UsageError("the bundle cannot begin with a picture: it has no vae_encoder; export it again")
        if int(steps * strength) < 1:
            raise UsageError(f"strength {strength:g} of {steps} steps is none; take {1 / steps:.3g} or more")

    def _scheduler(self, request: DiffusionRequest) -> DiffusionScheduler:
        return SAMPLERS[request.sampler].create(request.num_inference_steps, self._noise_config)

    def _first_step(self, request: DiffusionRequest) -> int:
        return self._scheduler(request).start(request.strength) if request.image is not None else 0

    def _used_nets(self, request: DiffusionRequest) -> list[Bundle]:
        """Of the ControlNets that take part in a call."""
        return [net.bundle for net in self._nets[: len(request.control_images)]]

    def _paint(self, request: DiffusionRequest, noise: GaussianNoise) -> Iterator[StepEvent | Result]:
        """The phases: picture, text, condition, denoise steps, decode; one of them in memory at a time."""
        self._begin()
        start = time.perf_counter()
        pictures = self._encode_images(request)
        states, notes = self._encode(request)
        # Passed on without a name here, so that decoding does not find it still in memory.
        finished = yield from self._denoise(request, self._conditions(request, states), pictures, noise, start)
        yield self._result(request, finished, notes, start)

    def _encode_images(self, request: DiffusionRequest) -> list[Latent]:
        """Latents of the control images, and last of the picture to begin with."""
        images = [*request.control_images, *([] if request.image is None else [request.image])]
        if not images:
            return []
        latents: dict[int, Latent] = {}
        with self._phase("encode"), self._open("vae_encoder") as encoder:
            strips = self._strips(encoder, *self._grid(request))
            for image in images:
                if id(image) not in latents:
                    size = (request.width, request.height)
                    pixels = from_image(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
                    latents[id(image)] = encoder.run({"image": pixels, "strips": strips})["latent"].numpy().copy()
        return [latents[id(image)] for image in images]

    def _encode(self, request: DiffusionRequest) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """States and masks of every distinct text, named as `condition` takes them, and what did not fit."""
        notes: list[str] = []
        states: dict[str, dict[str, Any]] = {text: {} for text in request.texts}
        width, height = nearest_size(request.width, request.height)
        if (width, height) != (request.width, request.height):
            notes.append(f"the model was not trained on {request.width}x{request.height}; nearest is {width}x{height}")
        for name, suffix in ENCODERS.items():
            with self._phase("text"):
                # A tokenizer of 250 000 pieces takes 450 MB; it is gone before the encoder is opened.
                tokens = _tokens(self._tokenizers[name], request.texts)
            with self._phase("text"), self._open(name) as encoder:
                for text, encoded in tokens.items():
                    if note := encoded.note(text, name):
                        notes.append(note)
                    outputs = encoder.run({"input_ids": encoded.ids[None], "attention_mask": encoded.mask[None]})
                    port = f"text_states{suffix}"
                    states[text][port] = encoder.detached(port, outputs[port])
                    states[text][f"text_mask{suffix}"] = encoded.mask[None]
                    # They would hold this encoder's weights while the next one is opened.
                    del outputs
        return states, notes

    def _conditions(self, request: DiffusionRequest, states: Mapping[str, Mapping[str, Any]]) -> list[Condition]:
        """The transformer's, then those of the ControlNets."""
        bundles = [self.bundle, *self._used_nets(request)]
        return [self._condition(request, states, bundle, _suffix(i)) for i, bundle in enumerate(bundles)]

    def _condition(
        self, request: DiffusionRequest, states: Mapping[str, Mapping[str, Any]], bundle: Bundle, suffix: str
    ) -> Condition:
        """Text tokens and modulation of all steps, for every distinct text."""
        shared: dict[str, Any] = {"timesteps": self._scheduler(request).timesteps}
        if self._takes_sizes:
            sizes = (*ORIGINAL_SIZE, request.width, request.height, 0, 0)
            shared["image_meta_size"] = np.array([sizes], np.float32)
        condition = {}
        with self._phase("condition"), self._open("condition", bundle, f"condition{suffix}") as session:
            for text, inputs in states.items():
                outputs = session.run({**inputs, **shared})
                condition[text] = {name: session.detached(name, outputs[name]) for name in ("context", "modulation")}
        return condition

    def _denoise(
        self,
        request: DiffusionRequest,
        conditions: Sequence[Condition],
        pictures: Sequence[Latent],
        noise: GaussianNoise,
        start: float,
    ) -> Generator[StepEvent, None, list[Latent]]:
        """Latents of every image; a method of its own, so that no value of its session outlives it."""
        first, steps = self._first_step(request), request.num_inference_steps
        total = len(request.prompts) * (steps - first)
        finished: list[Latent] = []
        nets = self._used_nets(request)
        initial = pictures[len(nets)] if request.image is not None else None
        shape = (1, self._channels, *self._grid(request))
        with contextlib.ExitStack() as opened:
            transformer = opened.enter_context(self._open_denoiser())
            sampler = opened.enter_context(self._open("sampler"))
            rope = self._rope(request)
            condition = {text: transformer.brought(told) for text, told in conditions[0].items()}
            controls = []
            for i, (net, scale) in enumerate(zip(nets, request.control_scales, strict=True)):
                session = opened.enter_context(self._open("controlnet", net, f"controlnet{_suffix(i)}"))
                seen = session.brought({"control": pictures[i]})["control"]
                controls.append(Control(session, conditions[i + 1], seen, scale))
            loop = DiffusionLoop(
                request, self._scheduler(request), noise, shape, rope, condition, transformer, sampler, controls
            )
            for image in range(len(request.prompts)):
                latent: Any = loop.start(image, first, initial)
                picture: Any = None
                for step in range(first, steps):
                    with self._phase("denoise"):
                        latent, picture = loop.run(image, step, latent, picture)
                    done = image * (steps - first) + step - first + 1
                    yield StepEvent(
                        done, total, time.perf_counter() - start, image, partial(self._preview, read_later(latent))
                    )
                    self._stop.check()
                finished.append(to_array(latent))
        return finished

    def _rope(self, request: DiffusionRequest) -> dict[str, NDArray[np.float32]]:
        """Angles of every cell, as the transformer takes them."""
        rows, columns = (math.prod((side, self._factor)) // self._multiple for side in self._grid(request))
        cosines, sines = rotary_tables(rows, columns, self._head_dim)
        return {"rope_cos": cosines, "rope_sin": sines}

    def _settings(self, request: DiffusionRequest) -> dict[str, Any]:
        return super()._settings(request) | {
            "guidance_rescale": request.guidance_rescale,
            "sampler": request.sampler,
            "strength": request.strength if request.image is not None else None,
            "controlnets": [net.manifest.name for net in self._used_nets(request)] or None,
            "controlnet_conditioning_scale": list(request.control_scales) or None,
        }


def _suffix(index: int) -> str:
    """What tells apart several components of one name, of a model and its ControlNets."""
    return f"_{index + 1}" if index else ""


def _tokens(path: Path, texts: Sequence[str]) -> dict[str, EncodedPrompt]:
    tokenizer = PromptTokenizer(path)
    return {text: tokenizer.encode(text) for text in texts}
