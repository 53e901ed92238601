"""What pictures are made of: colours, backgrounds, shapes with exact coverage, and small marks."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

SIDE = 128
"""Width and height of a picture in pixels."""

CELL = 8
"""Width of one token cell in pixels."""

GRID = SIDE // CELL
"""Cells along a side."""

LATTICE = 16
"""Spacing of object centres in pixels: two cells, so a shape always meets the transformer's
2x2 down-sampler in the same phase and has to be learned once instead of four times."""

SHAPES = ("circle", "square", "triangle", "star", "heart", "moon", "ring", "cross")

Rgb = tuple[int, int, int]

COLOURS: dict[str, Rgb] = {
    "red": (220, 38, 38),
    "green": (34, 160, 66),
    "blue": (37, 80, 230),
    "yellow": (250, 208, 30),
    "orange": (246, 126, 20),
    "purple": (132, 44, 176),
    "black": (20, 20, 20),
    "pink": (250, 130, 190),
}

BACKGROUNDS: dict[str, Rgb] = {
    "white": (255, 255, 255),
    "gray": (176, 178, 184),
    "light blue": (170, 214, 246),
    "light green": (184, 236, 190),
    "beige": (240, 222, 186),
    "dark blue": (26, 40, 104),
}

FLATS: dict[str, Rgb] = {**COLOURS, **BACKGROUNDS, "brown": (122, 82, 50)}
"""Every colour that can fill a whole cell; brown is for trunks and doors."""

SIZES: dict[str, int] = {"large": 40, "small": 24}
"""Half the width of an object's box in pixels; whole cells, so patches repeat exactly."""

Mask = NDArray[np.float32]


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


def _fine_axis(pixels: int, fine: int) -> NDArray[np.float64]:
    """Sample points of a span of pixels, `fine` to the pixel, counted from its middle."""
    return (np.arange(pixels * fine) + 0.5) / fine - pixels / 2


def _shares(hit: NDArray[np.bool_], fine: int) -> Mask:
    """Share of each pixel that is hit, float32 in 0..1, read-only."""
    h, w = hit.shape[0] // fine, hit.shape[1] // fine
    mask: Mask = hit.reshape(h, fine, w, fine).mean(axis=(1, 3)).astype(np.float32)
    mask.setflags(write=False)
    return mask


@cache
def coverage(shape: str, size: str) -> Mask:
    """Share of each pixel that the shape covers, float32 in 0..1, (2r, 2r) for half-width r."""
    r, fine = SIZES[size], 8
    axis = _fine_axis(2 * r, fine)
    return _shares(_inside(shape, float(r), axis[None, :], axis[:, None]), fine)


@cache
def roof() -> Mask:
    """Share of each pixel that a house's roof covers, float32 (4 cells, 8 cells): slope 1."""
    fine = 8
    x, y = _fine_axis(8 * CELL, fine), _fine_axis(4 * CELL, fine)
    return _shares(abs(x)[None, :] <= y[:, None] + 2 * CELL, fine)


def _ellipse(height: int, width: int, a: float, b: float) -> Mask:
    """An ellipse with half axes a (across) and b in the middle of height x width cells."""
    x, y = _fine_axis(width * CELL, 8), _fine_axis(height * CELL, 8)
    return _shares(np.hypot(x[None, :] / a, y[:, None] / b) <= 1, 8)


def _arc() -> Mask:
    """A smile, 2 x 6 cells: a part of a circle's line."""
    x, y = _fine_axis(6 * CELL, 8), _fine_axis(2 * CELL, 8)
    distance = abs(np.hypot(x[None, :], y[:, None] + 23) - 27.5)
    return _shares((distance <= 2.2) & (abs(x)[None, :] <= 21), 8)


@cache
def features() -> dict[str, Mask]:
    """Parts of faces, cut from whole cells: share of each pixel that is ink, float32."""
    return {
        "eye": _ellipse(2, 1, 3.2, 7),
        "closed eye": _ellipse(1, 2, 7.5, 2.2),
        "smile": _arc(),
        "frown": _arc()[::-1],
        "o": _ellipse(2, 2, 7, 7),
    }


@cache
def marks() -> dict[str, Mask]:
    """Small drawings that fit a cell, by name: share of each pixel that is ink, float32 (8, 8).

    The inked cells of the features of faces, named after their row and column, then the decorations.
    """
    out: dict[str, Mask] = {}
    for name, mask in features().items():
        for row in range(mask.shape[0] // CELL):
            for column in range(mask.shape[1] // CELL):
                cell = mask[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
                if cell.max() > _FAINT:
                    out[f"{name} {row} {column}"] = cell
    x, y = _fine_axis(CELL, 8)[None, :], _fine_axis(CELL, 8)[:, None]
    out["twinkle"] = _shares(np.sqrt(abs(x)) + np.sqrt(abs(y)) <= np.sqrt(3.6), 8)
    out["flower"] = _shares(np.hypot(x, y) * (1 - 0.35 * np.cos(5 * np.arctan2(x, -y))) <= 2.4, 8)
    return out


_FAINT = 0.1
"""A cell of a feature whose pixels all have less ink is bare."""

DECORATIONS: dict[str, dict[str, tuple[str, Rgb]]] = {
    "dark blue": {"star": ("twinkle", (255, 244, 190))},
    "light green": {
        "red flower": ("flower", (226, 50, 60)),
        "white flower": ("flower", (255, 255, 255)),
        "yellow flower": ("flower", (244, 190, 20)),
    },
}
"""By background: what may lie scattered on it, as a mark and its ink."""

FACE_MARKS = tuple(name for name in marks() if name.split()[0] in ("eye", "closed", "smile", "frown", "o"))


def face_ink(colour: str) -> Rgb:
    """Colour of the eyes and mouth of a face."""
    return (255, 255, 255) if colour == "black" else COLOURS["black"]
