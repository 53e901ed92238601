"""How pictures are cut for the codec."""

from __future__ import annotations

import pytest

from pochade.runtime.strips import STRIP_PIXELS, strip_count


@pytest.mark.parametrize(
    ("rows", "columns", "count"),
    [
        (64, 64, 64),  # 1024x1024: a row of cells is all that fits
        (48, 84, 48),
        (32, 32, 16),
        (8, 8, 1),
        (53, 64, 53),  # no divisor but 1 and itself
        (2, 1024, 2),  # not even a row fits
    ],
)
def test_strips_are_small_enough_and_divide_the_rows(rows: int, columns: int, count: int) -> None:
    found = strip_count(rows, columns, 16)
    assert found == count
    assert rows % found == 0
    assert found == rows or rows // found * columns * 256 <= STRIP_PIXELS
