"""Where HunyuanDiT sees the cells of a picture, and the sizes it was trained on (spec sections 6 and 8)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BASE = 32
"""Cells per side of the 512x512 picture whose grid the angles count in."""
THETA = 10000.0

Bins = Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]
"""Shapes, and the sizes (width, height) of about that shape."""

BINS: Bins = (
    ((1, 1), ((1024, 1024), (1280, 1280))),
    ((4, 3), ((1024, 768), (1152, 864), (1280, 960))),
    ((3, 4), ((768, 1024), (864, 1152), (960, 1280))),
    ((16, 9), ((1280, 768),)),
    ((9, 16), ((768, 1280),)),
)
"""The published resolutions; what is filed under 16:9 is in truth 5:3."""


def rotary_tables(rows: int, columns: int, head_dim: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines of a grid of cells, (rows * columns, head_dim / 2) each, cells row by row.

    The first half of the channels tells the column, the second the row. Positions are those of training: a grid of
    32 by 32 is stretched or cropped around its middle, the end excluded. diffusers from 0.32 on counts otherwise,
    and differs on sizes that are not square.
    """
    tops, lefts = grid_positions(rows, columns)
    half = head_dim // 2
    frequencies = THETA ** (-np.arange(0, half, 2, dtype=np.float64) / half)
    by_column = np.broadcast_to(np.outer(lefts, frequencies), (rows, columns, half // 2))
    by_row = np.broadcast_to(np.outer(tops, frequencies)[:, None], (rows, columns, half // 2))
    angles = np.concatenate((by_column, by_row), axis=-1).reshape(rows * columns, half)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def grid_positions(rows: int, columns: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions of rows and of columns in the grid of training."""
    top, bottom, left, right = crop(rows, columns)
    return np.linspace(top, bottom, rows, endpoint=False), np.linspace(left, right, columns, endpoint=False)


def crop(rows: int, columns: int) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of the part of the square grid that a picture of this shape covers."""
    # Python's rounding, half to even, as in training.
    height = BASE if rows > columns else round(BASE / columns * rows)
    width = round(BASE / rows * columns) if rows > columns else BASE
    top, left = round((BASE - height) / 2), round((BASE - width) / 2)
    return top, top + height, left, left + width


def nearest_size(width: int, height: int, bins: Bins = BINS) -> tuple[int, int]:
    """Published size whose shape, and then whose area, is nearest: the published "resolution binning"."""
    sizes = [(int(w), int(h)) for _, alike in bins for w, h in alike]
    if (width, height) in sizes:
        return width, height
    _, alike = min(bins, key=lambda entry: abs(entry[0][0] / entry[0][1] - width / height))
    w, h = min(alike, key=lambda size: abs(size[0] * size[1] - width * height))
    return int(w), int(h)
