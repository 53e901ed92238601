"""Packed weights on disk: the same pictures, shared by processes, within their limit, and never in the way."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pochade
from pochade.runtime import opening, packed
from pochade.runtime.packed import PackedWeights, packed_key

FILES = 3
"""Of an entry: the graph, its data, and their sizes."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's own folder, in which even the starter is worth packing."""
    monkeypatch.setenv("POCHADE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(packed, "WORTHWHILE", 100_000)
    monkeypatch.setattr(opening, "PACKED_BYTES", 1000)
    return tmp_path / "home"


def writes(size: int) -> Callable[[Path], None]:
    def write(target: Path) -> None:
        target.write_bytes(bytes(size))

    return write


def painted(**options: object) -> tuple[np.ndarray, dict[str, list[float]]]:
    with pochade.load("starter", device="cpu", threads=1, **options) as pipe:  # type: ignore[arg-type]
        result = pipe("a large red star", seed=1, num_inference_steps=2)
    return np.asarray(result.images[0]), {name: times.opened for name, times in result.components.items()}


def test_pictures_are_the_same_and_graphs_are_kept(home: Path) -> None:
    expected, _ = painted()
    assert not (home / "packed").exists()
    for _ in range(2):
        found, _ = painted(packed_cache="1G")
        assert (found == expected).all()
    entries = list((home / "packed").iterdir())
    # The text encoder and the transformer; the others are small or compute in strips.
    assert entries and all(len(list(entry.iterdir())) == FILES for entry in entries)
    if os.name == "posix":
        assert stat.S_IMODE((home / "packed").stat().st_mode) == 0o700


def test_what_is_kept_is_opened(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    painted(packed_cache="1G")
    opened: list[Path] = []
    real = opening._open

    def watched(path: Path, *rest: object, **more: object) -> object:
        opened.append(path)
        return real(path, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(opening, "_open", watched)
    painted(packed_cache="1G")
    kept = [path for path in opened if home in path.parents]
    assert len(kept) == len(list((home / "packed").iterdir())) > 0


@pytest.mark.parametrize("damage", ["cut", "nonsense", "emptied"])
def test_damaged_entries_are_written_anew(home: Path, damage: str) -> None:
    expected, _ = painted(packed_cache="1G")
    for entry in (home / "packed").iterdir():
        graph = entry / packed.GRAPH
        if damage == "cut":
            graph.write_bytes(graph.read_bytes()[:-10])
        elif damage == "nonsense":
            graph.write_bytes(bytes(graph.stat().st_size))
        else:
            (entry / packed.SIZES).write_text("[1]")
    assert (painted(packed_cache="1G")[0] == expected).all()
    assert (painted(packed_cache="1G")[0] == expected).all()


def test_limit_drops_what_was_not_used_for_longest(tmp_path: Path) -> None:
    kept = PackedWeights(2500, tmp_path / "packed")
    for age, key in ((300, "old"), (200, "older"), (100, "new")):
        assert kept.add(key, writes(1000)) is not None
        os.utime(kept.folder / key, (time.time() - age, time.time() - age))
        if key == "older":
            assert kept.find("old") is not None  # used again, and so the latest
    assert kept.find("older") is None and kept.find("old") is not None and kept.find("new") is not None
    assert kept.size <= kept.limit
    assert kept.clear() > 2000 and kept.size == 0


def test_failed_writes_leave_nothing(tmp_path: Path) -> None:
    kept = PackedWeights(1000, tmp_path / "packed")

    def full(target: Path) -> None:
        target.write_bytes(bytes(10))
        raise OSError("no space left on device")

    assert kept.add("key", full) is None
    assert list(kept.folder.iterdir()) == []
    (tmp_path / "file").touch()
    assert PackedWeights(1000, tmp_path / "file").add("key", writes(10)) is None


def test_abandoned_writes_go(tmp_path: Path) -> None:
    kept = PackedWeights(1000, tmp_path / "packed")
    for name, age in (("writing-old", 2 * packed._ABANDONED), ("writing-now", 0)):
        (kept.folder / name).mkdir(parents=True)
        os.utime(kept.folder / name, (time.time() - age, time.time() - age))
    kept.add("key", writes(10))
    assert sorted(path.name for path in kept.folder.iterdir()) == ["key", "writing-now"]


def test_models_beyond_the_limit_are_left_alone(home: Path) -> None:
    painted(packed_cache=1000)
    assert not (home / "packed").exists()


def test_under_a_limit_of_memory_nothing_is_packed_but_what_is_there_is_used(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = painted(packed_cache="1G", ram="4G")
    assert not (home / "packed").exists()
    painted(packed_cache="1G")
    monkeypatch.setattr(PackedWeights, "add", lambda *_: pytest.fail("something was packed"))
    assert (painted(packed_cache="1G", ram="4G")[0] == expected).all()


def test_keys_tell_processors_and_versions_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with pochade.load("starter", device="cpu") as pipe:
        bundle = pipe.bundle
    keys = {packed_key(bundle, "transformer", "1.32.0"), packed_key(bundle, "transformer", "1.33.0")}
    keys.add(packed_key(bundle, "text_encoder", "1.32.0"))
    monkeypatch.setattr(packed, "cpu_features", lambda: ["avx2"])
    keys.add(packed_key(bundle, "transformer", "1.32.0"))
    assert len(keys) == 4


PROCESS = """
import sys
from pathlib import Path
from pochade.runtime.packed import PackedWeights

def write(target):
    target.write_bytes(bytes(1000))
    target.with_name("model.onnx.data").write_bytes(bytes(int(sys.argv[2])))

for attempt in range(100):
    kept = PackedWeights(10**6, Path(sys.argv[1])).add("key", write)
    assert kept is None or len(kept.read_bytes()) == 1000, kept
"""


def test_processes_at_once_do_not_harm_each_other(tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    command = [sys.executable, "-c", PROCESS, str(folder)]
    running = [subprocess.Popen([*command, size], stderr=subprocess.PIPE, text=True) for size in ("2000", "3000")]
    failures = [process.communicate(timeout=60)[1] for process in running]
    assert failures == ["", ""]
    assert PackedWeights(10**6, folder).find("key") is not None
    assert [path.name for path in folder.iterdir()] == ["key"]
    sizes = json.loads((folder / "key" / packed.SIZES).read_text("utf-8"))
    assert sizes[packed.GRAPH] == 1000


def test_doctor_tells_and_clears(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pochade.cli import main

    painted(packed_cache="1G")
    assert main(["doctor"]) == 0
    assert f"in {home / 'packed'}" in capsys.readouterr().out
    assert main(["doctor", "--clear-packed"]) == 0
    printed = capsys.readouterr()
    assert "of packed weights" in printed.err and "packed weights" not in printed.out
    assert list((home / "packed").iterdir()) == []
