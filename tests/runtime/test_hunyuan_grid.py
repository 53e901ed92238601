"""Angles and sizes of HunyuanDiT against what is published about them."""

from __future__ import annotations

import numpy as np
import pytest

from pochade.runtime.hunyuan_grid import BINS, crop, grid_positions, nearest_size, rotary_tables


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (1024, 1024, (0, 32, 0, 32)),
        (1280, 1280, (0, 32, 0, 32)),
        (1024, 768, (4, 28, 0, 32)),
        (1152, 864, (4, 28, 0, 32)),
        (1280, 960, (4, 28, 0, 32)),
        (768, 1024, (0, 32, 4, 28)),
        (864, 1152, (0, 32, 4, 28)),
        (960, 1280, (0, 32, 4, 28)),
        (1280, 768, (6, 25, 0, 32)),
        (768, 1280, (0, 32, 6, 25)),
    ],
)
def test_part_of_the_grid_that_a_size_covers(width: int, height: int, expected: tuple[int, ...]) -> None:
    """The table of the specification, section 6."""
    assert crop(height // 16, width // 16) == expected


def test_positions_leave_out_the_end() -> None:
    rows, columns = grid_positions(48, 64)
    np.testing.assert_allclose(rows, 4 + 24 * np.arange(48) / 48)
    np.testing.assert_allclose(columns, 32 * np.arange(64) / 64)


@pytest.mark.parametrize("side", [2, 6, 64, 80])
def test_squares_agree_with_diffusers(side: int) -> None:
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    region = ((0, 0), (32, 32))
    expected = embeddings.get_2d_rotary_pos_embed(88, region, (side, side))
    for found, table in zip(rotary_tables(side, side, 88), expected, strict=True):
        # Angles reach 32, and theirs are float32.
        np.testing.assert_allclose(np.repeat(found, 2, axis=-1), table.numpy(), rtol=0, atol=1e-5)


def test_one_cell_off_square() -> None:
    """Row 5, column 7 of a 1280x768 picture, by the formula of section 6."""
    cos, sin = (table.reshape(48, 80, 44)[5, 7] for table in rotary_tables(48, 80, 88))
    frequencies = 10000.0 ** (-2 * np.arange(22) / 44)
    angles = np.concatenate((32 * 7 / 80 * frequencies, (6 + 19 * 5 / 48) * frequencies))
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-6)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 1024), (1024, 1024)),
        ((512, 512), (1024, 1024)),
        ((1200, 1200), (1280, 1280)),
        ((800, 600), (1024, 768)),
        ((1920, 1080), (1280, 768)),
        ((1600, 1024), (1280, 768)),
        ((600, 1000), (768, 1280)),
        ((1152, 864), (1152, 864)),
    ],
)
def test_nearest_published_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert nearest_size(*size) == expected


def test_binning_agrees_with_diffusers() -> None:
    pipeline = pytest.importorskip("diffusers.pipelines.hunyuandit.pipeline_hunyuandit")
    rng = np.random.default_rng(0)
    for width, height in rng.integers(256, 2048, (200, 2)):
        expected = pipeline.map_to_standard_shapes(width, height)
        published = [size for _, sizes in BINS for size in sizes]
        assert nearest_size(int(width), int(height)) == expected or (width, height) in published
