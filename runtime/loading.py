"""From a folder or an installed name to an opened pipeline."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pochade
from pochade.bundle import Bundle
from pochade.errors import BundleInvalidError, BundleNotFoundError, UsageError
from pochade.runtime.families import FAMILIES
from pochade.runtime.families.meissonic import MeissonicPipeline
from pochade.runtime.providers import choose

BUILT_IN = Path(pochade.__file__).parent / "models"
"""Bundles that ship inside the package."""


def load(
    model: str | os.PathLike[str] = "starter", *, device: str = "auto", threads: int | None = None
) -> MeissonicPipeline:
    """Pipeline of a bundle; use it as a context manager, or `close` it.

    Args:
        model: a bundle folder or an installed name.
        device: `auto`, `cpu` or `cuda`. A device asked for by name is had or refused; `auto` may fall back to the
            CPU and says so in the result.
        threads: per session; None takes the cores this process may use.

    Raises:
        BundleNotFoundError: neither a folder nor an installed name.
        BundleInvalidError: damaged, unsafe, or of a family or format this version does not know.
        DeviceUnavailableError: the device cannot be had here.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}; it must be at least 1")
    bundle = Bundle.open(resolve(os.fspath(model)))
    family, revision = bundle.manifest.family, bundle.manifest.family_revision
    if family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise BundleInvalidError(str(bundle.path), [f"family {family!r} is unknown here; known are {known}"])
    if revision != FAMILIES[family].revision:
        raise BundleInvalidError(
            str(bundle.path),
            [f"revision {revision} of family {family}, this version reads {FAMILIES[family].revision}; export it again"],
        )
    return FAMILIES[family](bundle, choose(device), threads)


def resolve(model: str) -> Path:
    """Folder of a bundle given by path or by installed name.

    Raises:
        BundleNotFoundError: there is neither; lists the installed names.
    """
    path = Path(model)
    if path.is_dir():
        return path
    by_name = {folder.name: folder for folder in installed()}
    if model in by_name:
        return by_name[model]
    raise BundleNotFoundError(
        f"there is no bundle {model!r}: it is no folder, and installed are only {', '.join(sorted(by_name)) or 'none'}"
    )


def installed() -> list[Path]:
    """Bundles found by name: the user's own first, then those that ship with the package."""
    found: dict[str, Path] = {}
    for root in (models_folder(), BUILT_IN):
        for folder in sorted(root.iterdir()) if root.is_dir() else []:
            if (folder / "bundle.json").is_file():
                found.setdefault(folder.name, folder)
    return list(found.values())


def models_folder() -> Path:
    """Where the user keeps bundles: $POCHADE_HOME/models, else the platform's folder for application data."""
    home = os.environ.get("POCHADE_HOME")
    if home:
        return Path(home) / "models"
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME", Path.home() / ".local" / "share"))
    return base / "pochade" / "models"
