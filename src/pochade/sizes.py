"""Sizes as people write them: of memory, and of pictures."""

from __future__ import annotations

import re

from pochade.errors import UsageError

_BYTES = re.compile(r"(\d{1,18}(?:\.\d{0,18})?|\.\d{1,18})\s*([kMGT]?)(i?)B?", re.ASCII)
_POWERS = {"": 0, "k": 1, "M": 2, "G": 3, "T": 4}


def read_bytes(text: str, what: str) -> int:
    """Bytes of a size such as 0.9G, 850M or 2GiB; units are decimal but for those with an i.

    Args:
        text: the size.
        what: whose it is, for the message.

    Raises:
        UsageError: it is none.
    """
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{what} {text!r} is not a size such as 0.9G, 850M or 12500000")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2]])


def read_picture_size(text: str) -> tuple[int, int]:
    """Width and height of a size such as 1024x768.

    Raises:
        UsageError: it is none.
    """
    match = re.fullmatch(r"(\d{1,6})[xX×](\d{1,6})", text)
    if not match:
        raise UsageError(f"size {text!r} is not WIDTHxHEIGHT, e.g. 1024x768")
    return int(match[1]), int(match[2])


def show_bytes(size: int) -> str:
    """The size in gigabytes, two digits."""
    return f"{size / 1e9:.2f} GB"
