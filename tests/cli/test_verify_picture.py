"""Pictures that are painted again from the settings they carry."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import pochade
from pochade.cli import main
from pochade.runtime.pipeline import Pipeline


@pytest.fixture
def picture(bundles: dict[str, Path], tmp_path: Path) -> Path:
    path = tmp_path / "画.png"
    arguments = ["-m", str(bundles["monetico-tiny"]), "--size", "64x64", "--steps", "2", "-s", "5", "-o", str(path)]
    assert main(["generate", "一只红狐狸", *arguments, "-q"]) == 0
    return path


def rewrite(path: Path, change: dict[str, object] | None, pixels: int = 0) -> None:
    """Write the picture anew with other settings or other pixels."""
    with Image.open(path) as image:
        settings = json.loads(image.info["pochade"])
        array = np.asarray(image).copy()
    array[:2, :2] ^= pixels
    info = PngInfo()
    if change is not None:
        info.add_itxt("pochade", json.dumps(settings | change))
    Image.fromarray(array).save(path, pnginfo=info)


def verify(path: Path, model: Path, *more: str) -> int:
    return main(["verify", str(path), "--model", str(model), *more])


def test_picture_is_painted_again(picture: Path, bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert verify(picture, bundles["monetico-tiny"]) == 0
    assert capsys.readouterr().out == "identical\n"


@pytest.mark.parametrize(("painted_on", "repeated_on"), [("cpu", "cpu"), ("cuda", "auto")])
def test_a_picture_of_the_cpu_is_repeated_there(
    picture: Path, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, painted_on: str, repeated_on: str
) -> None:
    """Though there may be a card, whose pictures differ in some pixels."""
    rewrite(picture, {"device": painted_on})
    asked: list[str] = []

    def load(folder: Path, *, device: str, expand: str) -> Pipeline:
        asked.append(device)
        assert expand == "off"
        return pochade.load(folder, device="cpu")

    monkeypatch.setattr("pochade.runtime.receipt.load", load)
    assert verify(picture, bundles["monetico-tiny"]) == 0
    assert asked == [repeated_on]


def test_changed_pixels_are_found(picture: Path, bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(picture, {}, pixels=16)
    capsys.readouterr()
    assert verify(picture, bundles["monetico-tiny"]) == 1
    assert capsys.readouterr().out.startswith("different: 0.1% of the pixels, PSNR ")
    assert verify(picture, bundles["monetico-tiny"], "--json") == 1
    assert json.loads(capsys.readouterr().out)["identical"] is False


def test_another_bundle_is_refused(
    picture: Path, bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(picture, bundles["meissonic-tiny"]) == 3
    assert "was painted with another bundle" in capsys.readouterr().err
    # The name in the metadata is no path of this machine.
    assert main(["verify", str(picture)]) == 3
    copy = tmp_path / "copy"
    shutil.copytree(bundles["monetico-tiny"], copy)
    assert verify(picture, copy) == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": 3}, "hold no prompt"),
        ({"width": 65}, "width 65 is not a multiple"),
        ({"num_inference_steps": 10**12}, "num_inference_steps is 1000000000000"),
        ({"guidance_scale": "much"}, "guidance_scale is 'much'"),
        ({"width": 96}, "its size is not the one in its settings"),
        ({"micro_conds": [1, 2, "x", 4, 5]}, "cannot be used"),
        (None, "carries no settings"),
    ],
)
def test_settings_are_not_trusted(
    picture: Path,
    bundles: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    change: dict[str, object] | None,
    reason: str,
) -> None:
    rewrite(picture, change)
    capsys.readouterr()
    assert verify(picture, bundles["monetico-tiny"]) == 6
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"GIF89a" + bytes(50), b"\x89PNG\r\n\x1a\n" + bytes(100)])
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    assert main(["verify", str(path)]) == 6
    assert "no intact PNG picture" in capsys.readouterr().err


def test_model_has_no_effect_on_a_bundle(bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(bundles["monetico-tiny"]), "--model", "x"]) == 2
    assert "no effect on a bundle" in capsys.readouterr().err
