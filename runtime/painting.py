"""What families that paint have in common: the values of a call, and the way from the last step to the result."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pochade import __version__
from pochade.runtime.expanded import Expand, resolve_expand
from pochade.runtime.image import to_image
from pochade.runtime.memory import peak_memory
from pochade.runtime.pipeline import Pipeline, Result, Tiling
from pochade.runtime.plan import Plan, Way, Workload
from pochade.runtime.session import ComponentSession
from pochade.runtime.strips import strip_count, strip_pixels

PREVIEW_SIDE = 256

Condition = Mapping[str, Mapping[str, Any]]
"""Text tokens and modulation of all steps by text, each by the name of the input that takes it."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A call with every default filled in and every value checked."""

    prompts: tuple[str, ...]
    """One per image."""
    negative_prompts: tuple[str, ...]
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int

    @property
    def guided(self) -> bool:
        """Whether the negative prompt takes part; the released pipelines compare strictly."""
        return self.guidance_scale > 1.0

    def texts_of(self, image: int) -> list[str]:
        """What is painted and, where it takes part, what is avoided, for a pass of the network each."""
        return [self.prompts[image], *([self.negative_prompts[image]] if self.guided else [])]

    @property
    def texts(self) -> list[str]:
        """Every distinct text."""
        return list(dict.fromkeys(self.prompts + (self.negative_prompts if self.guided else ())))


R = TypeVar("R", bound=Request)


class MemoryModel(Protocol):
    """Predicts the resident set of the whole process, in bytes; a family brings its own."""

    def ways(self, work: Workload, tiling: Tiling, base: int) -> Mapping[str, Sequence[Way]]:
        """Ways to run each phase, the fastest first, `base` being taken already."""


class PaintingPipeline(Pipeline, Generic[R]):
    """A pipeline whose steps leave something on a grid, tokens or latents, that a codec decodes to a picture."""

    denoiser: ClassVar = "transformer"
    """Component that runs on every step."""
    decoder: ClassVar[str]
    """Component that makes pictures."""
    decoder_input: ClassVar[str]
    """Its input for what the steps leave."""

    _factor: int
    """Pixels per side of a cell of the grid; `_read_bundle` sets it."""

    def _grid(self, request: R) -> tuple[int, int]:
        """Rows and columns of cells."""
        return request.height // self._factor, request.width // self._factor

    def _planned(self, request: R, memory: MemoryModel | None, encodes: bool = False) -> Plan | None:
        """How to keep a call within the limit; None where there is none and the bundle does not tell enough."""
        rows, columns = self._grid(request)
        work = Workload(
            rows=rows,
            columns=columns,
            steps=request.num_inference_steps,
            texts=len(request.texts),
            images=len(request.prompts),
            adapters=max(self._adapter_bytes(name) for name in self.components),
            encodes=encodes,
            expand=self._expand(request),
            threads=self.threads,
        )
        tiling = self.tiling if self.device.loops else "off"
        return self._plan(None if memory is None else partial(memory.ways, work, tiling))

    def _expand(self, request: R) -> Expand:
        """Whether the weights of the transformer may or must be expanded."""
        name, passes = self.denoiser, (2 if request.guided else 1) * request.num_inference_steps * len(request.prompts)
        adapted = self._adapter_bytes(name) > 0
        return resolve_expand(self.expand, self.bundle.manifest.components[name], adapted, self.device, passes)

    def _result(self, request: R, finished: Sequence[NDArray[Any]], notes: Sequence[str], start: float) -> Result:
        """Decoded pictures, and how they were made.

        Args:
            request: what was asked for.
            finished: what the last step of every picture left.
            notes: on the prompts and the size.
            start: of the call, on the clock of `time.perf_counter`.
        """
        images = self._decode(finished)
        self._timings["total"] = time.perf_counter() - start
        return Result(
            images,
            [request.seed + i for i in range(len(images))],
            self._settings(request),
            dict(self._timings),
            peak_memory(),
            dict(self._providers),
            (
                *notes,
                *([f"painted on the CPU: {self.device.note}"] if self.device.note else []),
                *self._fallen.values(),
            ),
            dict(self._components),
        )

    def _open_denoiser(self) -> contextlib.AbstractContextManager[ComponentSession]:
        """A session of what runs on every step."""
        return self._open(self.denoiser, expanded=self._is_expanded, captures=self.cuda_graphs)

    def _decode(self, finished: Sequence[NDArray[Any]]) -> list[Image.Image]:
        """Pictures of what the last steps left."""
        with self._phase("decode"), self._open(self.decoder) as decoder:
            return [self._picture(decoder, state) for state in finished]

    def _preview(self, state: Callable[[], NDArray[Any]]) -> Image.Image:
        """Small picture of what a step left, read when it is wanted.

        Tokens not yet kept are as they were drawn, latents have their noise.
        """
        # Not _open: a preview belongs neither to the run's providers nor to what an observer is told of it.
        sparing, device = self._way("decode").recompute, self._device_for("decode")
        session = ComponentSession(self.bundle, self.decoder, device, self.threads, self._stop, sparing=sparing)
        with contextlib.closing(session) as decoder:
            image = self._picture(decoder, state())
        image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        return image

    @property
    def _is_expanded(self) -> bool:
        """Whether the transformer of the present call computes with expanded weights."""
        return self._way("denoise").expanded

    def _picture(self, decoder: ComponentSession, state: NDArray[Any]) -> Image.Image:
        recompute = np.array(self._way("decode").recompute)
        strips = self._strips(decoder, *state.shape[-2:])
        inputs = {self.decoder_input: state, "strips": strips, "recompute": recompute}
        # Meissonic's bundles of revision 2 know no recompute.
        known = {spec.name for spec in decoder.component.inputs}
        outputs = decoder.run({name: value for name, value in inputs.items() if name in known})
        return to_image(outputs["image"].numpy()[0])

    def _strips(self, codec: ComponentSession, rows: int, columns: int) -> NDArray[np.int64]:
        """How many strips a codec computes in, (1), for so many cells."""
        whole = self.tiling == "off" or not codec.device.loops
        pixels = strip_pixels(codec.component, codec.device.on_gpu)
        return np.array([1 if whole else strip_count(rows, columns, self._factor, pixels)])

    def _settings(self, request: R) -> dict[str, Any]:
        """Every value that was used; a family adds its own."""
        several = len(set(request.prompts)) > 1
        return {
            "prompt": list(request.prompts) if several else request.prompts[0],
            "negative_prompt": (list(request.negative_prompts) if several else request.negative_prompts[0])
            if request.guided
            else None,
            "width": request.width,
            "height": request.height,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "seed": request.seed,
            "model": self.bundle.manifest.name,
            "bundle_sha256": self.bundle.digest,
            "device": self.device.name,
            **({"providers": dict(self._providers)} if self.device.on_gpu else {}),
            "version": __version__,
            **({"expanded": True} if self._is_expanded else {}),
            **self._lora_settings(),
        }
