"""Scenes of flat coloured shapes: what can be drawn, random scenes, and their exact pictures.

A scene is built so that its caption nearly determines the picture: objects sit on a 16-pixel
lattice, whatever the caption leaves out has a fixed default, and nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

SIDE = 128
"""Width and height of a picture in pixels."""

CELL = 8
"""Width of one token cell in pixels."""

LATTICE = 16
"""Spacing of object centres in pixels: two cells, so a shape always meets the transformer's
2x2 down-sampler in the same phase and has to be learned once instead of four times."""

SHAPES = ("circle", "square", "triangle", "star", "heart", "moon", "ring", "cross")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 38, 38),
    "green": (34, 160, 66),
    "blue": (37, 80, 230),
    "yellow": (250, 208, 30),
    "orange": (246, 126, 20),
    "purple": (132, 44, 176),
    "black": (20, 20, 20),
    "pink": (250, 130, 190),
}

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "gray": (176, 178, 184),
    "light blue": (170, 214, 246),
    "light green": (184, 236, 190),
    "beige": (240, 222, 186),
    "brown": (116, 80, 54),
}

SIZES: dict[str, int] = {"large": 40, "small": 24}
"""Half the width of an object's box in pixels; whole cells, so patches repeat exactly."""

KINDS = ("single", "relation", "count")

Pair = tuple[str, str]
"""A colour and a shape."""


@dataclass(frozen=True)
class Thing:
    """One object: what it is and where its centre lies, in pixels from the top left."""

    colour: str
    shape: str
    size: str
    x: int
    y: int


@dataclass(frozen=True)
class Scene:
    """A background and one to three objects."""

    kind: str
    """One of KINDS. Relations have two different objects, counts two or three equal ones."""
    things: tuple[Thing, ...]
    """For a relation, the left or upper object first."""
    background: str = "white"
    axis: str = ""
    """For a relation, "x" (left to right) or "y" (top to bottom)."""


def _inside(shape: str, r: float, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points (pixels from the centre, y down) lie inside a shape of half-width r."""
    radius = np.hypot(x, y)
    match shape:
        case "circle":
            return radius <= r - 1
        case "ring":
            return (radius <= r - 1) & (radius >= 0.55 * r)
        case "moon":
            return (radius <= r - 1) & (np.hypot(x - 0.48 * r, y) >= 0.8 * r)
        case "square":
            # Whole cells: 8 of 10 for large, 4 of 6 for small.
            return np.maximum(abs(x), abs(y)) <= r - CELL
        case "cross":
            arm = 2 * CELL if r > 3 * CELL else CELL
            return (np.minimum(abs(x), abs(y)) <= arm) & (np.maximum(abs(x), abs(y)) <= r)
        case "triangle":
            # Slope 2, so a side needs only two kinds of patches.
            return (2 * abs(x) <= y + r) & (y <= r)
        case "heart":
            u, v = x / (0.86 * r), -(y - 0.06 * r) / (0.86 * r)
            return (u * u + v * v - 1) ** 3 - u * u * v**3 <= 0
        case "star":
            # A point is inside when it lies under the edge of its own tenth of the star.
            turn = np.mod(np.arctan2(x, -y), 2 * np.pi / 5)
            turn = np.minimum(turn, 2 * np.pi / 5 - turn)
            inner, half = 0.48, np.pi / 5
            # Line from the tip (1, angle 0) to the notch (inner, angle half), in tip coordinates.
            px, py = radius * np.cos(turn) / r, radius * np.sin(turn) / r
            nx, ny = inner * np.cos(half), inner * np.sin(half)
            below: NDArray[np.bool_] = (px - 1) * ny - py * (nx - 1) <= 0
            return below
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


@cache
def coverage(shape: str, size: str) -> NDArray[np.float32]:
    """Share of each pixel that the shape covers, float32 in 0..1, (2r, 2r) for half-width r."""
    r, fine = SIZES[size], 8
    axis = (np.arange(2 * r * fine) + 0.5) / fine - r
    hit = _inside(shape, float(r), axis[None, :], axis[:, None])
    mask: NDArray[np.float32] = hit.reshape(2 * r, fine, 2 * r, fine).mean(axis=(1, 3)).astype(np.float32)
    mask.setflags(write=False)
    return mask


def render(scene: Scene) -> NDArray[np.uint8]:
    """The exact picture of a scene, uint8 RGB (SIDE, SIDE, 3)."""
    picture = np.empty((SIDE, SIDE, 3), np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        r = SIZES[thing.size]
        mask = coverage(thing.shape, thing.size)[..., None]
        box = picture[thing.y - r : thing.y + r, thing.x - r : thing.x + r]
        box += mask * (np.array(COLOURS[thing.colour], np.float32) - box)
    return np.rint(picture).astype(np.uint8)


def all_pairs(held_out: Collection[Pair] = ()) -> list[Pair]:
    """Every (colour, shape) but the held-out ones."""
    return [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in held_out]


def single(pair: Pair, rng: np.random.Generator, size: str = "large", background: str = "white") -> Scene:
    """One object within one lattice step of the centre."""
    x, y = (int(SIDE // 2 + LATTICE * rng.integers(-1, 2)) for _ in range(2))
    return Scene("single", (Thing(*pair, size, x, y),), background)


def relation(first: Pair, second: Pair, axis: str, rng: np.random.Generator, background: str = "white") -> Scene:
    """Two small objects, the first to the left of (axis x) or above (axis y) the second."""
    across = int(SIDE // 2 + LATTICE * rng.integers(-1, 2))
    spots = [(32, across), (96, across)] if axis == "x" else [(across, 32), (across, 96)]
    things = tuple(Thing(*pair, "small", *spot) for pair, spot in zip((first, second), spots, strict=True))
    return Scene("relation", things, background, axis)


def count(pair: Pair, number: int, background: str = "white") -> Scene:
    """Two small equal objects side by side, or three in a triangle."""
    spots = {2: [(32, 64), (96, 64)], 3: [(64, 32), (32, 96), (96, 96)]}[number]
    return Scene("count", tuple(Thing(*pair, "small", *spot) for spot in spots), background)


def random_scene(
    rng: np.random.Generator,
    weights: tuple[float, float, float] = (0.6, 0.25, 0.15),
    held_out: Collection[Pair] = (),
) -> Scene:
    """A random scene; `weights` are the shares of KINDS, `held_out` pairs never appear."""
    pairs = all_pairs(held_out)
    background = "white" if rng.random() < 0.5 else list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    first = pairs[rng.integers(len(pairs))]
    kind = KINDS[int(np.searchsorted(np.cumsum(weights), rng.random() * sum(weights), side="right"))]
    if kind == "single":
        return single(first, rng, "small" if rng.random() < 0.3 else "large", background)
    if kind == "count":
        return count(first, int(rng.integers(2, 4)), background)
    second = first
    while second == first:
        second = pairs[rng.integers(len(pairs))]
    return relation(first, second, "xy"[rng.integers(2)], rng, background)
