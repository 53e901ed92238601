"""Values that a call is given, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pochade.errors import UsageError
from pochade.runtime.tokenizer import check_prompt

MAX_SIDE = 8192
MAX_STEPS = 1000
MAX_IMAGES = 1000
MAX_GUIDANCE = 1000.0
MAX_TEMPERATURE = 100.0


def check_whole(name: str, value: Any, least: int, most: int) -> None:
    """Whether a value is a whole number within its limits.

    Raises:
        UsageError: it is not.
    """
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not least <= value <= most:
        raise UsageError(f"{name} is {value!r}; it must be a whole number from {least} to {most}")


def check_number(name: str, value: Any, least: float, most: float) -> None:
    """Whether a value is a finite number within its limits.

    Raises:
        UsageError: it is not.
    """
    if not isinstance(value, int | float | np.number) or not math.isfinite(value) or not least <= value <= most:
        raise UsageError(f"{name} is {value!r}; it must be a number from {least:g} to {most:g}")


def check_side(name: str, value: Any, multiple: int) -> None:
    """Whether a picture's side is a whole number of the model's cells.

    Raises:
        UsageError: it is not; names the sides next to it.
    """
    check_whole(name, value, multiple, MAX_SIDE)
    if value % multiple:
        below = value // multiple * multiple
        near = f"{below} or {below + multiple}" if below else str(multiple)
        raise UsageError(f"{name} {value} is not a multiple of {multiple}; use {near}")


def read_prompts(prompt: str | Sequence[str], negative: str | Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Prompts and as many negative prompts.

    Raises:
        UsageError: there is no prompt, their numbers differ, or one cannot be encoded.
    """
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    negatives = (negative,) * len(prompts) if isinstance(negative, str) else tuple(negative)
    if not prompts or not all(text.strip() for text in prompts):
        raise UsageError("the prompt is empty; say what to paint")
    if len(negatives) != len(prompts):
        raise UsageError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one each")
    for text in prompts:
        check_prompt(text)
    for text in negatives:
        check_prompt(text, "negative prompt")
    return prompts, negatives


def read_temperatures(value: Any) -> tuple[float, float]:
    """Temperature of the first and of the last step; a single number falls to 0.01, as in the released scheduler.

    Raises:
        UsageError: neither a number nor two.
    """
    first, last = value if isinstance(value, list | tuple) and len(value) == 2 else (value, 0.01)
    for number in (first, last):
        check_number("temperature", number, 0.0, MAX_TEMPERATURE)
    return float(first), float(last)
