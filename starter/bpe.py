"""Byte-level BPE with CLIP's conventions: learning the merges, encoding, writing the files."""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"

# Letters, single digits, runs of anything else; the padding token "!" is cut out beforehand.
_PIECES = re.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|!|'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w!]|_)+", re.IGNORECASE
)

Merge = tuple[str, str]


def byte_characters() -> list[str]:
    """The printable character for each byte 0..255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


_BYTES = byte_characters()
# Ids follow the printable bytes first, then the spare characters: that is code-point order.
_ALPHABET = sorted(_BYTES)


def symbols(word: str, ends: bool = True) -> tuple[str, ...]:
    """The byte symbols of a word; the last one carries `</w>` when the word ends a piece."""
    out = [_BYTES[b] for b in word.encode("utf-8")]
    if ends:
        out[-1] += "</w>"
    return tuple(out)


def _apply(parts: Sequence[str], merge: Merge) -> tuple[str, ...]:
    """The parts with every occurrence of the merge joined, left to right."""
    out: list[str] = []
    i = 0
    while i < len(parts):
        step = 2 if tuple(parts[i : i + 2]) == merge else 1
        out.append("".join(parts[i : i + step]))
        i += step
    return tuple(out)


def learn_merges(words: Iterable[tuple[str, ...]], merges: Sequence[Merge] = ()) -> list[Merge]:
    """Merges, after the given ones, until every word is one token; the most frequent pair first."""
    done = list(merges)
    left = list(words)
    for merge in done:
        left = [_apply(word, merge) for word in left]
    while pairs := Counter(pair for word in left for pair in itertools.pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        done.append(best)
        left = [_apply(word, best) for word in left]
    return done


def caption_merges(english: Iterable[str], chinese: Iterable[str]) -> list[Merge]:
    """Merges that make every given word one token.

    Chinese runs have no spaces, so its words are learned with and without the end mark, and
    characters before words: then no merge can join the bytes of two neighbouring characters.
    """
    chinese = list(chinese)
    characters = sorted({c for word in chinese for c in word})
    both = (True, False)
    merges = learn_merges(symbols(c, ends) for c in characters for ends in both)
    merges = learn_merges((symbols(word, ends) for word in chinese for ends in both), merges)
    return learn_merges((symbols(word) for word in english), merges)


class Tokenizer:
    """Text to token ids, as CLIP's tokenizer does it from vocab.json and merges.txt."""

    def __init__(self, merges: Sequence[Merge], length: int = 32) -> None:
        self.merges = list(merges)
        self.length = length
        names = [*_ALPHABET, *(c + "</w>" for c in _ALPHABET), *("".join(m) for m in merges), START, END]
        self.ids = {name: i for i, name in enumerate(names)}
        if len(self.ids) != len(names):
            raise ValueError("two merges give the same token")
        self._cache: dict[str, list[int]] = {}

    @cached_property
    def _ranks(self) -> dict[Merge, int]:
        return {merge: rank for rank, merge in enumerate(self.merges)}

    def _piece(self, piece: str) -> list[int]:
        """Ids of one piece of text, cached."""
        if piece not in self._cache:
            if len(self._cache) > 100_000:
                self._cache.clear()
            self._cache[piece] = [self.ids[piece]] if piece in (PAD, START, END) else self._merge(piece)
        return self._cache[piece]

    def _merge(self, piece: str) -> list[int]:
        """Ids of a word: its bytes, joined by rank."""
        parts = symbols(piece)
        last = len(self._ranks)
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: self._ranks.get(pair, last))
            if best not in self._ranks:
                break
            parts = _apply(parts, best)
        return [self.ids[part] for part in parts]

    def pieces(self, text: str) -> list[int]:
        """Ids of the text alone, without start, end and padding."""
        clean = " ".join(unicodedata.normalize("NFC", text).split()).lower()
        return [i for piece in _PIECES.findall(clean) for i in self._piece(piece)]

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Padded ids of the texts, int64 (len(texts), length)."""
        out = np.zeros((len(texts), self.length), np.int64)
        for row, text in zip(out, texts, strict=True):
            ids = [self.ids[START], *self.pieces(text)[: self.length - 2], self.ids[END]]
            row[: len(ids)] = ids
        return out

    def save(self, folder: Path) -> None:
        """Write vocab.json and merges.txt."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(json.dumps(self.ids, ensure_ascii=False, indent=2) + "\n", "utf-8")
        lines = ["#version: 0.2", *(" ".join(merge) for merge in self.merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
