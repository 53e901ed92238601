"""Arrays to pictures, and pictures to files that tell how they were made."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from pochade.errors import InputRefusedError, OutputError

MAX_PIXELS = 8192 * 8192
"""What the largest picture has that a pipeline paints."""
METADATA_KEY = "pochade"
"""iTXt keyword of the JSON chunk; the A1111-style text is under `parameters`."""


def to_image(pixels: NDArray[np.float32]) -> Image.Image:
    """RGB picture of (3, height, width) in [0, 1], clipped, rounded half to even as the released pipeline does."""
    rounded = np.rint(np.clip(pixels, 0.0, 1.0) * 255.0).astype(np.uint8)
    return Image.fromarray(rounded.transpose(1, 2, 0))


def open_image(path: Path) -> Image.Image:
    """A picture that somebody gives, as RGB, upright.

    Raises:
        InputRefusedError: no PNG, JPEG or WebP picture, a damaged one, or one of too many pixels.
    """
    if not path.is_file():
        raise InputRefusedError(str(path), ["there is no such file; give the path of a picture"])
    try:
        # Formats named, so that a renamed file never reaches one of Pillow's rarer decoders.
        with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputRefusedError(str(path), [f"it has {image.width} x {image.height} pixels; make it smaller"])
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputRefusedError(str(path), [f"it is no intact PNG, JPEG or WebP picture ({error})"]) from None


def from_image(image: Image.Image) -> NDArray[np.float32]:
    """A picture as a codec's encoder reads it, float32 (1, 3, height, width) in 0..1."""
    channels_first: NDArray[np.float32] = np.asarray(image.convert("RGB"), np.float32).transpose(2, 0, 1)[None]
    return np.ascontiguousarray(channels_first / np.float32(255))


def parameters_text(settings: Mapping[str, Any]) -> str:
    """Text that A1111 and its relatives read: prompt, negative prompt, one line of settings."""
    lines = [settings["prompt"]]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    named = {
        "Steps": settings["num_inference_steps"],
        "Sampler": settings["sampler"],
        "CFG scale": settings["guidance_scale"],
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": settings["model"],
        "Version": f"pochade {settings['version']}",
    }
    lines.append(", ".join(f"{key}: {value}" for key, value in named.items()))
    return "\n".join(lines)


def save_image(image: Image.Image, path: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Write a picture in the format of its suffix, whole or not at all.

    Args:
        image: what to write.
        path: target; an existing file is replaced.
        settings: written into a PNG as metadata (iTXt, so Chinese survives); None writes none.

    Raises:
        OutputError: the folder is missing or not writable, the disk is full, or the suffix names no format.
    """
    info = PngInfo()
    if settings is not None:
        info.add_itxt("parameters", parameters_text(settings))
        info.add_itxt(METADATA_KEY, json.dumps(settings, ensure_ascii=False, sort_keys=True))
    suffix = path.suffix.lower()
    extra: dict[str, Any] = {"pnginfo": info} if suffix == ".png" else {}
    if suffix not in Image.registered_extensions():
        raise OutputError(f"cannot write {path}: {suffix or 'no suffix'} names no picture format; use .png")
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=suffix, delete=False) as file:
            temporary = Path(file.name)
            image.save(file, format=Image.registered_extensions()[suffix], **extra)
        with contextlib.suppress(OSError):  # memory cards have no rights to set
            temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OutputError(f"cannot write {path}: {reason}") from None
    finally:
        # Gone under this name once it was renamed; whatever else ended this, Ctrl-C included, leaves nothing.
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    """The process's umask, which a temporary file ignores; reading it means setting it for a moment."""
    value = os.umask(0)
    os.umask(value)
    return value
