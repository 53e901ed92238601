"""A codec in parts gives what it gives in one graph, bit for bit, however many strips are computed at a time."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pochade
from pochade.bundle import Bundle
from pochade.component import Component
from pochade.errors import BundleInvalidError, CancelledError
from pochade.runtime.codec_memory import CodecMemory
from pochade.runtime.providers import choose
from pochade.runtime.session import ComponentSession, Stop

ROWS, COLUMNS = 6, 4
"""Cells of a picture."""


@pytest.fixture(scope="module")
def rounded(small_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 bundle whose encoder rounds its convolutions too."""
    from pochade.quant.bundle import quantize_bundle
    from pochade.quant.scheme import SCHEMES

    target = tmp_path_factory.mktemp("parts") / "int8"
    quantize_bundle(small_bundles["monetico-tiny"], target, replace(SCHEMES["int8"], int8_encoder=True))
    return target


def inputs_of(component: Component, factor: int, strips: int) -> dict[str, NDArray[Any]]:
    """Something to run a codec on, whose cells have so many pixels per side."""
    rng, given = np.random.default_rng(strips), {}
    for spec in component.inputs:
        if spec.name == "strips":
            given[spec.name] = np.array([strips])
        elif spec.name == "recompute":
            given[spec.name] = np.array(False)
        elif spec.name == "tokens":
            given[spec.name] = rng.integers(0, 32, (1, ROWS, COLUMNS))
        else:
            side = factor if spec.name == "image" else 1
            shape = (1, int(spec.shape[1]), side * ROWS, side * COLUMNS)
            given[spec.name] = rng.uniform(-1, 1, shape).astype(np.float32)
    return given


def outputs(folder: Path, name: str, strips: int, at_once: int) -> dict[str, NDArray[Any]]:
    """What a codec gives; threads that share a float convolution would sum it in another order."""
    bundle = Bundle.open(folder)
    session = ComponentSession(bundle, name, choose("cpu"), 1, Stop(), at_once=at_once)
    try:
        factor = int(bundle.manifest.scheduler["codec_factor"])
        return session.run_numpy(inputs_of(session.component, factor, strips))
    finally:
        session.close()


def assert_equal_in_parts(bundle: Path, name: str) -> None:
    assert len(Bundle.open(bundle).manifest.components[name].parts) > 10
    for strips in (2, 3, ROWS):
        expected = outputs(bundle, name, strips, 1)
        assert all(values.std() > 0 for values in expected.values())
        for at_once in (2, 5):
            found = outputs(bundle, name, strips, at_once)
            assert found.keys() == expected.keys()
            assert all(np.array_equal(found[output], expected[output]) for output in expected)


@pytest.mark.parametrize("name", ["vq_decoder", "vq_encoder"])
def test_codecs_of_float_bundles(bundles: dict[str, Path], model: str, name: str) -> None:
    assert_equal_in_parts(bundles[model], name)


@pytest.mark.parametrize("name", ["vq_decoder", "vq_encoder"])
def test_codecs_of_8_bit_numbers(rounded: Path, name: str) -> None:
    assert Bundle.open(rounded).manifest.components[name].quantization is not None
    assert_equal_in_parts(rounded, name)


@pytest.mark.parametrize("name", ["vae_decoder", "vae_encoder"])
def test_codecs_that_attend(hunyuan_bundles: dict[str, tuple[Path, Path]], name: str) -> None:
    assert_equal_in_parts(hunyuan_bundles["v1.2"][1], name)


def test_other_components_have_no_parts(bundles: dict[str, Path]) -> None:
    components = Bundle.open(bundles["monetico-tiny"]).manifest.components
    assert {name for name, component in components.items() if component.parts} == {"vq_decoder", "vq_encoder"}


@pytest.fixture
def changed(bundles: dict[str, Path], tmp_path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A bundle, and its manifest to be changed and written back."""
    bundle = tmp_path / "bundle"
    shutil.copytree(bundles["monetico-tiny"], bundle)
    manifest = json.loads((bundle / "bundle.json").read_text("utf-8"))
    yield bundle, manifest


def write(bundle: Path, manifest: dict[str, Any]) -> None:
    (bundle / "bundle.json").write_text(json.dumps(manifest), "utf-8")


def test_parts_that_do_not_fit_together_are_refused(changed: tuple[Path, dict[str, Any]]) -> None:
    bundle, manifest = changed
    parts = manifest["components"]["vq_decoder"]["parts"]
    parts[0], parts[4] = parts[4], parts[0]
    write(bundle, manifest)
    with pytest.raises(BundleInvalidError, match=r"vq_decoder\.part04\.onnx reads '.*', which no part before it gives"):
        outputs(bundle, "vq_decoder", 2, 2)
    parts[0], parts[4] = parts[4], parts[0]
    gone = parts.pop()["file"]
    (bundle / gone).unlink()
    manifest["files"] = [entry for entry in manifest["files"] if entry["path"] != gone]
    write(bundle, manifest)
    with pytest.raises(BundleInvalidError, match="no part of vq_decoder gives 'image'"):
        outputs(bundle, "vq_decoder", 2, 2)


def test_a_part_is_checked_as_any_graph(changed: tuple[Path, dict[str, Any]]) -> None:
    bundle, manifest = changed
    manifest["components"]["vq_decoder"]["parts"][0]["file"] = "elsewhere.onnx"
    write(bundle, manifest)
    with pytest.raises(BundleInvalidError, match=r"'elsewhere\.onnx' is not listed in files"):
        Bundle.open(bundle)


def test_a_bundle_without_parts_decodes_as_before(changed: tuple[Path, dict[str, Any]]) -> None:
    bundle, manifest = changed
    expected = outputs(bundle, "vq_decoder", 3, 2)
    for component in manifest["components"].values():
        for part in component.pop("parts", []):
            (bundle / part["file"]).unlink()
            manifest["files"] = [entry for entry in manifest["files"] if entry["path"] != part["file"]]
    write(bundle, manifest)
    found = outputs(bundle, "vq_decoder", 3, 2)
    assert np.array_equal(found["image"], expected["image"])


def test_runs_may_be_bound_to_a_buffer(bundles: dict[str, Path]) -> None:
    bundle = Bundle.open(bundles["monetico-tiny"])
    factor = int(bundle.manifest.scheduler["codec_factor"])
    session = ComponentSession(bundle, "vq_decoder", choose("cpu"), 1, Stop(), at_once=2)
    given = inputs_of(session.component, factor, 2)
    image = session.buffer("image", image_height=ROWS * factor, image_width=COLUMNS * factor)
    session.bind(given, {"image": image}).run()
    assert np.array_equal(image.numpy(), session.run_numpy(given)["image"]) and image.numpy().std() > 0
    session.close()


def test_a_request_to_stop_ends_all_strips(bundles: dict[str, Path]) -> None:
    stop = Stop()
    session = ComponentSession(Bundle.open(bundles["monetico-tiny"]), "vq_decoder", choose("cpu"), 2, stop, at_once=2)
    rows = 64
    tokens = np.random.default_rng(0).integers(0, 32, (1, rows, rows))
    given = {"tokens": tokens, "strips": np.array([rows]), "recompute": np.array(False)}
    timer = threading.Timer(0.1, stop.request)
    timer.start()
    with pytest.raises(CancelledError):
        session.run_numpy(given)
    timer.join()
    session.close()
    assert not [thread.name for thread in threading.enumerate() if "vq_decoder" in thread.name]


def test_a_picture_is_the_same_with_any_number_of_threads(small_bundles: dict[str, Path]) -> None:
    pictures = []
    for threads in (1, 2, 3):
        with pochade.load(small_bundles["monetico-tiny"], device="cpu", threads=threads) as pipe:
            result = pipe("a fox", seed=1, width=256, height=256, num_inference_steps=1)
            assert pipe.plan is not None and pipe.plan.phases["decode"].at_once == threads
            pictures.append(np.asarray(result.images[0]))
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures) and pictures[0].std() > 0


def test_strips_at_a_time_are_planned_for(bundles: dict[str, Path]) -> None:
    decoder = Bundle.open(bundles["monetico-tiny"]).manifest.components["vq_decoder"]
    memory = CodecMemory(decoder, 16)
    fast, whole, small = memory.ways(0, 64, 64, 1, "auto", threads=3)
    assert (fast.at_once, whole.at_once, small.at_once) == (3, 1, 1)
    assert fast.peak > whole.peak and small.recompute and not whole.recompute
    assert fast.means == "3 strips at a time"
    # Never more than there are strips, nor where layers are computed again or all of a picture at once.
    assert memory.ways(0, 64, 64, 1, "auto", threads=100)[0].at_once == 4
    assert memory.ways(0, 10, 10, 1, "auto", threads=100)[0].at_once == 2
    assert [way.at_once for way in memory.ways(0, 64, 64, 1, "on", threads=4)] == [1]
    assert [way.at_once for way in memory.ways(0, 64, 64, 1, "off", threads=4)] == [1]
    assert CodecMemory(decoder, 16, on_gpu=True).ways(0, 64, 64, 1, "auto", threads=4)[0].at_once == 1
