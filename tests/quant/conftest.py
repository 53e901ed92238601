"""What several tests of quantization begin with."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def decoder(bundles: dict[str, Path]) -> Path:
    return bundles["monetico-tiny"] / "vq_decoder.onnx"
