"""The whole way at published size; needs 20 GB of disk and about half an hour: `pytest -m full_size`."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from pochade.benchmarks.full_size import run
from pochade.bundle import Bundle

LIMITS = {"int8": 1.75e9, "int4": 1.10e9}
"""Bytes of a whole Meissonic bundle (1.5 B parameters)."""


@pytest.mark.full_size
def test_meissonic_at_published_size(tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in run(tmp_path, "meissonic", steps=2)}
    assert stages["export fp32"].peak_rss < 8e9
    largest = max(Bundle.open(tmp_path / "fp32").component_size(name) for name in ("condition", "transformer"))
    for scheme, limit in LIMITS.items():
        bundle = Bundle.open(tmp_path / scheme)
        assert bundle.size <= limit
        assert stages[f"quantize {scheme}"].peak_rss < 2 * largest
        assert bundle.manifest.scorecard is not None
        with Image.open(tmp_path / f"{scheme}.png") as picture:
            assert picture.size == (1024, 1024)
