"""Fixtures of the verbs that paint."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pochade.cli import main

Generate = Callable[..., int]
Refused = Callable[..., str]
FeedStdin = Callable[[bytes], None]


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


@pytest.fixture
def feed_stdin(monkeypatch: pytest.MonkeyPatch) -> FeedStdin:
    """Lets a program read these bytes from stdin."""

    def feed(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))

    return feed
