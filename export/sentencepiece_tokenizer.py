"""A SentencePiece unigram model (Kudo 2018) as a `tokenizers` file, from the published spiece.model."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from pochade.errors import InputRefusedError

MAX_MODEL_BYTES = 64 << 20
"""That of mT5, one of the largest, has 4.3 MB."""

MAX_PIECES = 1 << 20

SPACE = "▁"
"""What SentencePiece writes for a space."""

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"

NORMAL, UNKNOWN_KIND, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of pieces."""

UNIGRAM = 1
"""The kind of model; the others join pairs, or are whole words or characters."""

FIXED = {1: 8, 5: 4}
"""Bytes of a field by protobuf wire type, for those that always have as many."""

Field = tuple[int, int | bytes]


@dataclass(frozen=True)
class SentencePieceModel:
    """What decides the ids in a `ModelProto`."""

    pieces: tuple[tuple[str, float, int], ...]
    """Text, log probability and kind of every id."""
    byte_fallback: bool
    charsmap: bytes
    """Normalization rules as a double-array trie; empty for none."""
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool

    @classmethod
    def read(cls, path: Path) -> SentencePieceModel:
        """Model in a file; field numbers are those of sentencepiece_model.proto.

        Raises:
            InputRefusedError: not readable, no such model, or of a kind that T5 has no use for.
        """
        try:
            if path.stat().st_size > MAX_MODEL_BYTES:
                raise InputRefusedError(str(path), [f"it is larger than {MAX_MODEL_BYTES >> 20} MiB"])
            data = path.read_bytes()
        except OSError as error:
            raise InputRefusedError(str(path), [f"it cannot be read ({error.strerror})"]) from None
        try:
            return cls._parse(data)
        except ValueError as error:
            raise InputRefusedError(str(path), [f"it is no SentencePiece model that can be used: {error}"]) from None

    @classmethod
    def _parse(cls, data: bytes) -> SentencePieceModel:
        pieces: list[tuple[str, float, int]] = []
        trainer: dict[int, int | bytes] = {}
        normalizer: dict[int, int | bytes] = {}
        for number, value in _fields(data):
            if number == 1:
                pieces.append(_piece(_message(value)))
                if len(pieces) > MAX_PIECES:
                    raise ValueError(f"it has more than {MAX_PIECES} pieces")
            elif number == 2:
                trainer = dict(_fields(_message(value)))
            elif number == 3:
                normalizer = dict(_fields(_message(value)))
        kind = trainer.get(3, UNIGRAM)
        if kind != UNIGRAM:
            raise ValueError(f"its model type is {kind!r}, only unigram ({UNIGRAM}) is supported")
        if normalizer.get(5, 1) != 1:
            raise ValueError("it does not escape white space")
        return cls(
            tuple(pieces),
            bool(trainer.get(35, 0)),
            _message(normalizer.get(2, b"")),
            bool(normalizer.get(3, 1)),
            bool(normalizer.get(4, 1)),
        )

    def id_of(self, text: str, kind: int) -> int:
        """Id of the piece of this text and kind.

        Raises:
            ValueError: there is none.
        """
        for i, (piece, _, found) in enumerate(self.pieces):
            if piece == text and found == kind:
                return i
        raise ValueError(f"it has no piece {text}")


def sentencepiece_tokenizer(path: Path, length: int) -> Tokenizer:
    """Tokenizer that gives text, </s> and padding, always `length` ids.

    Where the text spells </s>, <pad> or <unk> it becomes that token, as in T5's own tokenizer.

    Args:
        path: `spiece.model` as published.
        length: of a prompt.

    Raises:
        InputRefusedError: see `SentencePieceModel.read`; or it lacks a special token.
    """
    model = SentencePieceModel.read(path)
    try:
        pad, end = (model.id_of(token, CONTROL) for token in (PAD, END))
        unknown = model.id_of(UNKNOWN, UNKNOWN_KIND)
        check_charsmap(model.charsmap)
        tokenizer = Tokenizer(Unigram(_vocabulary(model), unk_id=unknown, byte_fallback=model.byte_fallback))
        steps = [*_joined_clusters(), normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    except Exception as error:  # the library raises bare Exception
        raise InputRefusedError(str(path), [f"it is no SentencePiece model that can be used: {error}"]) from None
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if model.add_dummy_prefix else "never"
    # The library matches pieces for bytes in text as well; parted from what follows, none of them can be found.
    spelt = pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "merged_with_previous")
    words = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, spelt])
    steps_back = [decoders.ByteFallback(), decoders.Metaspace(SPACE, prepend_scheme=scheme), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps_back)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, end)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (PAD, END, UNKNOWN)])
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=pad, pad_token=PAD)
    return tokenizer


def _joined_clusters() -> list[normalizers.Normalizer]:
    """What has to come before the rules of a model, which all have NFKC as their base.

    The library applies them to clusters of letters and drops what follows the first match in one, such as the voice
    mark of a halfwidth kana. In what is joined beforehand there is nothing to drop. Over all characters that Unicode
    has, alone, this differs from SentencePiece for U+0344 only, and for several marks on a letter in an order other
    than Unicode's.
    """
    # SentencePiece keeps the wide tilde where NFKC does not; a code point that is no character stands in for it.
    tilde, aside = "\uff5e", "\ufdd0"
    return [normalizers.Replace(tilde, aside), normalizers.NFKC(), normalizers.Replace(aside, tilde)]


def _vocabulary(model: SentencePieceModel) -> list[tuple[str, float]]:
    """Every piece with its score, so that each is found in text exactly where SentencePiece finds it."""
    best = max((score for _, score, kind in model.pieces if kind == NORMAL), default=0.0)
    vocabulary = []
    for text, score, kind in model.pieces:
        name, value = text, score
        if kind == USER_DEFINED:
            # Preferred to any way of putting it together from others.
            value = len(text.encode()) * best - 0.1
        elif kind == UNUSED or (kind == CONTROL and text not in (PAD, END)):
            # Never found in text: no prompt has a zero character.
            name = f"\0{text}"
        vocabulary.append((name, value))
    if len({name for name, _ in vocabulary}) != len(vocabulary):
        raise ValueError("it has a piece twice")
    return vocabulary


def check_charsmap(charsmap: bytes) -> None:
    """Make sure that following the normalization rules never leaves their tables.

    The rules are the size of a double-array trie in bytes, the trie (Yata 2008, the layout of Darts-clone) and
    replacements that end in a zero byte. A unit of the trie has its label in bits 0-7, whether a value follows in bit
    8, the distance to its children in bits 10-30, eight bits coarser if bit 9 is set; bit 31 marks a value.

    Raises:
        ValueError: it does not hold.
    """
    if not charsmap:
        return
    (size,) = struct.unpack_from("<I", charsmap)
    if size == 0 or size % 4 or size > len(charsmap) - 4:
        raise ValueError("its normalization rules are cut off")
    units = np.frombuffer(charsmap, "<u4", size // 4, 4).astype(np.int64)
    text = charsmap[4 + size :]
    text.decode()
    labels = units & 0x800000FF
    walked = (labels > 0) & (labels < 256)
    walked[0] = True
    at = np.flatnonzero(walked)
    steps = units[at]
    children = at ^ ((steps >> 10) & 0x1FFFFF) << ((steps & 0x200) >> 6)
    if (children | 0xFF).max() >= len(units):
        raise ValueError("its normalization rules lead out of their table")
    values = units[children[(steps & 0x100) != 0]] & 0x7FFFFFFF
    starts = np.frombuffer(text, np.uint8)
    if not text.endswith(b"\0") or (len(values) and values.max() >= len(text)):
        raise ValueError("its normalization rules lead out of their replacements")
    if ((starts[values] & 0xC0) == 0x80).any():
        raise ValueError("its normalization rules split a character")


def _piece(data: bytes) -> tuple[str, float, int]:
    fields = dict(_fields(data))
    text, score, kind = _message(fields.get(1, b"")).decode(), fields.get(2, bytes(4)), fields.get(3, NORMAL)
    if not text or not isinstance(kind, int) or not NORMAL <= kind <= BYTE:
        raise ValueError(f"piece {text!r} has kind {kind!r}")
    if not isinstance(score, bytes) or len(score) != 4:
        raise ValueError(f"piece {text!r} has no score")
    (value,) = struct.unpack("<f", score)
    if not math.isfinite(value):
        raise ValueError(f"piece {text!r} has the score {value}")
    return text, value, kind


def _message(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number stands where a message or text should be")
    return value


def _fields(data: bytes) -> Iterator[Field]:
    """Number and value of every field of a protobuf message; numbers of fixed size come as their bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in FIXED:
            size = FIXED[kind]
        else:
            raise ValueError(f"a field has the wire type {kind}")
        if size > len(data) - at:
            raise ValueError("a field reaches beyond the end")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it ends in the middle of a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number has more than 64 bits")
