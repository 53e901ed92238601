"""Round-to-nearest against examples worked out by hand and against its own bounds."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pochade.quant import rtn
from pochade.quant.rtn import (
    block_scales,
    channel_scales,
    codes_of,
    pack_codes,
    round_channels,
    to_blocks,
    unpack_blocks,
)

RNG = np.random.default_rng(20)


def pack_blocks(rows: NDArray[np.floating], scales: NDArray[np.floating], bits: int, size: int) -> NDArray[np.uint8]:
    return pack_codes(codes_of(to_blocks(rows, size), scales, bits), bits)


def test_four_bits_are_packed_as_worked_out_by_hand() -> None:
    row = np.zeros((1, 16), np.float32)
    row[0, :6] = [-4.0, 3.5, 1.0, 0.3, -0.2, 4.0]
    scales = block_scales(row, 4, 16, np.float32)
    # Largest magnitude is -4 (the later +4 is no larger): -4 / -8.
    np.testing.assert_array_equal(scales, [[0.5]])
    packed = pack_blocks(row, scales, 4, 16)
    # Codes -8 7 2 1 0 7(clipped from 8) 0..., plus 8: 0 15 10 9 8 15 8...; pairs, the first in the low half.
    np.testing.assert_array_equal(packed, [[[0xF0, 0x9A, 0xF8, 0x88, 0x88, 0x88, 0x88, 0x88]]])
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(unpack_blocks(packed, scales, 4, 6), [[-4.0, 3.5, 1.0, 0.5, 0.0, 3.5]])


def test_a_positive_largest_entry_makes_the_scale_negative() -> None:
    row = np.array([[8.0, -7.0] + [0.0] * 14], np.float32)
    scales = block_scales(row, 4, 16, np.float32)
    np.testing.assert_array_equal(scales, [[-1.0]])
    np.testing.assert_array_equal(unpack_blocks(pack_blocks(row, scales, 4, 16), scales, 4, 16), row)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [16, 48, 129])
def test_entries_are_off_by_half_a_step_at_most(bits: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtn, "CLIP_SHARES", ())
    rows = RNG.standard_normal((5, width)).astype(np.float32)
    scales = block_scales(rows, bits, 32, np.float32)
    packed = pack_blocks(rows, scales, bits, 32)
    assert packed.shape == (5, -(-width // 32), 32 * bits // 8)
    steps = np.abs(np.repeat(scales, 32, axis=1)[:, :width])
    error = np.abs(unpack_blocks(packed, scales, bits, width) - rows)
    # The end of the range that the largest entry does not use lacks one code.
    missing = np.abs(rows) > steps * ((1 << (bits - 1)) - 1)
    assert (error <= np.where(missing, 1.0, 0.5) * steps * 1.0001).all()


def test_an_outlier_is_cut_off_where_that_serves_the_rest() -> None:
    rows = np.array([[1.0] * 255 + [10.0]], np.float32)
    # At -10/8 the ones are off by 0.25 each, 16 in squares; at 0.8 of that they are exact and the outlier is off by 2.
    np.testing.assert_array_equal(block_scales(rows, 4, 256, np.float32), [[-1.0]])
    np.testing.assert_array_equal(block_scales(rows, 8, 256, np.float32), [[-10 / 128]])


def test_cutting_off_lowers_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = RNG.standard_t(5, (8, 256)).astype(np.float32)

    def error() -> float:
        scales = block_scales(rows, 4, 128, np.float32)
        return float(np.square(unpack_blocks(pack_blocks(rows, scales, 4, 128), scales, 4, 256) - rows).sum())

    clipped = error()
    monkeypatch.setattr(rtn, "CLIP_SHARES", ())
    assert clipped < error()


def test_padding_is_weight_zero() -> None:
    rows = RNG.standard_normal((3, 20)).astype(np.float32)
    scales = block_scales(rows, 8, 16, np.float32)
    assert (pack_blocks(rows, scales, 8, 16)[:, 1, 4:] == 128).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_of_zeros_stay_zeros(dtype: type[np.floating]) -> None:
    rows = np.zeros((2, 16), dtype)
    scales = block_scales(rows, 4, 16, dtype)
    assert (scales == 1).all()
    assert (unpack_blocks(pack_blocks(rows, scales, 4, 16), scales, 4, 16) == 0).all()


def test_weights_too_small_for_a_float16_scale_become_zeros() -> None:
    rows = np.full((1, 16), 1e-7, np.float16)
    scales = block_scales(rows, 4, 16, np.float16)
    assert scales.dtype == np.float16
    assert (unpack_blocks(pack_blocks(rows, scales, 4, 16), scales, 4, 16) == 0).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_channels_use_the_symmetric_range(axis: int) -> None:
    weight = RNG.standard_normal((6, 5, 3, 3)).astype(np.float32)
    scales = channel_scales(weight, axis)
    others = tuple({0, 1, 2, 3} - {axis})
    np.testing.assert_allclose(scales, np.abs(weight).max(axis=others) / 127, rtol=1e-6)
    broad = np.expand_dims(scales, others)
    codes = round_channels(weight, broad)
    assert codes.dtype == np.int8
    np.testing.assert_array_equal(np.abs(codes).max(axis=others), 127)
    assert (np.abs(codes * broad - weight) <= broad * 0.5001).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    rows = np.array([[1.0] * 15 + [bad]], np.float32)
    with pytest.raises(FloatingPointError):
        block_scales(rows, 4, 16, np.float32)
    with pytest.raises(FloatingPointError):
        channel_scales(rows, 0)
