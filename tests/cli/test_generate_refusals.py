"""`pochade generate`: bad input, and what is left on disk where something goes wrong."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pochade.cli import main
from pochade.runtime.families import FAMILIES
from pochade.runtime.ort import ort
from tests.cli.conftest import FeedStdin, Generate, Refused


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "give one prompt"),
        (("a fox", "-p", "a fox"), "two prompts"),
        (("",), "the prompt is empty"),
        ((" \n\t",), "the prompt is empty"),
        (("a\0b",), "the control character U+0000 at position 1"),
        (("\x1b[2J",), "the control character U+001B at position 0"),
        (("a\udc80b",), "a lone surrogate U+DC80 at position 1"),
        (("x" * 1_000_000,), "the prompt has 1000000 characters; at most"),
        (("fox", "-n", "\x07"), "the negative prompt holds the control character"),
        (("fox", "-n", "x" * 1_000_000), "the negative prompt has 1000000 characters"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_prompt(refused: Refused, words: tuple[str, ...], reason: str) -> None:
    assert reason in refused(2, *words)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--size", "0x64"), "width is 0; it must be"),
        (("--size", "64x0"), "height is 0; it must be"),
        (("--size", "65x64"), "width 65 is not a multiple of"),
        (("--size", "64x100"), "; use "),
        (("--size", "100000x64"), "width is 100000; it must be"),
        (("--size", "9999999x64"), "is not WIDTHxHEIGHT"),
        (("--size=-64x64",), "is not WIDTHxHEIGHT"),
        (("--size", "large"), "is not WIDTHxHEIGHT"),
        (("-W", "64"), "--size or --width and --height"),
        (("--steps", "0"), "num_inference_steps is 0"),
        (("--steps", "-1"), "num_inference_steps is -1"),
        (("--steps", "1000000"), "num_inference_steps is 1000000"),
        (("--guidance", "nan"), "guidance_scale is nan"),
        (("--cfg-scale", "inf"), "guidance_scale is inf"),
        (("--guidance", "-1"), "guidance_scale is -1.0"),
        (("--temperature", "warm"), "is neither a number nor two"),
        (("--temperature", "1,2,3"), "is neither a number nor two"),
        (("--temperature", "nan"), "temperature is nan"),
        (("-s", "-2"), "seed is -2"),
        (("-s", str(2**64)), "seed is"),
        (("-b", "0"), "num_images_per_prompt is 0"),
        (("-b", "-5"), "num_images_per_prompt is -5"),
        (("--threads", "0"), "threads is 0"),
        (("--device", "abacus"), "abacus"),
        (("-b", "2", "-o", "a.png"), "2 pictures would all be a.png"),
        (("-o", "{name}.png"), "only {seed} and {index} are filled in"),
        (("-o", "{}.png"), "only {seed} and {index} are filled in"),
        (("-o", "a.txt"), "does not end in .png"),
        (("-o", "a"), "does not end in .png"),
        (("-o", "a\0.png"), "NUL character"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, tuple) else "",
)
def test_what_cannot_be_meant(refused: Refused, words: tuple[str, ...], reason: str) -> None:
    assert reason in refused(2, "a fox", *words)


@pytest.mark.parametrize("side", ["-W", "-H"])
@pytest.mark.parametrize("value", ["0", "-64", "65", str(10**9)])
def test_sides_that_cannot_be_meant(
    bundle: Path, studio: Path, side: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "a fox", "-m", str(bundle), "--device", "cpu", "--steps", "1", side, value]) == 2
    assert f"{'width' if side == '-W' else 'height'} " in capsys.readouterr().err
    assert list(studio.iterdir()) == []


@pytest.mark.parametrize(
    "words", [("--steps", "many"), ("-s", "1.5"), ("--guidance", "strong"), ("--no-such-flag",), ("a fox", "and a hen")]
)
def test_what_the_parser_refuses(
    generate: Generate, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        generate("a fox", *words)
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_stdin_that_is_no_prompt(refused: Refused, feed_stdin: FeedStdin, monkeypatch: pytest.MonkeyPatch) -> None:
    for data, reason in (
        (b"", "the prompt is empty"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"a\0b", "control character"),
        ("狐".encode() * 400_000, "is longer than"),
        (b"x" * 1_000_000, "at most 20000"),
    ):
        feed_stdin(data)
        assert reason in refused(2, "-")
    monkeypatch.setattr(sys, "stdin", None)
    assert "there is no stdin" in refused(2, "-")


def test_unknown_model(refused: Refused, tmp_path: Path) -> None:
    assert "there is no bundle 'no-such-model'" in refused(3, "a fox", model="no-such-model")
    assert "there is no bundle 'a\\x00b'" in refused(3, "a fox", model="a\0b")
    (tmp_path / "empty").mkdir()
    assert "has no bundle.json" in refused(3, "a fox", model=str(tmp_path / "empty"))


def shorten(folder: Path) -> None:
    path = folder / "transformer.onnx.data"
    path.write_bytes(path.read_bytes()[:-1])


def remove(folder: Path) -> None:
    (folder / "vq_decoder.onnx").unlink()


def add(folder: Path) -> None:
    (folder / "setup.py").write_text("print('hello')", encoding="utf-8")


def scramble_graph(folder: Path) -> None:
    path = folder / "sampler.onnx"
    path.write_bytes(b"\xff" * path.stat().st_size)


def scramble_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(b"[" * path.stat().st_size)


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (shorten, "'transformer.onnx.data' has "),
        (remove, "'vq_decoder.onnx' is missing"),
        (add, "'setup.py' is not declared"),
        (scramble_graph, "'sampler.onnx' is no readable ONNX model"),
        (scramble_tokenizer, "tokenizer.json"),
        (lambda folder: (folder / "bundle.json").write_bytes(b"\0"), "bundle.json"),
        (lambda folder: edit_manifest(folder, format_version=99), "99"),
        (
            lambda folder: edit_manifest(folder, family="cubism"),
            f"family 'cubism' is unknown here; known are {', '.join(sorted(FAMILIES))}",
        ),
        (lambda folder: edit_manifest(folder, family_revision=99), "revision 99 of family meissonic"),
    ],
    ids=["shortened", "missing", "added", "graph", "tokenizer", "manifest", "newer", "family", "revision"],
)
def test_a_changed_bundle(
    refused: Refused, bundle: Path, tmp_path: Path, damage: Callable[[Path], object], reason: str
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    damage(copy)
    message = refused(3, "a fox", model=str(copy))
    assert reason in message
    assert f"bundle {copy} is refused" in message


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="the GPU flavour is installed")
def test_a_device_that_cannot_be_had(refused: Refused) -> None:
    message = refused(4, "a fox", "--device", "cuda")
    assert 'pip install "pochade[gpu]"' in message


def test_folders_that_cannot_be_written(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert "there is no folder" in refused(1, "a fox", "-o", str(tmp_path / "file" / "a.png"))
    assert "there is no folder" in refused(1, "a fox", "-o", "nowhere/a.png")
    assert "it is a folder" in refused(1, "a fox", "-o", str(tmp_path))
    # Rights do not stop an administrator.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert "is not writable" in refused(1, "a fox")


def test_a_folder_that_takes_no_file_after_all(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "x")

    monkeypatch.setattr("pochade.runtime.image.tempfile.NamedTemporaryFile", refuse)
    assert refused(1, "a fox", "-o", "a.png") == "pochade: cannot write a.png: Permission denied\n"


@pytest.mark.skipif(sys.platform == "win32", reason="limits of the process")
def test_a_full_disk_leaves_nothing(refused: Refused, studio: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Fails in the middle of a write, as a full disk does; the signal that comes with it is ignored by Python.
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        message = refused(1, "a fox", "-o", "a.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert message.startswith("pochade: cannot write a.png: ")


def test_a_full_disk_keeps_the_old_picture(
    generate: Generate, studio: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(image: Image.Image, file: io.BufferedWriter, **_: object) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    Path("a.png").write_bytes(b"old")
    monkeypatch.setattr(Image.Image, "save", fill)
    assert generate("a fox", "-o", "a.png") == 1
    assert capsys.readouterr() == ("", "pochade: cannot write a.png: No space left on device\n")
    assert [path.name for path in studio.iterdir()] == ["a.png"]
    assert Path("a.png").read_bytes() == b"old"


def test_cancelled_while_saving_leaves_nothing(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupt)
    assert refused(130, "a fox") == "pochade: cancelled\n"
