"""Where bundles are found by name; needs neither onnxruntime nor numpy."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pochade
from pochade.errors import BundleNotFoundError

BUILT_IN = Path(pochade.__file__).parent / "models"
"""Bundles that ship inside the package."""


def resolve(model: str) -> Path:
    """Folder of a bundle given by path or by installed name.

    Raises:
        BundleNotFoundError: there is neither; lists the installed names.
    """
    path = Path(model)
    if (path / "bundle.json").is_file():
        return path
    by_name = {folder.name: folder for folder in installed()}
    if model in by_name:
        # A folder of that name without a bundle in it, such as starter/ of the checkout, does not hide the bundle.
        return by_name[model]
    if path.is_dir():
        return path
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
