"""Samples pictures with the starter in PyTorch: masked generation with the published schedule."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from pochade.export.modules.vq import VqConfig, VQModel
from starter.bpe import Tokenizer
from starter.codec import decode_pictures
from starter.codes import GRID, mosaic
from starter.model import MASK, TEXT_LENGTH, Painter


@dataclass(frozen=True)
class Settings:
    """How to sample."""

    steps: int = 16
    guidance: float = 1.5
    temperature: tuple[float, float] = (0.5, 0.0)
    """Confidence noise at the first and the last step."""


def scheduler_step(logits: Tensor, tokens: Tensor, index: int, settings: Settings, rng: torch.Generator) -> Tensor:
    """Tokens (n, cells) after one denoise step on the cosine schedule.

    Args:
        logits: guided logits, float32 (n, cells, codes).
        tokens: tokens before the step, int64 (n, cells), MASK where unknown.
        index: denoise steps done before this one.
        settings: number of steps and temperatures.
        rng: source of the noise.
    """
    unknown = tokens == MASK
    noise = torch.empty_like(logits).exponential_(generator=rng).log()
    drawn = torch.where(unknown, (logits - noise).argmax(-1), tokens)
    if index == settings.steps - 1:
        return drawn
    cells = tokens.shape[1]
    count = math.floor(cells * math.cos((index + 1) / settings.steps * math.pi / 2))
    counts = (unknown.sum(1) - 1).clamp(max=count).clamp(min=1)
    start, end = settings.temperature
    temperature = start + (end - start) * index / (settings.steps - 1)
    gumbel = -torch.empty(tokens.shape).exponential_(generator=rng).log()
    chosen = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
    confidence = torch.where(unknown, chosen, torch.tensor(88.72284)) + temperature * gumbel
    cut = confidence.sort(1).values.gather(1, counts[:, None])
    return torch.where(confidence < cut, MASK, drawn)


def sample_codes(painter: Painter, ids: Tensor, settings: Settings, seed: int) -> Tensor:
    """Code grids int64 (n, GRID, GRID) for padded prompts int64 (n, text length)."""
    rng = torch.Generator().manual_seed(seed)
    n = len(ids)
    # The empty prompt: start, end (the largest id), padding.
    empty = torch.zeros_like(ids)
    empty[:, 0], empty[:, 1] = ids[0, 0], ids.max()
    tokens = torch.full((n, GRID * GRID), MASK)
    guided = settings.guidance > 1
    for index in range(settings.steps):
        grid = tokens.view(n, GRID, GRID)
        step = torch.tensor([settings.steps - 1 - index])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            if guided:
                without, given = painter(torch.cat([grid, grid]), torch.cat([empty, ids]), step).float().chunk(2)
                logits = without + settings.guidance * (given - without)
            else:
                logits = painter(grid, ids, step).float()
        tokens = scheduler_step(logits, tokens, index, settings, rng)
    return tokens.view(n, GRID, GRID)


@dataclass
class TorchPictures:
    """A picture source for `starter.evaluate`: prompts and seeds in, pictures out."""

    painter: Painter
    tokenizer: Tokenizer
    codec: VQModel | None
    """Without one, pictures are rough mosaics of the codes' mean patches."""
    settings: Settings
    batch: int = 32

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[NDArray[np.uint8]]:
        """Pictures uint8 (SIDE, SIDE, 3). Only the first seed of each batch is used, for speed."""
        pictures: list[NDArray[np.uint8]] = []
        for i in range(0, len(prompts), self.batch):
            ids = torch.from_numpy(self.tokenizer(prompts[i : i + self.batch]))
            codes = sample_codes(self.painter, ids, self.settings, seeds[i])
            if self.codec is None:
                pictures += [mosaic(grid.numpy()) for grid in codes]
            else:
                pictures += decode_pictures(self.codec, codes)
        return pictures


def load_pictures(folder: Path, settings: Settings) -> TorchPictures:
    """The picture source of a checkpoint folder in the published layout."""
    lines = (folder / "tokenizer" / "merges.txt").read_text("utf-8").splitlines()[1:]
    tokenizer = Tokenizer([(a, b) for a, b in (line.split(" ") for line in lines)], TEXT_LENGTH)
    config = json.loads((folder / "transformer" / "config.json").read_text("utf-8"))
    dim = config["attention_head_dim"] * config["num_attention_heads"]
    painter = Painter(len(tokenizer.ids), dim, config["num_layers"], config["num_single_layers"])
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    painter.transformer.load_state_dict(weights)
    painter.text.load_state_dict(load_file(folder / "text_encoder" / "model.safetensors"))
    values = json.loads((folder / "vqvae" / "config.json").read_text("utf-8"))
    codec = VQModel(VqConfig.from_dict(values))
    codec.load_state_dict(load_file(folder / "vqvae" / "diffusion_pytorch_model.safetensors"))
    return TorchPictures(painter.eval(), tokenizer, codec.eval(), settings)
