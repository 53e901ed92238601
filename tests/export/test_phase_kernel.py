"""A convolution of doubled pixels is four smaller ones of the pixels themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402, N812 - the name everyone gives it

from pochade.export import strips  # noqa: E402
from pochade.export.families.meissonic import Meissonic  # noqa: E402
from pochade.export.strip_body import phase_kernel  # noqa: E402
from pochade.export.trace import save  # noqa: E402
from pochade.runtime.ort import ort  # noqa: E402
from tests.golden import GOLDEN  # noqa: E402


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


def test_wide_convolutions_are_not_split_and_give_the_same(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strips, "PHASE_CHANNELS", 0)
    model = Meissonic.open(GOLDEN / "monetico-tiny")._vq_decoder()
    assert not any("phase" in name for name in model.graph.initializers)
    save(model, tmp_path / "whole.onnx")
    split = bundles["monetico-tiny"] / "vq_decoder.onnx"
    assert b"phase" in split.read_bytes()
    tokens = np.random.default_rng(0).integers(0, 32, (1, 4, 6))
    pictures = []
    for path in (split, tmp_path / "whole.onnx"):
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        pictures.append(session.run(None, {"tokens": tokens, "strips": np.array([2]), "recompute": np.array(False)})[0])
    np.testing.assert_allclose(pictures[0], pictures[1], rtol=0, atol=5e-5)
