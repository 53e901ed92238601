"""The codes of a picture: a patch-local code book and the exact code grid of a scene.

A patch is either one flat colour or the edge of one object on one background, so the book is a
product: flat colours, then every (object colour, background, edge prototype). Prototypes are
k-means centres of the 8x8 coverage patches of all shapes. Equal patches always get equal codes,
and the same edge has the same prototype in every colour: the transformer learns a shape once.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from starter.scenes import BACKGROUNDS, CELL, COLOURS, SHAPES, SIDE, SIZES, Scene, coverage

CODEBOOK = 1024
GRID = SIDE // CELL
"""Cells along a side."""

FLAT = len(COLOURS) + len(BACKGROUNDS)
"""Flat codes: the object colours, then the backgrounds."""

PROTOTYPES = (CODEBOOK - FLAT) // (len(COLOURS) * len(BACKGROUNDS))
USED = FLAT + len(COLOURS) * len(BACKGROUNDS) * PROTOTYPES
"""Codes that scenes can hold; the few above it stay unused."""

VECTOR = 16
"""Width of a code vector."""

_OUTSIDE, _INSIDE = -1, -2


def patches(mask: NDArray[np.float32]) -> NDArray[np.float32]:
    """A mask (h, w) cut into cells, float32 (h/8, w/8, 64)."""
    h, w = mask.shape[0] // CELL, mask.shape[1] // CELL
    return mask.reshape(h, CELL, w, CELL).transpose(0, 2, 1, 3).reshape(h, w, CELL * CELL)


def _is_edge(cells: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Cells that are neither covered nor bare, over the last axis."""
    partly: NDArray[np.bool_] = (cells.max(-1) > 0.02) & (cells.min(-1) < 0.98)
    return partly


def _kmeans(points: NDArray[np.float32], k: int, rng: np.random.Generator) -> tuple[float, NDArray[np.float32]]:
    """Squared error and centres (k, d) of one k-means run from a k-means++ start."""
    centres = points[rng.integers(len(points))][None]
    while len(centres) < k:
        nearest = ((points[:, None] - centres) ** 2).sum(-1).min(1)
        centres = np.concatenate([centres, points[rng.choice(len(points), p=nearest / nearest.sum())][None]])
    for _ in range(50):
        distance = ((points[:, None] - centres) ** 2).sum(-1)
        label = distance.argmin(1)
        centres = np.stack([points[label == j].mean(0) if (label == j).any() else centres[j] for j in range(k)])
    return float(distance.min(1).sum()), centres


@cache
def prototypes() -> NDArray[np.float32]:
    """Edge prototypes, coverage in 0..1, float32 (PROTOTYPES, 64); the same on every call."""
    cells = np.concatenate([patches(coverage(s, z)).reshape(-1, CELL * CELL) for s in SHAPES for z in SIZES])
    edges = np.unique(cells[_is_edge(cells)].round(4), axis=0)
    rng = np.random.default_rng(0)
    return min((_kmeans(edges, PROTOTYPES, rng) for _ in range(20)), key=lambda run: run[0])[1]


@cache
def _stencil(shape: str, size: str) -> NDArray[np.int64]:
    """Per cell of a shape's box the prototype, or _OUTSIDE or _INSIDE; int64 (2r/8, 2r/8)."""
    cells = patches(coverage(shape, size))
    nearest = ((cells[:, :, None] - prototypes()) ** 2).sum(-1).argmin(-1)
    return np.where(_is_edge(cells), nearest, np.where(cells.mean(-1) > 0.5, _INSIDE, _OUTSIDE))


def scene_codes(scene: Scene) -> NDArray[np.int64]:
    """The codes of a scene's picture, int64 (GRID, GRID)."""
    behind = list(BACKGROUNDS).index(scene.background)
    grid = np.full((GRID, GRID), len(COLOURS) + behind, np.int64)
    for thing in scene.things:
        colour = list(COLOURS).index(thing.colour)
        stencil = _stencil(thing.shape, thing.size)
        r = SIZES[thing.size]
        top, left = (thing.y - r) // CELL, (thing.x - r) // CELL
        box = grid[top : top + len(stencil), left : left + len(stencil)]
        first = FLAT + (colour * len(BACKGROUNDS) + behind) * PROTOTYPES
        box[...] = np.where(stencil >= 0, first + stencil, np.where(stencil == _INSIDE, colour, box))
    return grid


@cache
def code_pictures() -> NDArray[np.float32]:
    """The mean patch of every code, float32 0..255, (CODEBOOK, 8, 8, 3); unused codes are black."""
    front = np.array(list(COLOURS.values()), np.float32)
    behind = np.array(list(BACKGROUNDS.values()), np.float32)
    alpha = prototypes()[..., None]
    edge = front[:, None, None, None] * alpha + behind[None, :, None, None] * (1 - alpha)
    flat = np.broadcast_to(np.concatenate([front, behind])[:, None], (FLAT, CELL * CELL, 3))
    out = np.zeros((CODEBOOK, CELL, CELL, 3), np.float32)
    out[:USED] = np.concatenate([flat, edge.reshape(-1, CELL * CELL, 3)]).reshape(USED, CELL, CELL, 3)
    return out


def mosaic(codes: NDArray[np.int64]) -> NDArray[np.uint8]:
    """A rough picture: each code's mean patch, uint8 (8h, 8w, 3) from codes (h, w)."""
    h, w = codes.shape
    tiles = code_pictures()[codes].transpose(0, 2, 1, 3, 4)
    return np.rint(tiles.reshape(h * CELL, w * CELL, 3)).astype(np.uint8)


def colour_scale() -> tuple[NDArray[np.float64], float]:
    """Middle (3) and spread of all flat colours: a colour c stands in a code vector as (c - middle) / spread."""
    flat = np.array([*COLOURS.values(), *BACKGROUNDS.values()], np.float64)
    return flat.mean(0), float(flat.std())


@cache
def code_vectors() -> NDArray[np.float32]:
    """The code book, float32 (CODEBOOK, VECTOR): covered colour, bare colour, shape of the edge.

    Each number has about unit variance. A flat patch has both colours equal and edge zero.
    """
    front = np.array(list(COLOURS.values()), np.float64)
    behind = np.array(list(BACKGROUNDS.values()), np.float64)
    flat = np.concatenate([front, behind])
    middle, spread = colour_scale()
    edge = prototypes().astype(np.float64)
    edge = edge - edge.mean(0)
    left, _, _ = np.linalg.svd(edge, full_matrices=False)
    edge = left[:, : VECTOR - 6] * np.sqrt(PROTOTYPES)
    # Unused codes lie far outside, so that no latent is ever nearest to them.
    out = np.full((CODEBOOK, VECTOR), 10.0)
    out[:FLAT] = np.concatenate([flat, flat, np.zeros((FLAT, VECTOR - 6))], axis=1)
    shape = (len(front), len(behind), PROTOTYPES)
    out[FLAT:USED, :3] = np.broadcast_to(front[:, None, None], (*shape, 3)).reshape(-1, 3)
    out[FLAT:USED, 3:6] = np.broadcast_to(behind[None, :, None], (*shape, 3)).reshape(-1, 3)
    out[FLAT:USED, 6:] = np.broadcast_to(edge, (*shape, VECTOR - 6)).reshape(-1, VECTOR - 6)
    out[:USED, :6] = (out[:USED, :6] - np.tile(middle, 2)) / spread
    return out.astype(np.float32)
