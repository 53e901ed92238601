"""Which paths may stand in a bundle: those that every system can hold, and that stay inside."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator

from pochade.strict_json import JsonObject

_DRIVE = re.compile(r"[A-Za-z]:", re.ASCII)
_DEVICE_NAMES = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)
_LITTER = frozenset({".ds_store", "thumbs.db", "desktop.ini"})


def path_fault(path: str) -> str | None:
    """Why this path may not stand in a bundle, or None where it may."""
    parts = path.split("/")
    if "\\" in path:
        return "has a backslash, which separates on one system and is a letter on another"
    if path.startswith("/") or _DRIVE.match(path):
        return "is absolute"
    if ".." in parts:
        return "has '..' and may leave the bundle"
    if any(part in ("", ".") for part in parts):
        return "is not in its shortest form"
    if any(is_ignored(part) for part in parts):
        return "has a name that readers ignore"
    if not all(_is_portable(part) for part in parts):
        return "has a name that some system cannot hold"
    if unicodedata.normalize("NFC", path) != path:
        return "is not in Unicode's composed form (NFC)"
    return None


def is_ignored(name: str) -> bool:
    """Whether a file or folder of this name is no part of a bundle: hidden (.git, .cache), or litter."""
    return name.startswith(".") or is_litter(name)


def is_litter(name: str) -> bool:
    """Whether a file manager leaves files of this name behind without being asked."""
    return name.startswith("._") or name.casefold() in _LITTER


def folder_prefix(path: str) -> str:
    """What the paths of a file's neighbours begin with: 'vae/' for 'vae/decoder.onnx', '' at the top."""
    return path[: path.rfind("/") + 1]


def _is_portable(name: str) -> bool:
    """Whether Windows, macOS and Linux can all hold a file of this name."""
    return (
        name.isprintable()
        and not set(name) & set('<>:"|?*')
        and not name.endswith((" ", "."))
        and not _DEVICE_NAMES.fullmatch(name)
    )


def read_path(item: JsonObject, key: str) -> str:
    """A path that stays inside the bundle."""
    path = item.take(key, str, "-")
    if reason := path_fault(path):
        item.fault(key, f"{path!r} {reason}")
    return path


def read_paths(item: JsonObject, key: str) -> tuple[str, ...]:
    """Paths that stay inside the bundle."""
    paths = item.strings(key)
    for path in paths:
        if reason := path_fault(path):
            item.fault(key, f"{path!r} {reason}")
    return tuple(paths)


def folders_above(path: str) -> Iterator[str]:
    """Every folder above a path, the nearest last."""
    parts = path.split("/")
    for depth in range(1, len(parts)):
        yield "/".join(parts[:depth])


def repeated(values: Iterable[str]) -> list[str]:
    """The values that occur more than once."""
    return [value for value, times in Counter(values).items() if times > 1]
