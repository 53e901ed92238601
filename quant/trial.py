"""The runs of a model that quantization measures on and calibrates with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from pochade.bundle import Bundle
from pochade.errors import UsageError
from pochade.quant.fidelity import Call, Progress, Recorder, encode, open_pipeline
from pochade.runtime.companion import Companion

SEED = 7
MAX_STEPS = 4
"""Enough to see grids from all masked to nearly done, few enough for a full-size float model on a small machine."""
MAX_SIDE = 512
"""Pixels. At 1024 the float codec alone takes more memory than quantization may (twice the largest component)."""
SMALL_PIXELS = 256 * 256
"""Pictures up to this size are painted with all their steps: what depends on the step's number is seen at each."""
CALIBRATION_PIXELS = 4 * 512 * 512
"""Pictures painted to calibrate have about this many pixels together: four of 512x512, or all prompts when small."""

REHEARSALS = 3
"""Seeds of random numbers that what paints no picture by itself is calibrated with."""

FALLBACK_PROMPTS = ("a photo of a small red house near the lake", "two cats sleeping on a green sofa")
"""For bundles that do not say what their model is asked for."""


def small_settings(bundle: Bundle) -> dict[str, Any]:
    """Size and steps of a measurement: the bundle's own, within the limits above.

    Raises:
        UsageError: of a bundle that paints no pictures.
    """
    defaults = bundle.manifest.defaults
    if "width" not in defaults:
        raise UsageError(f"{bundle.path}, a {bundle.manifest.task}, paints no picture by itself; measure its model")
    sides = {side: min(MAX_SIDE, int(defaults[side])) for side in ("width", "height")}
    steps = int(defaults["num_inference_steps"])
    small = int(defaults["width"]) * int(defaults["height"]) <= SMALL_PIXELS
    return sides | {"num_inference_steps": steps if small else min(MAX_STEPS, steps)}


def typical_prompts(bundle: Bundle) -> Sequence[str]:
    """What people ask of the bundle's model, as its recipe says; at least two."""
    prompts = bundle.manifest.source.get("prompts")
    usable = isinstance(prompts, list) and len(prompts) > 1 and all(isinstance(text, str) for text in prompts)
    return prompts if usable and prompts else FALLBACK_PROMPTS


def record_calibration(
    bundle: Bundle, prompts: Sequence[str], progress: Progress, one: bool = False, encodes: bool = False
) -> Mapping[str, list[Call]]:
    """Runs of every component of a float bundle, by component.

    What paints nothing by itself is given random numbers instead.

    Args:
        bundle: of floats.
        prompts: taken in turn; without any, the typical ones but the first, which measurements use.
        progress: told about each picture.
        one: whether a single picture is enough.
        encodes: whether the encoder of pictures is to be given them.

    Raises:
        UsageError: a prompt is empty, or the bundle reads none.
    """
    if any(not text.strip() for text in prompts):
        raise UsageError("a calibration prompt is empty; give one prompt a line")
    recorder = Recorder()
    pipe = open_pipeline(bundle)
    pipe.observer = recorder
    if isinstance(pipe, Companion):
        if prompts:
            raise UsageError(f"{bundle.path} reads no prompts to calibrate with; leave --calibration away")
        for i in range(REHEARSALS):
            progress("recording the float bundle", i, REHEARSALS)
            pipe.rehearse(SEED + 1 + i)
    else:
        settings = small_settings(bundle)
        texts = list(prompts) or list(typical_prompts(bundle)[1:])
        number = 1 if one else max(1, min(len(texts), CALIBRATION_PIXELS // (settings["width"] * settings["height"])))
        for i, text in enumerate(texts[:number]):
            progress("recording the float bundle", i, number)
            result = pipe(text, seed=SEED + 1 + i, **settings)
            if encodes:
                encode(pipe, result.images[0])
    calls: dict[str, list[Call]] = defaultdict(list)
    for call in recorder.calls:
        calls[call.component].append(call)
    return calls
