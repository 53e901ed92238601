"""Weights on disk as ONNX Runtime packs them: mapped when a session opens, not read and packed anew.

Packing copies a component's weights into memory of the process's own every time it is opened. ONNX Runtime can write a
graph together with its packed weights; that opens in a fraction of the time, several processes share its pages, and a
system short of memory may drop them and read them again. The price is the disk: the file holds the weights twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pochade.bundle import Bundle
from pochade.machine import cpu_features, cpu_model
from pochade.manifest import FileEntry
from pochade.runtime.locate import models_folder
from pochade.runtime.strips import computes_in_strips

WORTHWHILE = 64_000_000
"""Bytes of files below which a component is opened in a blink anyway."""

GROWTH = 2.2
"""How much larger than a component's files its packed form may be, at most."""

GRAPH, SIZES = "model.onnx", "sizes.json"
_UNFINISHED = "writing-"
_ABANDONED = 3600
"""Seconds after which what another process began to write is taken for left over."""


def packed_folder() -> Path:
    """Where packed weights are kept: `packed` beside the user's bundles."""
    return models_folder().parent / "packed"


class PackedWeights:
    """Packed components in a folder, the latest used ones up to a limit.

    Several processes may use one folder: what is there is complete, since it gets its name when it is.
    """

    def __init__(self, limit: int, folder: Path | None = None, adds: bool = True) -> None:
        """Begin.

        Args:
            limit: bytes that the folder may hold.
            folder: None for that of the user, see `packed_folder`.
            adds: whether anything is written; to pack weights takes half as much memory again as to open them.
        """
        self.limit, self.adds = limit, adds
        self.folder = folder or packed_folder()

    def is_worthwhile(self, bundle: Bundle, name: str) -> bool:
        """Whether a component takes long to open, and fits.

        What computes in strips has its largest weights in bodies, which are packed anew all the same.
        """
        if computes_in_strips(bundle.manifest.components[name]):
            return False
        size = sum(entry.size for entry in _files(bundle, name))
        return size >= WORTHWHILE and GROWTH * size <= self.limit

    def find(self, key: str) -> Path | None:
        """The graph kept under a key, which counts as used now."""
        entry = self.folder / key
        with contextlib.suppress(OSError, ValueError):
            sizes = json.loads((entry / SIZES).read_text("utf-8"))
            is_sound = isinstance(sizes, dict) and GRAPH in sizes
            if is_sound and all((entry / name).stat().st_size == size for name, size in sizes.items()):
                os.utime(entry)
                return entry / GRAPH
        return None

    def add(self, key: str, write: Callable[[Path], None]) -> Path | None:
        """Keep a graph and drop what was not used for longest; None where it could not, or should not, be written.

        Args:
            key: from `packed_key`.
            write: writes the graph at a path, its data files beside it; what it raises ends the attempt.
        """
        if not self.adds:
            return None
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.folder))
        except OSError:
            return None
        try:
            write(unfinished / GRAPH)
            sizes = {path.name: path.stat().st_size for path in unfinished.iterdir()}
            (unfinished / SIZES).write_text(json.dumps(sizes), "utf-8")
            self._name(unfinished, key)
        except Exception:  # a full disk, another process that was faster, or ONNX Runtime's dozen types
            shutil.rmtree(unfinished, ignore_errors=True)
        self._trim(key)
        return self.find(key)

    def _name(self, unfinished: Path, key: str) -> None:
        """Let what is complete be found, unless another process was faster: it may be reading what it wrote."""
        try:
            unfinished.rename(self.folder / key)
        except OSError:
            if self.find(key) is not None:
                raise
            # What is there is damaged.
            self.drop(key)
            unfinished.rename(self.folder / key)

    def drop(self, key: str) -> None:
        """Remove what is kept under a key, if anything is and nobody has it open where that matters."""
        if not (self.folder / key).exists():
            return
        with contextlib.suppress(OSError), tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=self.folder) as gone:
            # Under another name first: a half-removed entry must not be found.
            (self.folder / key).rename(Path(gone) / key)

    def clear(self) -> int:
        """Remove everything; returns how many bytes that were."""
        size = self.size
        for entry in list(self._entries()):
            self.drop(entry.name)
        for path in self.folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)
        return size

    @property
    def size(self) -> int:
        """Bytes of everything that is kept."""
        return sum(map(_bytes, self._entries()))

    def _entries(self) -> Iterator[Path]:
        if self.folder.is_dir():
            yield from (path for path in self.folder.iterdir() if not path.name.startswith(_UNFINISHED))

    def _trim(self, latest: str) -> None:
        """Drop the entries that were not used for longest, and what nobody finished."""
        left = sorted(self._entries(), key=_used)
        size = sum(map(_bytes, left))
        for entry in left:
            if size > self.limit and entry.name != latest:
                size -= _bytes(entry)
                self.drop(entry.name)
        for path in self.folder.glob(f"{_UNFINISHED}*"):
            if time.time() - _used(path) > _ABANDONED:
                shutil.rmtree(path, ignore_errors=True)


def packed_key(bundle: Bundle, name: str, version: str) -> str:
    """Names a component of a bundle as this processor packs it.

    Args:
        bundle: that it is of.
        name: of the component.
        version: of ONNX Runtime.
    """
    component = bundle.manifest.components[name]
    contents = sorted((entry.path, entry.sha256) for entry in _files(bundle, name))
    decisive = [component.file, contents, version, cpu_model(), cpu_features()]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:32]


def _files(bundle: Bundle, name: str) -> list[FileEntry]:
    component = bundle.manifest.components[name]
    mine = {component.file, *component.external_data}
    return [entry for entry in bundle.manifest.files if entry.path in mine]


def _used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _bytes(entry: Path) -> int:
    size = 0
    with contextlib.suppress(OSError):
        for path in entry.iterdir():
            size += path.stat().st_size
    return size
