"""Options that several verbs share."""

from __future__ import annotations

import argparse


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """-v and -q."""
    parser.add_argument("-v", "--verbose", action="count", default=0, help="tell more on stderr")
    parser.add_argument("-q", "--quiet", action="count", default=0, help="no progress bar, no summary")


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help=what)
