"""Edges of a picture as Canny (1986, "A Computational Approach to Edge Detection") finds them, for ControlNets.

The numbers are those of the maps that ControlNets are trained on: OpenCV's, without the blur of the paper. Gradients
are 3x3 Sobel sums of whole numbers, their length is |x| + |y|, of the channel where that is largest, and pixels beyond
the border repeat those at it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LOW, HIGH = 100, 200
"""Gradients above `HIGH` are edges, and so are those above `LOW` that touch an edge; so the nets' published samples."""

SHIFT = 15
TANGENT = 13573
"""Of 22.5 degrees, times 2^`SHIFT`. That of 67.5 degrees is larger by 2."""

Whole = NDArray[np.int32]
Mask = NDArray[np.bool_]


def canny(image: Image.Image, low: int = LOW, high: int = HIGH) -> Image.Image:
    """White lines of one pixel on black, RGB, of the picture's size.

    Args:
        image: of any mode; transparency is dropped.
        low: least gradient of an edge that continues another one.
        high: least gradient of an edge by itself; both are counted on pixels of 0 to 255.
    """
    x, y, length = _gradients(np.asarray(image.convert("RGB"), np.int32))
    thin = _is_ridge(x, y, length) & (length > low)
    edges = _grown(thin & (length > high), thin)
    return Image.fromarray(np.where(edges, 255, 0).astype(np.uint8)).convert("RGB")


def _gradients(pixels: Whole) -> tuple[Whole, Whole, Whole]:
    """Slopes to the right and downwards and their length, (height, width), of pixels (height, width, channels)."""
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    across, down = padded[:, 2:] - padded[:, :-2], padded[2:] - padded[:-2]
    x = across[:-2] + 2 * across[1:-1] + across[2:]
    y = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    length = np.abs(x) + np.abs(y)
    largest = length.argmax(axis=2)[:, :, None]
    x, y, length = (np.take_along_axis(values, largest, axis=2)[:, :, 0] for values in (x, y, length))
    return x, y, length


def _is_ridge(x: Whole, y: Whole, length: Whole) -> Mask:
    """Where the gradient is longer than at both neighbours along it; of two alike, the right or lower one is none."""
    around = np.pad(length, 1)

    def at(down: int, right: int) -> Whole:
        height, width = length.shape
        return around[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    run, rise = np.abs(x).astype(np.int64) * TANGENT, np.abs(y).astype(np.int64) << SHIFT
    flat, steep = rise < run, rise > run + (np.abs(x).astype(np.int64) << SHIFT + 1)
    beside = (length > at(0, -1)) & (length >= at(0, 1))
    above = (length > at(-1, 0)) & (length >= at(1, 0))
    falling = (length > at(-1, -1)) & (length > at(1, 1))
    rising = (length > at(-1, 1)) & (length > at(1, -1))
    slanted: Mask = np.where((x ^ y) < 0, rising, falling)
    return np.where(flat, beside, np.where(steep, above, slanted))


def _grown(seeds: Mask, allowed: Mask) -> Mask:
    """The allowed pixels that a path of allowed ones joins to a seed, by any of the eight neighbours."""
    # A border that is not allowed spares the search from looking for the edge.
    left, found = (np.pad(mask, 1) for mask in (allowed, seeds))
    width = left.shape[1]
    steps = np.array([down * width + right for down in (-1, 0, 1) for right in (-1, 0, 1) if down or right])
    left, reached = left.ravel(), found.ravel()
    left &= ~reached
    front = np.flatnonzero(reached)
    while front.size:
        near = np.unique(front[:, None] + steps)
        front = near[left[near]]
        left[front] = False
        reached[front] = True
    return reached.reshape(found.shape)[1:-1, 1:-1]
