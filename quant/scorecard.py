"""What quantization cost, measured on the inputs that components really get while painting."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pochade.bundle import Bundle
from pochade.runtime.families import FAMILIES
from pochade.runtime.pipeline import Pipeline, Result
from pochade.runtime.providers import choose

PROMPT = "a photo of a small red house near the lake"
SEED = 7
MAX_STEPS = 4
"""Enough to see grids from all masked to nearly done, few enough for a full-size float model on a small machine."""
MAX_SIDE = 512
"""Pixels. At 1024 the float codec alone takes more memory than quantization may (twice the largest component)."""
MAX_CALLS = 4
"""Recorded calls per component, spread over the run."""

Array = NDArray[Any]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Call:
    """Inputs and outputs of one component run."""

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


@dataclass(frozen=True)
class Scorecard:
    """Fidelity of each component and of the whole pipeline."""

    components: Mapping[str, Mapping[str, float]]
    """Per component: `snr_db` over its float outputs, `agreement` over its integer outputs."""
    pipeline: Mapping[str, float]
    """`token_agreement` and `psnr_db` of pictures painted with the same noise."""
    settings: Mapping[str, Any]

    @classmethod
    def measure(cls, reference: Bundle, quantized: Bundle, progress: Progress) -> Scorecard:
        """Paint with both, and feed the reference's component inputs to the quantized components.

        Args:
            reference: the float bundle.
            quantized: the same with quantized components; need not be finished.
            progress: called with what is being measured.
        """
        progress("measuring the float bundle", 0, 0)
        pipe = _pipeline(reference)
        recorder = Recorder()
        pipe.observer = recorder
        defaults = reference.manifest.defaults
        small: dict[str, Any] = {key: min(MAX_SIDE, int(defaults[key])) for key in ("width", "height")}
        small["num_inference_steps"] = min(MAX_STEPS, int(defaults["num_inference_steps"]))
        expected = pipe(PROMPT, seed=SEED, **small)
        calls = dict(recorder.calls)
        if "vq_encoder" in reference.manifest.components:
            calls["vq_encoder"] = [_encode(pipe, expected)]
        pipe = _pipeline(quantized)
        components = {}
        for i, (name, recorded) in enumerate(calls.items()):
            progress(f"measuring {name}", i, len(calls))
            components[name] = _fidelity(pipe, name, recorded)
        progress("measuring the whole pipeline", 0, 0)
        found = pipe(PROMPT, seed=SEED, **small)
        settings = {key: expected.settings[key] for key in ("prompt", "seed", "num_inference_steps", "width", "height")}
        return cls(components, _agreement(expected, found), settings | {"reference": reference.manifest.name})

    def to_manifest(self) -> dict[str, Any]:
        """For `bundle.json`; rounded to what the measurement is good for."""
        return {
            "components": {name: _rounded(values) for name, values in self.components.items()},
            "pipeline": _rounded(self.pipeline),
            "settings": dict(self.settings),
        }


class Recorder:
    """Observer that keeps some calls of every component, the first and then ever sparser ones."""

    def __init__(self) -> None:
        self.calls: dict[str, list[Call]] = defaultdict(list)
        self._seen: dict[str, int] = defaultdict(int)

    def __call__(self, name: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Keep the call when its number is a power of two less one: 0, 1, 3, 7 ..."""
        seen, kept = self._seen[name], self.calls[name]
        if seen & (seen + 1) == 0 and len(kept) < MAX_CALLS:
            kept.append(Call({k: v.copy() for k, v in inputs.items()}, {k: v.copy() for k, v in outputs.items()}))
        self._seen[name] += 1


def _pipeline(bundle: Bundle) -> Pipeline:
    return FAMILIES[bundle.manifest.family](bundle, choose("cpu"))


def _encode(pipe: Pipeline, painted: Result) -> Call:
    image = np.asarray(painted.images[0], np.float32).transpose(2, 0, 1)[None] / 255
    return Call({"image": image}, pipe.run_component("vq_encoder", {"image": image}))


def _fidelity(pipe: Pipeline, name: str, calls: list[Call]) -> dict[str, float]:
    signal = noise = 0.0
    equal = counted = 0
    for call in calls:
        found = pipe.run_component(name, call.inputs)
        for output, expected in call.outputs.items():
            if np.issubdtype(expected.dtype, np.floating):
                signal += float(np.square(expected, dtype=np.float64).sum())
                noise += float(np.square(expected - found[output], dtype=np.float64).sum())
            else:
                equal += int((expected == found[output]).sum())
                counted += expected.size
    values = {"snr_db": decibel(signal, noise)} if signal else {}
    return values | ({"agreement": equal / counted} if counted else {})


def _agreement(expected: Result, found: Result) -> dict[str, float]:
    pixels = [np.asarray(result.images[0], np.float64) for result in (expected, found)]
    values = {"psnr_db": decibel(255.0**2, float(np.square(pixels[0] - pixels[1]).mean()))}
    if expected.tokens:
        values["token_agreement"] = float((expected.tokens[0] == found.tokens[0]).mean())
    return values


def decibel(signal: float, noise: float) -> float:
    """Ratio of two powers in dB; 200 stands for no difference at all, since JSON has no infinity."""
    return min(200.0, 10 * math.log10(signal / noise)) if noise else 200.0


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {key: round(value, 4 if key.endswith("agreement") else 2) for key, value in values.items()}
