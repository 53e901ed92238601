"""The codes of a picture: a patch-local code book and the exact code grid of a scene.

A patch is a covered colour, a bare colour and a coverage between them, so the book is a product:
flat colours; then every (object colour, background, edge prototype); then the marks of faces in
every colour; then decorations. Edge prototypes are k-means centres of the 8x8 coverage patches of
all shapes, and the roof's two. Equal patches always get equal codes, and the same edge has the
same prototype in every colour: the transformer learns a shape once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pochade.starter.draw import random_scene
from pochade.starter.scenes import Figure, Fill, Mark, Scene, parts
from pochade.starter.shapes import (
    BACKGROUNDS,
    CELL,
    COLOURS,
    DECORATIONS,
    FACE_MARKS,
    FLATS,
    GRID,
    SHAPES,
    SIZES,
    Mask,
    Rgb,
    coverage,
    face_ink,
    marks,
    roof,
)

PROTOTYPES = 22
"""Edge prototypes, the roof's two slopes among them."""

VECTOR = 20
"""Width of a code vector."""

Codes = NDArray[np.int64]


def patches(mask: Mask) -> Mask:
    """A mask (h, w) cut into cells, float32 (h/8, w/8, 64)."""
    h, w = mask.shape[0] // CELL, mask.shape[1] // CELL
    return mask.reshape(h, CELL, w, CELL).transpose(0, 2, 1, 3).reshape(h, w, CELL * CELL)


def _is_edge(cells: Mask) -> NDArray[np.bool_]:
    """Cells that are neither covered nor bare, over the last axis."""
    partly: NDArray[np.bool_] = (cells.max(-1) > 0.02) & (cells.min(-1) < 0.98)
    return partly


def _kmeans(points: Mask, k: int, rng: np.random.Generator) -> tuple[float, Mask]:
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


def _edges(masks: list[Mask]) -> Mask:
    """The different edge patches of the masks, float32 (n, 64)."""
    cells = np.concatenate([patches(mask).reshape(-1, CELL * CELL) for mask in masks])
    return np.unique(cells[_is_edge(cells)].round(4), axis=0)


@cache
def prototypes() -> Mask:
    """Edge prototypes, coverage in 0..1, float32 (PROTOTYPES, 64); the same on every call."""
    slopes = _edges([roof()])
    edges = _edges([coverage(shape, size) for shape in SHAPES for size in SIZES])
    rng = np.random.default_rng(0)
    runs = (_kmeans(edges, PROTOTYPES - len(slopes), rng) for _ in range(20))
    return np.concatenate([min(runs, key=lambda run: run[0])[1], slopes])


@dataclass(frozen=True)
class Book:
    """What the codes stand for, built once."""

    index: dict[tuple[str, str, str], int]
    """Code of (covered, bare, patch): names of colours or inks, and "flat", "edge N" or a mark."""
    colours: dict[str, Rgb]
    """Every colour a code can hold, by the name used in `index`."""
    coverages: dict[str, Mask]
    """Coverage of every patch but "flat", float32 (64)."""


def _ink_name(ink: Rgb) -> str:
    """Name of an ink: a palette colour's if it is one, else its numbers."""
    return next((name for name, rgb in FLATS.items() if rgb == ink), str(ink))


@cache
def book() -> Book:
    """The code book's meaning."""
    keys = [(name, name, "flat") for name in FLATS]
    keys += [(c, b, f"edge {p}") for c in COLOURS for b in BACKGROUNDS for p in range(PROTOTYPES)]
    keys += [(_ink_name(face_ink(c)), c, mark) for c in COLOURS for mark in FACE_MARKS]
    keys += [(_ink_name(ink), b, mark) for b, table in DECORATIONS.items() for mark, ink in table.values()]
    inks = {_ink_name(ink): ink for table in DECORATIONS.values() for _, ink in table.values()}
    coverages = {f"edge {i}": patch for i, patch in enumerate(prototypes())}
    coverages |= {name: mask.ravel() for name, mask in marks().items()}
    return Book({key: i for i, key in enumerate(keys)}, {**FLATS, **inks}, coverages)


USED = len(book().index)
"""Codes that scenes can hold."""

CODEBOOK = -(-USED // 64) * 64
"""Entries of the code book; the few above USED stay unused."""

FLAT = len(FLATS)
"""The first codes are flat."""


@cache
def _stencil(mask_bytes: bytes, shape: tuple[int, int]) -> tuple[NDArray[np.bool_], NDArray[np.bool_], Codes]:
    """Which cells of a mask are covered, which are edges, and the edges' prototypes; (h/8, w/8)."""
    cells = patches(np.frombuffer(mask_bytes, np.float32).reshape(shape))
    edge = _is_edge(cells)
    nearest = ((cells[:, :, None] - prototypes()) ** 2).sum(-1).argmin(-1)
    return ~edge & (cells.mean(-1) > 0.5), edge, nearest


def scene_codes(scene: Scene) -> Codes:
    """The codes of a scene's picture, int64 (GRID, GRID)."""
    index = book().index
    grid = np.empty((GRID, GRID), np.int64)
    for part in parts(scene):
        match part:
            case Fill(colour, top, left, height, width):
                grid[top : top + height, left : left + width] = index[colour, colour, "flat"]
            case Figure(colour, behind, top, left, mask):
                covered, edge, prototype = _stencil(mask.tobytes(), mask.shape)
                box = grid[top : top + len(edge), left : left + edge.shape[1]]
                box[covered] = index[colour, colour, "flat"]
                box[edge] = index[colour, behind, "edge 0"] + prototype[edge]
            case Mark(name, ink, behind, row, column):
                grid[row, column] = index[_ink_name(ink), behind, name]
    return grid


def factors() -> tuple[Codes, tuple[int, int, int]]:
    """What each code is made of, to let codes share what they learn.

    Returns:
        Numbers of the covered colour, the bare colour and the patch of each code, int64
        (CODEBOOK, 3), and how many of each there are. Unused codes have numbers of their own.
    """
    meaning = book()
    colours, kinds = list(meaning.colours), ["flat", *meaning.coverages]
    out = np.empty((CODEBOOK, 3), np.int64)
    out[:] = len(colours), len(colours), len(kinds)
    for (front, behind, patch), code in meaning.index.items():
        out[code] = colours.index(front), colours.index(behind), kinds.index(patch)
    return out, (len(colours) + 1, len(colours) + 1, len(kinds) + 1)


@cache
def unseen_codes(scenes: int = 20_000) -> Codes:
    """Codes that training scenes do not hold though other scenes do; of a sample that is the same on every call."""
    rng = np.random.default_rng(0)
    seen = np.zeros(CODEBOOK, bool)
    for _ in range(scenes):
        seen[scene_codes(random_scene(rng))] = True
    return np.flatnonzero(~seen[:USED])


def colour_scale() -> tuple[NDArray[np.float64], float]:
    """Middle (3) and spread of all flat colours: a colour c stands in a code vector as (c - middle) / spread."""
    flat = np.array(list(FLATS.values()), np.float64)
    return flat.mean(0), float(flat.std())


@cache
def code_vectors() -> NDArray[np.float32]:
    """The code book, float32 (CODEBOOK, VECTOR): covered colour, bare colour, shape of the edge.

    Each number has about unit variance. A flat patch has both colours equal and edge zero.
    """
    meaning = book()
    middle, spread = colour_scale()
    shapes = np.stack(list(meaning.coverages.values())).astype(np.float64)
    left, _, _ = np.linalg.svd(shapes - shapes.mean(0), full_matrices=False)
    edge = dict(zip(meaning.coverages, left[:, : VECTOR - 6] * np.sqrt(len(shapes)), strict=True))
    # Unused codes lie far outside, so that no latent is ever nearest to them.
    out = np.full((CODEBOOK, VECTOR), 10.0)
    for (front, behind, patch), code in meaning.index.items():
        ends = np.array([*meaning.colours[front], *meaning.colours[behind]], np.float64)
        out[code, :6] = (ends - np.tile(middle, 2)) / spread
        out[code, 6:] = edge.get(patch, 0)
    return out.astype(np.float32)
