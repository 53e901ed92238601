"""Bundles that many tests paint with, exported once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.golden import GOLDEN


@pytest.fixture(scope="session", autouse=True)
def recorded_frequencies() -> None:
    """Let sinusoids turn as they did where the goldens were recorded, two in 128 by a last bit from here."""
    from safetensors.torch import load_file

    from pochade.export.modules import masked_transformer

    masked_transformer.FREQUENCIES = load_file(GOLDEN / "scheduler" / "tables.safetensors")["sinusoid.freqs"]


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


@pytest.fixture(scope="session")
def small_bundles(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same, painting 64x64 pixels unless told otherwise: measuring them takes a moment."""
    folder = tmp_path_factory.mktemp("small")
    for name, source in bundles.items():
        shutil.copytree(source, folder / name)
        path = folder / name / "bundle.json"
        manifest = json.loads(path.read_text("utf-8"))
        manifest["defaults"] |= {"width": 64, "height": 64, "num_inference_steps": 4}
        path.write_text(json.dumps(manifest), "utf-8")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="session")
def hunyuan_graphs(hunyuan_bundles: dict[str, tuple[Path, Path]]) -> dict[str, Path]:
    """Folders of condition.onnx and transformer.onnx of tiny HunyuanDiT networks, by version."""
    return {version: bundle for version, (_, bundle) in hunyuan_bundles.items()}


@pytest.fixture(scope="session")
def hunyuan_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Checkpoint and fp32 bundle of tiny HunyuanDiTs, by version."""
    from tests.hunyuan_checkpoint import write_checkpoint

    return export_versions(tmp_path_factory.mktemp("hunyuandit"), "HunyuanDiT-{}", write_checkpoint)


@pytest.fixture(scope="session")
def hunyuan_controlnets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Checkpoint and fp32 bundle of tiny ControlNets, by version."""
    from tests.hunyuan_checkpoint import write_controlnet

    return export_versions(tmp_path_factory.mktemp("controlnets"), "HunyuanDiT-{}-Canny", write_controlnet)


def export_versions(folder: Path, name: str, write: Callable[[Path, str], Path]) -> dict[str, tuple[Path, Path]]:
    """Checkpoint and fp32 bundle of every version of HunyuanDiT, made in a folder.

    Args:
        folder: for both.
        name: of the checkpoint, with a place for the version.
        write: makes the checkpoint of a version.
    """
    from pochade.export.write import export_checkpoint
    from tests.hunyuan import VERSIONS

    made = {version: (write(folder / name.format(version), version), folder / version) for version in VERSIONS}
    for checkpoint, bundle in made.values():
        export_checkpoint(checkpoint, bundle)
    return made
