"""`pochade generate`: what it writes, and what it prints where."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from pochade.bundle import Bundle
from pochade.cli import main
from tests.cli.conftest import FeedStdin, Generate

PROMPT = "一只红狐狸 🦊, oil on wood"


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def texts(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        assert isinstance(image, PngImagePlugin.PngImageFile)
        return dict(image.text)


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
def test_the_prompt_may_come_from_stdin(generate: Generate, feed_stdin: FeedStdin, data: bytes) -> None:
    feed_stdin(data)
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
