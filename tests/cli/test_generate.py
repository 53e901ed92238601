"""`pochade generate`: what it writes, what it prints where, and how it ends when something is wrong."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

import pochade.cli
from pochade.bundle import Bundle
from pochade.cli import main
from pochade.errors import (
    BundleInvalidError,
    CancelledError,
    DeviceUnavailableError,
    InputRefusedError,
    MissingExtraError,
    NetworkNeededError,
    OutOfBudgetError,
    OutputError,
    UsageError,
)
from pochade.runtime.families import FAMILIES
from pochade.runtime.ort import ort

PROMPT = "一只红狐狸 🦊, oil on wood"
ODD_NAME = os.fsdecode(b"\xff.png")
"""A name that is no text in any encoding."""

Generate = Callable[..., int]
Refused = Callable[..., str]


@pytest.fixture
def bundle(bundles: dict[str, Path]) -> Path:
    return bundles["monetico-tiny"]


@pytest.fixture
def studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and no bundles found by name."""
    folder = tmp_path / "画室"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("POCHADE_HOME", str(tmp_path / "home"))
    return folder


@pytest.fixture
def generate(bundle: Path, studio: Path) -> Generate:
    """Runs the verb on the tiny model; options given later count, so every default can be replaced."""

    def run(*words: str, model: str = str(bundle)) -> int:
        return main(["generate", "-m", model, "--device", "cpu", "--size", "64x64", "--steps", "2", *words])

    return run


@pytest.fixture
def refused(generate: Generate, studio: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs the verb, and returns the one line it gives as the reason when it ends with `code` and writes nothing."""

    def run(code: int, *words: str, **options: Any) -> str:
        assert generate(*words, **options) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("pochade: ") and err.endswith("\n") and len(err.splitlines()) == 1, err
        assert list(studio.iterdir()) == []
        return err

    return run


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def texts(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        assert isinstance(image, PngImagePlugin.PngImageFile)
        return dict(image.text)


def feed_stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))


# what it makes


def test_writes_a_picture_and_prints_its_path(
    generate: Generate, studio: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(PROMPT, "-s", "7") == 0
    out, err = capsys.readouterr()
    assert out == "pochade-7.png\n"
    assert err.startswith("seed 7  ") and err.endswith(" on cpu\n") and len(err.splitlines()) == 1
    assert [path.name for path in studio.iterdir()] == ["pochade-7.png"]
    with Image.open("pochade-7.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))
    assert Path("pochade-7.png").stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def test_a_picture_tells_how_it_was_made(generate: Generate, bundle: Path) -> None:
    assert generate(PROMPT, "-n", "模糊", "-s", "7", "--guidance", "3.5", "-o", "画.png") == 0
    found = texts(Path("画.png"))
    assert isinstance(found["parameters"], PngImagePlugin.iTXt), "tEXt would be Latin-1"
    lines = found["parameters"].splitlines()
    assert lines[:2] == [PROMPT, "Negative prompt: 模糊"]
    for part in ("Steps: 2", "CFG scale: 3.5", "Seed: 7", "Size: 64x64", "Model: monetico-tiny"):
        assert part in lines[2].split(", ")
    settings = json.loads(found["pochade"])
    assert (settings["prompt"], settings["negative_prompt"], settings["seed"]) == (PROMPT, "模糊", 7)
    assert settings["bundle_sha256"] == Bundle.open(bundle).digest


def test_a_seed_paints_the_same_picture_again(generate: Generate, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(PROMPT, "-o", "first.png") == 0
    seed = capsys.readouterr().err.split()[1]
    assert json.loads(texts(Path("first.png"))["pochade"])["seed"] == int(seed)
    assert generate(PROMPT, "-s", seed, "-o", "second.png") == 0
    assert generate(PROMPT, "-s", str(int(seed) + 1), "-o", "third.png") == 0
    assert pixels(Path("first.png")) == pixels(Path("second.png")) != pixels(Path("third.png"))


def test_metadata_can_be_left_out(generate: Generate) -> None:
    assert generate(PROMPT, "-o", "a.png", "--no-metadata") == 0
    assert texts(Path("a.png")) == {}
    assert b"fox" not in Path("a.png").read_bytes()


def test_a_batch_counts_seeds_up(generate: Generate, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(PROMPT, "-s", "5", "-b", "3", "-o", "{index}-{seed}.png") == 0
    out, err = capsys.readouterr()
    assert out.split() == ["0-5.png", "1-6.png", "2-7.png"]
    assert err.startswith("seed 5, 6, 7  ")
    assert generate(PROMPT, "-s", "6", "-o", "alone.png") == 0
    assert pixels(Path("alone.png")) == pixels(Path("1-6.png"))
    assert texts(Path("alone.png")) == texts(Path("1-6.png"))


def test_an_existing_file_is_replaced(generate: Generate) -> None:
    Path("a.png").write_bytes(b"old")
    assert generate(PROMPT, "-o", "a.png") == 0
    assert len(pixels(Path("a.png"))) == 64 * 64 * 3


def test_other_formats_say_that_they_carry_no_settings(generate: Generate, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(PROMPT, "-o", "a.JPG") == 0
    assert capsys.readouterr().err.startswith("note: .JPG files carry no prompt and settings")
    assert generate(PROMPT, "-s", "3", "-o", "a.webp", "--no-metadata", "-q") == 0
    assert capsys.readouterr() == ("a.webp\n", "seed 3\n")
    for name, expected in (("a.JPG", "JPEG"), ("a.webp", "WEBP")):
        with Image.open(name) as image:
            assert (image.format, image.size) == (expected, (64, 64))


def test_sizes_by_side(generate: Generate) -> None:
    assert main(["generate", "-p", PROMPT, "-m", "x", "--size", "64", "-W", "1"]) == 2
    assert generate("-p", PROMPT, "--size", "96×64", "-o", "a.png") == 0
    with Image.open("a.png") as image:
        assert image.size == (96, 64)


def test_for_machines(generate: Generate, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(PROMPT, "-s", "1", "-b", "2", "--json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert PROMPT in out, "not escaped"
    report = json.loads(out)
    assert report["files"] == ["pochade-1.png", "pochade-2.png"]
    assert report["seeds"] == [1, 2]
    assert report["settings"]["width"] == 64
    assert set(report["providers"].values()) == {"CPUExecutionProvider"}
    assert {"text", "condition", "denoise", "decode", "total"} <= report["timings"].keys()
    assert report["notes"] == []


def test_quiet_and_verbose(generate: Generate, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(PROMPT, "-s", "1", "-q") == 0
    assert capsys.readouterr() == ("pochade-1.png\n", "seed 1\n")
    assert generate(PROMPT, "-s", "1", "-v") == 0
    out, err = capsys.readouterr()
    assert out == "pochade-1.png\n"
    plan, (told, phases) = err.splitlines()[:5], err.splitlines()[5:]
    assert plan[0].startswith("plan: at most ")
    assert [line.split()[0] for line in plan[1:]] == ["text", "condition", "denoise", "decode"]
    assert told.startswith("seed 1")
    assert "denoise " in phases


def test_auto_says_when_it_takes_the_cpu(generate: Generate, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(PROMPT, "--device", "auto", "--json") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert bool(report["notes"]) == err.startswith("note: ")
    if report["settings"]["device"] != "cpu":
        assert report["notes"] == []


@pytest.mark.parametrize("data", [PROMPT.encode() + b"\r\n", b"\xef\xbb\xbf" + PROMPT.encode()])
def test_the_prompt_may_come_from_stdin(generate: Generate, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    feed_stdin(monkeypatch, data)
    assert generate("-", "-o", "a.png") == 0
    assert json.loads(texts(Path("a.png"))["pochade"])["prompt"] == PROMPT


def test_a_long_prompt_is_painted_and_said_to_be_cut(generate: Generate, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"word{number}" for number in range(100)]
    assert generate("\n".join(words), "-o", "a.png") == 0
    out, err = capsys.readouterr()
    assert out == "a.png\n"
    note = err.splitlines()[0]
    assert len(err.splitlines()) == 2, "a prompt with line breaks must not break the note"
    assert note.startswith("note: only the first ") and "77 tokens" in note and "it was cut at …" in note
    # The cut is where the note says: a prompt of just the first part gives the same picture and no note.
    fits = int(note.split("first ")[1].split()[0])
    seed = err.splitlines()[1].split()[1]
    assert generate("\n".join(words)[:fits], "-s", seed, "-o", "b.png") == 0
    assert "note" not in capsys.readouterr().err
    assert pixels(Path("a.png")) == pixels(Path("b.png"))


@pytest.mark.parametrize(
    "prompt", ["🦊" * 500, "\u202eright to left", "a\tred\nfox", "e\u0301" * 60, "!" * 90, "%s{}\\"]
)
def test_odd_text_is_a_prompt(generate: Generate, prompt: str) -> None:
    assert generate(prompt, "-o", "a.png") == 0
    assert json.loads(texts(Path("a.png"))["pochade"])["prompt"] == prompt


# what it refuses


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


def test_stdin_that_is_no_prompt(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    for data, reason in (
        (b"", "the prompt is empty"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"a\0b", "control character"),
        ("狐".encode() * 400_000, "is longer than"),
        (b"x" * 1_000_000, "at most 20000"),
    ):
        feed_stdin(monkeypatch, data)
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


# how the program ends


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal of its own")
def test_ctrl_c_while_painting(bundle: Path, tmp_path: Path) -> None:
    """A real signal to a real process, sent once its progress bar shows that it paints."""
    # Whoever started the tests in the background may have left SIGINT ignored.
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from pochade.cli import main; sys.exit(main())"
    )
    words = ["generate", "a fox", "-m", str(bundle), "--device", "cpu", "--steps", "1000", "-b", "1000"]
    terminal, stderr = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script, *words],
        stdout=subprocess.PIPE,
        stderr=stderr,
        cwd=tmp_path,
        start_new_session=True,
        env={**os.environ, "NO_COLOR": "1"},
    )
    try:
        os.close(stderr)
        seen = b""
        until = time.monotonic() + 300
        while b"painting" not in seen and time.monotonic() < until:
            seen += os.read(terminal, 65536)
        process.send_signal(signal.SIGINT)
        seen = drain(terminal)
        out, _ = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert process.returncode == 130
    assert out == b""
    assert b"Traceback" not in seen and b"Exception" not in seen
    assert seen.endswith(b"\r\x1b[Kpochade: cancelled\r\n")
    assert list(tmp_path.iterdir()) == []


def drain(terminal: int) -> bytes:
    """What is still written to a terminal until its last writer is gone."""
    seen = b""
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # as Linux says it
            return seen
        if not data:
            return seen
        seen += data


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("no"), 2, "no"),
        (BundleInvalidError("x", ["a", "b"]), 3, "bundle x is refused: a; b"),
        (DeviceUnavailableError("no"), 4, "no"),
        (OutOfBudgetError("no"), 5, "no"),
        (InputRefusedError("x", ["a"]), 6, "x is refused: a"),
        (NetworkNeededError("no"), 7, "no"),
        (CancelledError("no"), 130, "no"),
        (KeyboardInterrupt(), 130, "cancelled"),
        (OutputError("no"), 1, "no"),
        (MissingExtraError("no"), 1, "no"),
        (OSError(errno.EIO, "Input/output error", "f"), 1, "[Errno 5] Input/output error: 'f'"),
        (UsageError("two\nlines\x1b[2J"), 2, "two\N{REPLACEMENT CHARACTER}lines\N{REPLACEMENT CHARACTER}[2J"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    line: str,
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr("pochade.cli.models.run", fail)
    # In a child, dropping stdout is meant; here it would take away pytest's own.
    monkeypatch.setattr(pochade.cli, "_drop_output", lambda: None)
    assert main(["models"]) == code
    assert capsys.readouterr() == ("", f"pochade: {line}\n")


def test_help_names_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["generate", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "6 input file refused" in " ".join(out.split())
    assert f"pochade {pochade.__version__}\n" in out
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2


def child(*words: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "pochade", *words]
    return subprocess.run(command, stderr=subprocess.PIPE, timeout=600, **options)


def test_a_reader_that_goes_is_no_reason_to_complain() -> None:
    read, write = os.pipe()
    os.close(read)
    done = child("models", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_stdout_that_takes_nothing() -> None:
    with Path("/dev/full").open("wb") as full:
        done = child("models", stdout=full)
    assert (done.returncode, done.stderr) == (1, b"pochade: [Errno 28] No space left on device\n")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep names as text")
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_any_file_name_can_be_printed(bundle: Path, tmp_path: Path, encoding: str) -> None:
    names = [ODD_NAME, "狐.png"]
    for name in names:
        words = ["generate", "a fox", "-m", str(bundle), "--device", "cpu", "--size", "64x64", "--steps", "1"]
        words += ["-s", "1", "-q"]
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = child(*words, "-o", name, cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (0, b"seed 1\n")
        escaped = name.encode("ascii", "backslashreplace")
        assert done.stdout == (os.fsencode(name) if encoding == "utf-8" else escaped) + b"\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
