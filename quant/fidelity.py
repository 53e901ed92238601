"""How faithful one bundle is to another of the same source: the same inputs, the same noise, different outputs."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pochade.bundle import Bundle
from pochade.runtime.families import FAMILIES
from pochade.runtime.image import from_image
from pochade.runtime.pipeline import Pipeline, Result
from pochade.runtime.providers import choose
from pochade.runtime.strips import strip_count

Array = NDArray[Any]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how much of it is."""

ENCODERS = {"vq_encoder", "vae_encoder"}
"""Components that read pictures; painting from words does not run them."""

CEILING_DB = 200.0
"""Stands for no difference at all: JSON has no infinity."""


@dataclass(frozen=True)
class Call:
    """One run of a component."""

    component: str
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


class Recorder:
    """Observer of a pipeline that keeps every component run; equal arrays are kept once."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._known: dict[bytes, Array] = {}

    def __call__(self, name: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Keep the call."""
        self.calls.append(Call(name, self._kept(inputs), self._kept(outputs)))

    def _kept(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        return {name: self._known.setdefault(digest(array), array.copy()) for name, array in arrays.items()}


def digest(array: Array) -> bytes:
    """Equal for arrays of equal type, shape and content."""
    content = np.ascontiguousarray(array)
    head = f"{content.dtype} {content.shape}".encode()
    return hashlib.blake2b(content.reshape(-1).view(np.uint8).data, key=head[:64], digest_size=16).digest()


def open_pipeline(bundle: Bundle) -> Pipeline:
    """The bundle on the CPU, where results do not depend on the machine's card."""
    return FAMILIES[bundle.manifest.family](bundle, choose("cpu"))


@dataclass
class Difference:
    """Sums over the outputs of one component."""

    signal: float = 0.0
    noise: float = 0.0
    equal: int = 0
    counted: int = 0

    def add(self, expected: Mapping[str, Array], found: Mapping[str, Array]) -> None:
        """Compare the outputs of one call: floats by their squares, whole numbers by equality."""
        for name, wanted in expected.items():
            if np.issubdtype(wanted.dtype, np.floating):
                self.signal += float(np.square(wanted, dtype=np.float64).sum())
                self.noise += float(np.square(wanted.astype(np.float64) - found[name]).sum())
            else:
                self.equal += int((wanted == found[name]).sum())
                self.counted += wanted.size

    def merge(self, other: Difference) -> None:
        """Add the sums of another run."""
        self.signal += other.signal
        self.noise += other.noise
        self.equal += other.equal
        self.counted += other.counted

    @property
    def snr_db(self) -> float:
        """Signal-to-noise ratio of the float outputs."""
        return decibel(self.signal, self.noise)

    @property
    def agreement(self) -> float:
        """Share of equal whole numbers."""
        return self.equal / self.counted

    def to_json(self) -> dict[str, float]:
        """What the outputs allow to say, rounded to what it is good for."""
        out = {"snr_db": round(self.snr_db, 2)} if self.signal else {}
        return out | ({"agreement": round(self.agreement, 4)} if self.counted else {})


@dataclass(frozen=True)
class Replay:
    """A recorded run, run again by another bundle."""

    components: Mapping[str, Difference]
    """Each component by itself, on the recorded inputs."""
    forced: Difference
    """Whole-number outputs of the chain: floats come from the components before, whole numbers (tokens) from the
    recording, so that one early difference is not counted again on every later step."""


def replay(pipe: Pipeline, calls: Iterable[Call], progress: Progress) -> Replay:
    """Run recorded calls again, component by component.

    Args:
        pipe: of the bundle to judge.
        calls: in the order they were made.
        progress: told about each component.
    """
    by_component: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        by_component[call.component].append(call)
    alone: dict[str, Difference] = {}
    forced = Difference()
    # What the other bundle made of each recorded array.
    replaced: dict[bytes, Array] = {}
    for i, (name, recorded) in enumerate(by_component.items()):
        progress(f"measuring {name}", i, len(by_component))
        alone[name] = Difference()
        chained = [{k: replaced.get(digest(v), v) for k, v in call.inputs.items()} for call in recorded]
        linked = [any(now[k] is not call.inputs[k] for k in now) for now, call in zip(chained, recorded, strict=True)]
        found = pipe.run_calls(name, [call.inputs for call in recorded])
        again = iter(pipe.run_calls(name, [inputs for inputs, new in zip(chained, linked, strict=True) if new]))
        for call, outputs, is_linked in zip(recorded, found, linked, strict=True):
            alone[name].add(call.outputs, outputs)
            ours = next(again) if is_linked else outputs
            if is_linked:
                forced.add({k: v for k, v in call.outputs.items() if not _is_float(v)}, ours)
            replaced |= {digest(v): ours[k] for k, v in call.outputs.items() if _is_float(v)}
    return Replay(alone, forced)


def record(pipe: Pipeline, prompt: str, seed: int, **settings: Any) -> tuple[list[Call], Result]:
    """Paint, and tell what every component was given and gave; an encoder of pictures is given the result."""
    recorder = Recorder()
    pipe.observer = recorder
    result = pipe(prompt, seed=seed, **settings)
    encode(pipe, result.images[0])
    pipe.observer = None
    return recorder.calls, result


def encode(pipe: Pipeline, picture: Image.Image) -> None:
    """Run the encoder of pictures, if there is one, for those who observe it."""
    manifest = pipe.bundle.manifest
    for encoder in ENCODERS & manifest.components.keys():
        image, factor = from_image(picture), int(manifest.scheduler["codec_factor"])
        strips = strip_count(image.shape[2] // factor, image.shape[3] // factor, factor)
        pipe.run_component(encoder, {"image": image, "strips": np.array([strips])})


def psnr(expected: Image.Image, found: Image.Image) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures in dB."""
    one, other = (np.asarray(image, np.float64) for image in (expected, found))
    return decibel(255.0**2, float(np.square(one - other).mean()))


def decibel(signal: float, noise: float) -> float:
    """Ratio of two powers in dB, at most CEILING_DB."""
    return min(CEILING_DB, 10 * math.log10(signal / noise)) if noise else CEILING_DB


def _is_float(array: Array) -> bool:
    return bool(np.issubdtype(array.dtype, np.floating))
