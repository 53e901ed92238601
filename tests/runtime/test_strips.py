"""How pictures are cut for the codec."""

from __future__ import annotations

from pathlib import Path

import pytest

from pochade.bundle import Bundle
from pochade.runtime.strips import STRIP_PIXELS, strip_count, strip_pixels


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


def test_encoders_take_larger_strips(small_bundles: dict[str, Path]) -> None:
    components = Bundle.open(small_bundles["monetico-tiny"]).manifest.components
    encoder, decoder = (components[name] for name in ("vq_encoder", "vq_decoder"))
    assert strip_pixels(decoder, on_gpu=False) == STRIP_PIXELS < strip_pixels(encoder, on_gpu=False)
    assert strip_pixels(decoder, on_gpu=True) == strip_pixels(encoder, on_gpu=True)
