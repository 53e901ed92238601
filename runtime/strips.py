"""How a picture is cut for codecs that compute a strip of rows at a time, see `pochade.export.strips`."""

from __future__ import annotations

STRIP_PIXELS = 16_384
"""Of a picture at a time: a layer of 128 channels then has strips of 8 MB, which caches hold."""


def strip_count(rows: int, columns: int, factor: int) -> int:
    """The number of strips a codec takes: the fewest of at most STRIP_PIXELS each, or one a row of cells.

    Args:
        rows: of cells in the picture; strips have a whole number of them.
        columns: of cells.
        factor: pixels per side of a cell.
    """
    counts = [count for count in range(1, rows + 1) if rows % count == 0]
    fit = (count for count in counts if rows // count * columns * factor * factor <= STRIP_PIXELS)
    return next(fit, rows)
