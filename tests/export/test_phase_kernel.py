"""A convolution of doubled pixels is four smaller ones of the pixels themselves."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402, N812 - the name everyone gives it

from pochade.export.strips import phase_kernel  # noqa: E402


def test_four_phases_make_the_convolution_of_the_doubled_picture() -> None:
    rng = torch.Generator().manual_seed(0)
    picture = torch.randn(1, 3, 4, 5, generator=rng, dtype=torch.float64)
    kernel = torch.randn(2, 3, 3, 3, generator=rng, dtype=torch.float64)
    expected = F.conv2d(F.interpolate(picture, scale_factor=2, mode="nearest"), kernel, padding=1)
    for row in (0, 1):
        for column in (0, 1):
            padded = F.pad(picture, (1 - column, column, 1 - row, row))
            found = F.conv2d(padded, phase_kernel(kernel, row, column))
            torch.testing.assert_close(found, expected[..., row::2, column::2], rtol=0, atol=1e-12)
