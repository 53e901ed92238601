"""Canny's edges on shapes whose edges are known, and beside OpenCV where that is installed."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pochade.runtime.canny import canny


def edges(image: Image.Image, *limits: int) -> NDArray[np.bool_]:
    found = canny(image, *limits)
    assert found.mode == "RGB" and found.size == image.size
    pixels = np.asarray(found)
    assert set(np.unique(pixels)) <= {0, 255} and (pixels == pixels[:, :, :1]).all()
    white: NDArray[np.bool_] = pixels[:, :, 0] > 0
    return white


def step(height: int, *columns: int) -> Image.Image:
    """Rows of grey, of these values."""
    return Image.fromarray(np.tile(np.array(columns, np.uint8), (height, 1)))


def test_a_plain_picture_has_no_edge() -> None:
    assert not edges(Image.new("RGB", (9, 7), (10, 200, 30))).any()


@pytest.mark.parametrize("turned", [False, True])
def test_an_edge_is_one_line(turned: bool) -> None:
    image = step(7, 0, 0, 0, 0, 255, 255, 255, 255, 255)
    found = edges(image.transpose(Image.Transpose.TRANSPOSE) if turned else image)
    found = found.T if turned else found
    # Both pixels beside the step have the same gradient: the first is taken.
    assert (found == (np.arange(9) == 3)).all()


@pytest.mark.parametrize(("slopes", "count"), [((0, 20), 0), ((0, 40), 0), ((0, 60), 7)])
def test_a_gradient_must_be_above_the_limit(slopes: tuple[int, int], count: int) -> None:
    """A step of 60 has a gradient of 240, one of 40 of 160, which is an edge only beside another."""
    low, high = slopes
    assert edges(step(7, low, low, low, high, high, high)).sum() == count


def test_a_weak_edge_goes_on_where_a_strong_one_begins() -> None:
    pixels = np.zeros((24, 12), np.uint8)
    pixels[:12, 6:] = 60
    pixels[12:, 6:] = 40
    found = edges(Image.fromarray(pixels))[:, 5:7].any(axis=1)
    assert found.all()
    pixels[:12, 6:] = 40
    assert not edges(Image.fromarray(pixels)).any()


def test_channels_are_not_mixed() -> None:
    """Red and green of one grey: none of it is left in a grey picture."""
    pixels = np.zeros((7, 8, 3), np.uint8)
    pixels[:, :4, 0], pixels[:, 4:, 1] = 100, 51
    assert edges(Image.fromarray(pixels))[:, 3].all()
    assert not edges(Image.fromarray(pixels).convert("L")).any()


def test_a_disc_has_a_closed_outline() -> None:
    image = Image.new("L", (64, 64))
    ImageDraw.Draw(image).ellipse((12, 12, 51, 51), fill=255)
    found = edges(image)
    y, x = np.nonzero(found)
    assert np.abs(np.hypot(y - 31.5, x - 31.5) - 20).max() < 1.5
    # A flood from the corner cannot get in.
    room = Image.fromarray(np.where(found, 255, 0).astype(np.uint8)).copy()
    ImageDraw.floodfill(room, (0, 0), 128)
    assert room.getpixel((32, 32)) == 0 and room.getpixel((63, 63)) == 128


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (2, 2)])
def test_small_pictures(size: tuple[int, int]) -> None:
    assert edges(Image.new("RGB", size, "white")).shape == size[::-1]


@pytest.mark.parametrize("seed", range(3))
def test_opencv_finds_the_same(seed: int) -> None:
    cv2 = pytest.importorskip("cv2")
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (20, 30, 3), np.uint8)
    pixels = np.asarray(Image.fromarray(small).resize((240, 160), Image.Resampling.BICUBIC))
    assert (np.asarray(canny(Image.fromarray(pixels)))[:, :, 0] == cv2.Canny(pixels, 100, 200)).all()
