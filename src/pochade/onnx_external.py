"""Which files an ONNX graph reads its tensors from, found without the onnx package.

ONNX Runtime opens whatever a tensor's `external_data` names, so a bundle is asked first. Only the few messages of
onnx.proto that lead to a tensor are walked; everything else is skipped by its length. What this reader cannot follow
it refuses: a file that two protobuf parsers might read differently could show one thing here and another there.
"""

from __future__ import annotations

import enum
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

MAX_DEPTH = 64
"""Messages within messages; subgraphs within subgraphs take three each, and protobuf itself stops at 100."""

MAX_FIELDS = 10_000_000
"""Fields read before a file is given up; a graph of 5 MB has less than a million."""

_VARINT, _BYTES = 0, 2
_FIXED_SIZES = {1: 8, 5: 4}
_EXTERNAL = 1

_Buffer: TypeAlias = "bytes | mmap.mmap"


class MalformedModelError(ValueError):
    """The file is no ONNX model, or one that is not written as a serializer would write it."""


@dataclass
class ModelFacts:
    """What a graph brings in from outside of its own file."""

    external: dict[str, int] = field(default_factory=dict)
    """For each location: how many bytes its file must have at least."""
    operators: set[str] = field(default_factory=set)
    """Names of all operators in use, subgraphs and functions included."""


class _Kind(enum.Enum):
    """The messages of onnx.proto on the way to a tensor."""

    MODEL = enum.auto()
    TRAINING = enum.auto()
    GRAPH = enum.auto()
    FUNCTION = enum.auto()
    NODE = enum.auto()
    ATTRIBUTE = enum.auto()
    SPARSE = enum.auto()
    TENSOR = enum.auto()


# Field numbers as in onnx.proto: in which message, under which number, which message lies.
_CHILDREN: dict[_Kind, dict[int, _Kind]] = {
    _Kind.MODEL: {7: _Kind.GRAPH, 20: _Kind.TRAINING, 25: _Kind.FUNCTION},
    _Kind.TRAINING: {1: _Kind.GRAPH, 2: _Kind.GRAPH},
    _Kind.GRAPH: {1: _Kind.NODE, 5: _Kind.TENSOR, 15: _Kind.SPARSE},
    _Kind.FUNCTION: {7: _Kind.NODE, 11: _Kind.ATTRIBUTE},
    _Kind.NODE: {5: _Kind.ATTRIBUTE},
    _Kind.ATTRIBUTE: {
        5: _Kind.TENSOR,
        6: _Kind.GRAPH,
        10: _Kind.TENSOR,
        11: _Kind.GRAPH,
        22: _Kind.SPARSE,
        23: _Kind.SPARSE,
    },
    _Kind.SPARSE: {1: _Kind.TENSOR, 2: _Kind.TENSOR},
}
# Parsers merge a second occurrence of these into the first, so a location and its offset could come from two places.
_SINGULAR = {
    _Kind.MODEL: {7},
    _Kind.TRAINING: {1, 2},
    _Kind.ATTRIBUTE: {5, 6, 22},
    _Kind.SPARSE: {1, 2},
}
_NODE_OP_TYPE = 4
_TENSOR_EXTERNAL_DATA = 13
_TENSOR_DATA_LOCATION = 14


def read_model_facts(path: Path) -> ModelFacts:
    """What the model in this file reads from outside of it.

    Raises:
        MalformedModelError: The file cannot be followed to its end.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            raise MalformedModelError("is empty")
        # Weights inside the file are skipped by their length, so their pages are never touched.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return model_facts(data)


def model_facts(data: _Buffer) -> ModelFacts:
    """What this serialised ModelProto reads from outside of itself.

    Raises:
        MalformedModelError: The bytes cannot be followed to their end.
    """
    walk = _Walk(data)
    # A stack of our own instead of recursion: the depth of a hostile file must not become that of the interpreter.
    stack = [walk.children(_Kind.MODEL, 0, len(data))]
    while stack:
        child = next(stack[-1], None)
        if child is None:
            stack.pop()
        elif child[0] is _Kind.TENSOR:
            walk.read_tensor(*child[1:])
        elif len(stack) == MAX_DEPTH:
            raise MalformedModelError(f"nests more than {MAX_DEPTH} messages")
        else:
            stack.append(walk.children(*child))
    if not walk.has_graph:
        raise MalformedModelError("holds no graph")
    return walk.facts


class _Walk:
    """One pass over the bytes of a model."""

    def __init__(self, data: _Buffer) -> None:
        self.data = data
        self.facts = ModelFacts()
        self.has_graph = False
        self.fields_left = MAX_FIELDS

    def children(self, kind: _Kind, start: int, end: int) -> Iterator[tuple[_Kind, int, int]]:
        """The messages within this one that lead to tensors; the operator of a node is noted on the way."""
        self.has_graph |= kind is _Kind.GRAPH
        kinds = _CHILDREN[kind]
        singular = _SINGULAR.get(kind, ())
        seen = set()
        for number, wire, first, last in self._fields(start, end):
            if number in kinds:
                _need_bytes(wire)
                if number in singular and number in seen:
                    raise MalformedModelError("has a message twice where one belongs")
                seen.add(number)
                yield kinds[number], first, last
            elif number == _NODE_OP_TYPE and kind is _Kind.NODE:
                _need_bytes(wire)
                self.facts.operators.add(self._text(first, last))

    def read_tensor(self, start: int, end: int) -> None:
        """Note the file this tensor lies in, if it lies in one."""
        entries: dict[str, str] = {}
        is_external = False
        for number, wire, first, last in self._fields(start, end):
            if number == _TENSOR_EXTERNAL_DATA:
                _need_bytes(wire)
                key, value = self._entry(first, last)
                if key in entries:
                    raise MalformedModelError(f"has a tensor with two values for {key[:40]!r}")
                entries[key] = value
            elif number == _TENSOR_DATA_LOCATION:
                is_external = wire == _VARINT and first == _EXTERNAL
        if entries or is_external:
            self._note_external(entries)

    def _note_external(self, entries: dict[str, str]) -> None:
        if not entries.get("location"):
            raise MalformedModelError("has a tensor outside of the file without a location")
        needed = _byte_count(entries, "offset") + _byte_count(entries, "length")
        external = self.facts.external
        external[entries["location"]] = max(needed, external.get(entries["location"], 0))

    def _entry(self, start: int, end: int) -> tuple[str, str]:
        """Key and value of a StringStringEntryProto."""
        parts: dict[int, str] = {}
        for number, wire, first, last in self._fields(start, end):
            if number not in (1, 2) or number in parts:
                raise MalformedModelError("has a tensor whose place is not stated by one key and one value")
            _need_bytes(wire)
            parts[number] = self._text(first, last)
        return parts.get(1, ""), parts.get(2, "")

    def _fields(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Number, wire type, first and last byte of each field; a varint's value stands in place of its first byte."""
        data = self.data
        at = start
        while at < end:
            self.fields_left -= 1
            if self.fields_left < 0:
                raise MalformedModelError(f"has more than {MAX_FIELDS} fields")
            tag = data[at]
            if tag < 0x80:
                at += 1
            else:
                tag, at = self._varint(at, end)
            wire = tag & 7
            first = at
            if wire == _BYTES:
                length, first = self._varint(at, end)
                at = first + length
            elif wire == _VARINT:
                first, at = self._varint(at, end)
            elif wire in _FIXED_SIZES:
                at += _FIXED_SIZES[wire]
            else:
                raise MalformedModelError(f"has a field of the unknown wire type {wire}")
            if at > end:
                raise MalformedModelError("ends before its last field does")
            if not 0 < tag >> 3 < 1 << 29:
                raise MalformedModelError("has a field without a valid number")
            yield tag >> 3, wire, first, at

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """The number that starts here and the place after it."""
        value = shift = 0
        while at < end and shift < 70:
            byte = self.data[at]
            at += 1
            if byte < 0x80:
                return value | byte << shift, at
            value |= (byte & 0x7F) << shift
            shift += 7
        raise MalformedModelError("has a number without an end")

    def _text(self, first: int, last: int) -> str:
        try:
            return self.data[first:last].decode()
        except UnicodeDecodeError:
            raise MalformedModelError("has a name that is no UTF-8") from None


def _byte_count(entries: dict[str, str], key: str) -> int:
    """A count of bytes, 0 where it is not given."""
    digits = entries.get(key, "0")
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 19):
        raise MalformedModelError(f"has a tensor with {digits[:40]!r} as its {key}")
    return int(digits)


def _need_bytes(wire: int) -> None:
    if wire != _BYTES:
        raise MalformedModelError("has a number where a message belongs")
