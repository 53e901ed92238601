"""Low-rank changes in the files that people exchange: PEFT's, diffusers', Kohya's, and Tencent's own.

A layer's change is s (alpha / rank) B A, with A (rank, inputs) called down and B (outputs, rank) called up (Hu et al.
2021, arXiv 2106.09685, section 4.1); only names differ.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pochade.errors import InputRefusedError
from pochade.runtime.safetensors_file import SafetensorsFile
from pochade.strict_json import parse_object

CONFIG = "adapter_config.json"
"""Lies beside PEFT's files and holds their alpha."""
WEIGHTS = "adapter_model.safetensors"
"""PEFT's name of the file, where a folder is given."""

MAX_CONFIG = 1 << 20

GRADIO = re.compile(r"unet\..+\.lora\.(up|down)\.weight")
"""Keys that Tencent's demo reads; it looks for alpha under a name that never is there, and so divides by sqrt(rank)."""

_ENDINGS = re.compile(
    r"(?P<layer>.+?)\.(?:(?P<down>lora_A|lora_down|lora\.down)|(?P<up>lora_B|lora_up|lora\.up))"
    r"(?:\.[A-Za-z0-9_-]+)?\.weight|(?P<scaled>.+)\.alpha"
)
"""Of keys; between them and `weight` PEFT may name an adapter."""

_OTHER = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "oft_": "OFT",
    "diff": "a full difference",
}
"""Parts of keys of other kinds of change."""


@dataclass(frozen=True)
class LowRank:
    """The change of one layer of the file."""

    down: NDArray[np.float32]
    """(rank, inputs)"""
    up: NDArray[np.float32]
    """(outputs, rank), alpha / rank in it."""
    keys: tuple[str, ...]
    """Of the file."""


@dataclass(frozen=True)
class LoraFile:
    """Everything that a file changes."""

    path: Path
    layers: Mapping[str, LowRank]
    """By the name that the file gives the layer."""
    unknown: tuple[str, ...]
    """Keys that mean nothing here."""

    @classmethod
    def open(cls, path: Path) -> LoraFile:
        """Read a `.safetensors` file, or the folder that PEFT writes.

        Raises:
            InputRefusedError: it is none, or its tensors do not fit together.
        """
        file = SafetensorsFile(path / WEIGHTS if path.is_dir() else path)
        config = _peft_config(file.path.with_name(CONFIG))
        parts: dict[str, dict[str, str]] = defaultdict(dict)
        unknown = []
        for key in file.tensors:
            match = _ENDINGS.fullmatch(key)
            if match is None:
                unknown.append(key)
            elif match["scaled"]:
                parts[match["scaled"]]["alpha"] = key
            else:
                parts[match["layer"]]["down" if match["down"] else "up"] = key
        layers = {name: _low_rank(file, keys, config) for name, keys in parts.items() if {"down", "up"} <= keys.keys()}
        unknown += [key for name, keys in parts.items() if name not in layers for key in keys.values()]
        if not layers:
            raise InputRefusedError(str(file.path), [_why_not(unknown)])
        return cls(file.path, layers, tuple(unknown))


def _why_not(keys: list[str]) -> str:
    kinds = sorted({kind for key in keys for part, kind in _OTHER.items() if part in key})
    if kinds:
        return f"it is {' and '.join(kinds)}, of which only LoRA can be applied; merge it into a checkpoint"
    return f"no pair of LoRA matrices is in it ({', '.join(keys[:3]) or 'it is empty'})"


def _low_rank(file: SafetensorsFile, keys: Mapping[str, str], config: Mapping[str, object]) -> LowRank:
    down, up = (_matrix(file, keys[part]) for part in ("down", "up"))
    rank = len(down)
    if rank == 0 or up.shape[1] != rank:
        shapes = f"{list(down.shape)} and {list(up.shape)}"
        raise InputRefusedError(str(file.path), [f"{keys['down']} and {keys['up']} do not fit: {shapes}"])
    scale = _scale(file, keys, rank, config)
    if not all(np.isfinite(values).all() for values in (down, up)) or not math.isfinite(scale):
        raise InputRefusedError(str(file.path), [f"{keys['down']}, its partner or alpha holds NaN or infinity"])
    return LowRank(down, up * np.float32(scale), tuple(keys.values()))


def _matrix(file: SafetensorsFile, key: str) -> NDArray[np.float32]:
    """A matrix, as which a 1x1 convolution counts."""
    values = file.read(key)
    if values.ndim == 4 and values.shape[2:] == (1, 1):
        values = values[:, :, 0, 0]
    if values.ndim != 2:
        raise InputRefusedError(str(file.path), [f"{key} has the shape {list(values.shape)}, and no matrix's"])
    return values


def _scale(file: SafetensorsFile, keys: Mapping[str, str], rank: int, config: Mapping[str, object]) -> float:
    """What multiplies B A: alpha / rank of the layer or of PEFT's config, 1 where nobody says."""
    if "alpha" in keys:
        alpha = file.read(keys["alpha"])
        if alpha.size != 1:
            raise InputRefusedError(str(file.path), [f"{keys['alpha']} is no single number"])
        return float(alpha.reshape(-1)[0]) / rank
    if GRADIO.match(keys["down"]):
        return 1 / math.sqrt(rank)
    told = _told_alpha(config, keys["down"])
    if told is None:
        return 1.0
    # Kalajdzievski 2023, arXiv 2312.03732, divides by the root.
    return told / math.sqrt(rank) if config.get("use_rslora") is True else told / rank


def _told_alpha(config: Mapping[str, object], key: str) -> float | None:
    """Alpha of a layer as PEFT's config tells it: `alpha_pattern` by the end of the layer's name, else `lora_alpha`."""
    told, patterns = config.get("lora_alpha"), config.get("alpha_pattern")
    match = _ENDINGS.fullmatch(key)
    if isinstance(patterns, dict) and match is not None:
        for pattern, alpha in patterns.items():
            if match["layer"] == pattern or match["layer"].endswith(f".{pattern}"):
                told = alpha
    return float(told) if isinstance(told, int | float) and not isinstance(told, bool) else None


def _peft_config(path: Path) -> Mapping[str, object]:
    """PEFT's config, empty where there is none."""
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as file:
            return parse_object(file.read(MAX_CONFIG).decode())
    except (OSError, ValueError) as error:
        raise InputRefusedError(str(path), [f"it {error}"]) from None
