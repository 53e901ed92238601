"""Options that several verbs share."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from pochade.errors import OutputError, UsageError


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """-v and -q."""
    parser.add_argument("-v", "--verbose", action="count", default=0, help="tell more on stderr")
    parser.add_argument("-q", "--quiet", action="count", default=0, help="no progress bar, no summary")


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help=what)


def read_size(text: str) -> tuple[int, int]:
    """Width and height of a size such as 1024x768.

    Raises:
        UsageError: it is none.
    """
    match = re.fullmatch(r"(\d{1,6})[xX×](\d{1,6})", text)
    if not match:
        raise UsageError(f"size {text!r} is not WIDTHxHEIGHT, e.g. 1024x768")
    return int(match[1]), int(match[2])


def check_folders(*files: Path | None) -> None:
    """Refuse files to be written whose folder is missing, before the long part.

    Raises:
        OutputError: one is.
    """
    for path in files:
        if path is not None and not path.parent.is_dir():
            raise OutputError(f"cannot write {path}: there is no folder {path.parent}")
