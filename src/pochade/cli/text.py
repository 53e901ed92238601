"""Numbers and tables for people to read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def human_size(size: int) -> str:
    """Bytes in the largest decimal unit that leaves a number above 1: 12.3 MB."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.95:
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def human_count(number: int) -> str:
    """A number of parameters the way model names say it: 12, 3.46 M, 1.18 B."""
    if number < 1_000_000:
        return f"{number:,}"
    return f"{number / 1e6:.2f} M" if number < 1_000_000_000 else f"{number / 1e9:.2f} B"


def plural(number: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def printable(text: str) -> str:
    """The text without characters that could move the cursor or hide what follows."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def brief(value: object) -> str:
    """A JSON value in a few words; lists and objects with much in them are only counted."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return f"{{{pairs(value)}}}" if len(value) <= 4 else plural(len(value), "value")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(brief, value))}]" if len(value) <= 8 else plural(len(value), "value")
    return f"{value:.6g}" if isinstance(value, float) else printable(str(value))


def pairs(values: Mapping[str, object]) -> str:
    """`bits 4, block_size 32`."""
    return ", ".join(f"{printable(key)} {brief(value)}" for key, value in values.items())


def table(rows: Iterable[Sequence[str]], indent: str = "") -> str:
    """Rows in columns that line up; every row has as many cells as the first."""
    lines = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(indent + line.rstrip() for line in padded)
