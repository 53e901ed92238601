"""Repeating a picture from the settings that it carries."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pochade.bundle import Bundle
from pochade.errors import BundleInvalidError, InputRefusedError, UsageError
from pochade.runtime.expanded import Expand
from pochade.runtime.image import MAX_PIXELS, METADATA_KEY
from pochade.runtime.loading import load
from pochade.runtime.locate import resolve
from pochade.runtime.pipeline import Result, StepEvent
from pochade.strict_json import parse_object

MAX_FILE_BYTES = 512 << 20


@dataclass(frozen=True)
class Repetition:
    """How a picture compares with a second painting from its own settings."""

    identical: bool
    psnr: float | None
    """dB over 8-bit pixels; None when identical."""
    different_pixels: float
    """Share of pixels with any difference."""


def repeat_picture(
    path: Path, model: str | None = None, device: str = "auto", on_step: Callable[[StepEvent], None] | None = None
) -> Repetition:
    """Paint a picture again and compare.

    Args:
        path: PNG file written with metadata.
        model: bundle to paint with; None takes the name in the metadata.
        device: as for `pochade.load`; `auto` stays on the CPU where the picture was painted on one.
        on_step: told after every denoise step.

    Raises:
        InputRefusedError: not a PNG that pochade wrote, or its settings cannot be meant.
        BundleNotFoundError: the bundle is not here.
        BundleInvalidError: the bundle of that name is another one.
    """
    pixels, settings = _read(path)
    folder = resolve(model or str(settings.get("model")))
    if Bundle.open(folder).digest != settings.get("bundle_sha256"):
        raise BundleInvalidError(str(folder), [f"{path} was painted with another bundle; name that one with --model"])
    if device == "auto" and settings.get("device") == "cpu":
        device = "cpu"  # a card rounds otherwise, and its picture is another one in some pixels
    result = _paint(folder, settings, device, on_step, path)
    again = np.asarray(result.images[0])
    if again.shape != pixels.shape:
        raise InputRefusedError(str(path), ["its size is not the one in its settings"])
    error = float(np.square(again.astype(np.float64) - pixels).mean())
    differing = float((again != pixels).any(axis=-1).mean())
    return Repetition(error == 0, 10 * math.log10(255**2 / error) if error else None, differing)


def _paint(
    folder: Path, settings: dict[str, Any], device: str, on_step: Callable[[StepEvent], None] | None, path: Path
) -> Result:
    try:
        prompt = settings.get("prompt")
        if not isinstance(prompt, str):
            raise UsageError("they hold no prompt")
        # Expanded weights round otherwise, by a hair.
        expand: Expand = "on" if settings.get("expanded") is True else "off"
        with load(folder, device=device, expand=expand) as pipe:
            return pipe(prompt, callback_on_step_end=on_step, **pipe.read_settings(settings))
    except (UsageError, TypeError) as error:
        raise InputRefusedError(str(path), [f"its settings cannot be used: {error}"]) from None


def _read(path: Path) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], dict[str, Any]]:
    """Pixels and settings of a picture, from a file that may be anything."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputRefusedError(str(path), [f"it is larger than {MAX_FILE_BYTES >> 20} MiB"])
        # Formats named, so that a renamed file never reaches one of Pillow's rarer decoders.
        with Image.open(path, formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputRefusedError(str(path), [f"it has {image.width} x {image.height} pixels"])
            text = image.info.get(METADATA_KEY)
            if not isinstance(text, str):
                raise InputRefusedError(str(path), ["it carries no settings of pochade; nothing can be repeated"])
            settings = parse_object(text)
            return np.asarray(image.convert("RGB")), settings
    except InputRefusedError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputRefusedError(str(path), [f"it is no intact PNG picture of pochade ({error})"]) from None
