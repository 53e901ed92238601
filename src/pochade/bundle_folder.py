"""What really lies in a folder, told without following a link or opening anything but a regular file."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from pochade.bundle_paths import is_ignored

_CHUNK = 1 << 20
_WINDOWS_JUNCTION = 0xA0000003


def kind_fault(info: os.stat_result) -> str | None:
    """Why a thing of this kind may not stand where a file should, or None for a regular file."""
    if is_link(info):
        return "is a link, and a bundle holds the files themselves"
    return None if stat.S_ISREG(info.st_mode) else "is not a regular file"


def is_link(info: os.stat_result) -> bool:
    """Whether this is a symbolic link, or a junction, as Windows calls its links between folders."""
    return stat.S_ISLNK(info.st_mode) or getattr(info, "st_reparse_tag", 0) == _WINDOWS_JUNCTION


def regular_files(folder: Path, skip: Callable[[str], bool] = is_ignored) -> tuple[dict[str, int], list[str]]:
    """Sizes of the regular files below a folder by relative path, and a fault for each thing of another kind."""
    sizes: dict[str, int] = {}
    faults: list[str] = []
    pending = [""]
    while pending:
        prefix = pending.pop()
        try:
            found = [(path.name, path.lstat()) for path in sorted((folder / prefix).iterdir())]
        except OSError as error:
            faults.append(f"folder {prefix or '.'!r} cannot be read: {error.strerror}")
            continue
        for name, info in found:
            if skip(name):
                continue
            if stat.S_ISDIR(info.st_mode) and not is_link(info):
                pending.append(f"{prefix}{name}/")
            elif reason := kind_fault(info):
                faults.append(f"{prefix + name!r} {reason}")
            else:
                sizes[prefix + name] = info.st_size
    return sizes, faults


def file_sha256(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """The file's sha256, read in pieces; `on_bytes` is told after each how many bytes it has seen."""
    digest = hashlib.sha256()
    piece = memoryview(bytearray(_CHUNK))
    done = 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
            done += count
            if on_bytes is not None:
                on_bytes(done)
    return digest.hexdigest()


def flush_tree(folder: Path) -> None:
    """Wait until everything below a folder is on the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            _flush(Path(place, name))
        flush_names(Path(place))


def flush_names(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can be asked for that."""
    # Windows cannot open a folder, and some network file systems refuse; the files themselves are safe by then.
    with contextlib.suppress(OSError):
        _flush(folder)


def _flush(path: Path) -> None:
    # Windows flushes only what is open for writing, and elsewhere a copied file may be read-only.
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
