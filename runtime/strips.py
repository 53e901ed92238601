"""How a picture is cut for codecs that compute a strip of rows at a time, see `pochade.export.strips`."""

from __future__ import annotations

from pochade.component import Component

STRIP_PIXELS = 16_384
"""Of a picture at a time: a layer of 128 channels then has strips of 8 MB, which caches hold."""

ENCODER_STRIP_PIXELS = 32_768
"""The same for what reads pictures, whose largest layers have 128 channels where those of a decoder have 256: fewer
strips take a twentieth less time there, and none less of a decoder's."""

GPU_STRIP_PIXELS = 65_536
"""The same on a graphics card, where every strip costs a thousand small kernels: those weigh more than caches there."""


AT_ONCE = 4
"""Strips that are computed at the same time, at most: of Meissonic's 1024x1024 each takes 0.2 GB, and pictures with
default settings should not need more than 1.6."""


def strip_pixels(codec: Component, on_gpu: bool) -> int:
    """How many pixels a strip of an encoder or a decoder has at most, unless a row of cells has more."""
    if on_gpu:
        return GPU_STRIP_PIXELS
    return ENCODER_STRIP_PIXELS if reads_pictures(codec) else STRIP_PIXELS


def reads_pictures(codec: Component) -> bool:
    """Whether it is an encoder."""
    return any(spec.name == "image" for spec in codec.inputs)


def strip_count(rows: int, columns: int, factor: int, pixels: int = STRIP_PIXELS) -> int:
    """The number of strips a codec takes: the fewest that are not too large, or one a row of cells.

    Args:
        rows: of cells in the picture; strips have a whole number of them.
        columns: of cells.
        factor: pixels per side of a cell.
        pixels: of a strip at most, see `strip_pixels`.
    """
    counts = [count for count in range(1, rows + 1) if rows % count == 0]
    fit = (count for count in counts if rows // count * columns * factor * factor <= pixels)
    return next(fit, rows)


def strips_at_once(codec: Component, threads: int, strips: int) -> int:
    """How many of so many strips threads compute at the same time, each by itself; 1 where they share every strip."""
    return min(threads, strips, AT_ONCE) if codec.parts else 1


def computes_in_strips(component: Component) -> bool:
    """Whether a component's graph is told how many strips to compute in."""
    return any(spec.name == "strips" for spec in component.inputs)
