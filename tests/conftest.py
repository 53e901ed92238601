"""Bundles that many tests paint with, exported once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden import GOLDEN


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """fp32 bundles of the tiny checkpoints, by name."""
    from pochade.export.write import export_checkpoint

    folder = tmp_path_factory.mktemp("bundles")
    for name in ("meissonic-tiny", "monetico-tiny"):
        export_checkpoint(GOLDEN / name, folder / name, recipe=name.split("-")[0])
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(params=["meissonic-tiny", "monetico-tiny"])
def model(request: pytest.FixtureRequest) -> str:
    """Name of a tiny checkpoint, with and without the down- and up-sampler."""
    return str(request.param)
