"""Files of random weights, drawn as they are written: a file of gigabytes takes a few hundred megabytes of memory."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SAFETENSORS_NAMES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}

CHUNK = 1 << 24
"""Numbers drawn at a time."""

TABLES = ("embedding", "shared", "relative")
"""What stands in the names of weights that are looked up rather than multiplied."""


def spread(name: str, shape: Sequence[int]) -> tuple[float, float]:
    """Mean and deviation of a weight that let a deep network's numbers stay finite."""
    lower = name.lower()
    if len(shape) == 1:
        # Norm gains around 1, biases around 0.
        return (1.0 if "norm" in lower and lower.endswith("weight") else 0.0), 0.02
    if any(part in lower for part in TABLES):
        return 0.0, 1.0
    # T5's queries carry the scale that its attention leaves out.
    narrow = 64.0 if name.endswith("SelfAttention.q.weight") else 1.0
    return 0.0, (math.prod(shape[1:]) * narrow) ** -0.5


def save_random(
    folder: Path, stem: str, module: nn.Module, dtype: str, shards: int, generator: torch.Generator
) -> None:
    """Write random weights of a module as safetensors, named as published.

    Args:
        folder: to be made.
        stem: of the file names.
        module: whose names and shapes count; may be on the meta device.
        dtype: key of DTYPES.
        shards: files; more than one adds the index that published sharded checkpoints have.
        generator: of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    files = [f"{stem}-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    if shards == 1:
        files = [f"{stem}.safetensors"]
    places = {name: files[i % shards] for i, name in enumerate(shapes)}
    for file in files:
        _write(folder / file, {name: shape for name, shape in shapes.items() if places[name] == file}, dtype, generator)
    if shards > 1:
        index = json.dumps({"metadata": {}, "weight_map": places})
        (folder / f"{stem}.safetensors.index.json").write_text(index, encoding="utf-8")


def _write(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, generator: torch.Generator) -> None:
    """One file: the length of the header, the header, and the tensors without gaps."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            mean, deviation = spread(name, shape)
            for numbers in _draws(math.prod(shape), generator):
                _append(file, numbers.mul_(deviation).add_(mean).to(DTYPES[dtype]))


def _draws(count: int, generator: torch.Generator) -> Iterator[Tensor]:
    for start in range(0, count, CHUNK):
        yield torch.randn(min(CHUNK, count - start), generator=generator)


def _append(file: BinaryIO, numbers: Tensor) -> None:
    file.write(numbers.view(torch.uint8).numpy().data)
