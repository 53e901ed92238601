"""Options that several verbs share."""

from __future__ import annotations

import argparse
from pathlib import Path

from pochade.errors import OutputError


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """-v and -q."""
    parser.add_argument("-v", "--verbose", action="count", default=0, help="tell more on stderr")
    parser.add_argument("-q", "--quiet", action="count", default=0, help="no progress bar, no summary")


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help=what)


def check_folders(*files: Path | None) -> None:
    """Refuse files to be written whose folder is missing, before the long part.

    Raises:
        OutputError: one is.
    """
    for path in files:
        if path is not None and not path.parent.is_dir():
            raise OutputError(f"cannot write {path}: there is no folder {path.parent}")
