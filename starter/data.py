"""Training batches: scenes drawn on the fly as code grids, captions, masks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pochade.starter.bpe import Tokenizer, caption_merges
from pochade.starter.captions import caption
from pochade.starter.codes import scene_codes
from pochade.starter.draw import random_scene
from pochade.starter.model import MASK, TEXT_LENGTH
from pochade.starter.scenes import Scene
from pochade.starter.shapes import GRID
from pochade.starter.words import chinese_words, english_words

CELLS = GRID * GRID
STEPS = 64
"""Step numbers seen in training, 0 to STEPS - 1."""


def starter_tokenizer() -> Tokenizer:
    """The starter's tokenizer: every word of its captions is one token."""
    return Tokenizer(caption_merges(english_words(), chinese_words()), TEXT_LENGTH)


@dataclass(frozen=True)
class Batch:
    """One training batch of n pictures."""

    tokens: Tensor
    """Partly masked grids, int64 (n, GRID, GRID)."""
    ids: Tensor
    """Padded prompts, int64 (n, TEXT_LENGTH)."""
    steps: Tensor
    """Random step numbers, int64 (n)."""
    cells: Tensor
    """Row-major indices of the cells the loss looks at, int64 (n, k)."""
    targets: Tensor
    """Their true codes, int64 (n, k)."""
    weights: Tensor
    """Their weights in the loss, float32 (n, k); they add up to 1."""


def mask_counts(
    n: int, rng: np.random.Generator, full_share: float = 0.4
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Masked cells per picture, int (n): a share nearly full, the rest on the cosine schedule."""
    ratio = np.cos(rng.random(n) * np.pi / 2)
    full = rng.random(n) < full_share
    ratio[full] = 0.98 + 0.02 * rng.random(int(full.sum()))
    counts: np.ndarray[tuple[int], np.dtype[np.int64]] = np.maximum(1, np.ceil(ratio * CELLS)).astype(np.int64)
    return counts


@dataclass
class Batches:
    """An endless source of batches from one random generator."""

    tokenizer: Tokenizer
    rng: np.random.Generator
    size: int = 64
    loss_cells: int = 64
    """Most masked cells per picture that the loss looks at."""
    empty_share: float = 0.1
    """Share of pictures with an empty caption, for guidance."""
    chinese_share: float = 0.3

    def text(self, scene: Scene) -> str:
        """A random caption of the scene, sometimes empty."""
        if self.rng.random() < self.empty_share:
            return ""
        return caption(scene, self.rng, "zh" if self.rng.random() < self.chinese_share else "en")

    def next(self) -> Batch:
        """The next batch."""
        rng, n = self.rng, self.size
        scenes = [random_scene(rng) for _ in range(n)]
        codes = np.stack([scene_codes(scene) for scene in scenes]).reshape(n, CELLS)
        counts = mask_counts(n, rng)
        order = rng.random((n, CELLS)).argsort(1)
        tokens = codes.copy()
        np.put_along_axis(
            tokens, order, np.where(np.arange(CELLS) < counts[:, None], MASK, np.take_along_axis(codes, order, 1)), 1
        )
        cells = order[:, : self.loss_cells]
        used = np.arange(cells.shape[1]) < counts[:, None]
        weights = used / used.sum(1, keepdims=True) / n
        return Batch(
            tokens=torch.from_numpy(tokens).view(n, GRID, GRID),
            ids=torch.from_numpy(self.tokenizer([self.text(scene) for scene in scenes])),
            steps=torch.from_numpy(rng.integers(0, STEPS, n)),
            cells=torch.from_numpy(cells.copy()),
            targets=torch.from_numpy(np.take_along_axis(codes, cells, 1)),
            weights=torch.from_numpy(weights.astype(np.float32)),
        )
