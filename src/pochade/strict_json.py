"""JSON from a stranger: read strictly, with every fault collected instead of the first one raised."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

_T = TypeVar("_T")
_KINDS = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
}


def parse_object(text: str) -> dict[str, Any]:
    """The one object in this text.

    Raises:
        ValueError: It is no JSON, or JSON that two readers could take for different things.
    """
    try:
        values = json.loads(
            text, object_pairs_hook=_without_duplicates, parse_constant=_no_constant, parse_float=_finite
        )
        # Half of a surrogate pair passes json, then breaks the first print or file name it meets.
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("has text that is no Unicode") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"must hold an object, not {_KINDS[type(values)]}")
    return values


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a dict, refused where a key stands twice: readers differ about which one counts."""
    values = dict(pairs)
    if len(values) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {key!r} stands twice in one object")
    return values


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _finite(digits: str) -> float:
    """The number; 1e999 would otherwise slip in as infinity."""
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is too large a number")
    return number


class JsonObject:
    """One object being read: what is wrong in it goes to `faults`, and a harmless value comes back instead.

    Every key asked for must be there, so that a misspelt key shows up as a missing one; keys nobody asks for are
    left alone.
    """

    def __init__(self, values: Mapping[str, Any], faults: list[str], at: str = "") -> None:
        self.values = values
        self.faults = faults
        self.at = at
        """Where the object stands, as a prefix for its keys: 'components.text_encoder.'."""

    def fault(self, key: str, reason: str) -> None:
        """Note what is wrong with the value under this key."""
        self.faults.append(f"{self.at}{key} {reason}")

    def take(self, key: str, kind: type[_T], empty: _T) -> _T:
        """The value under this key, or `empty` where it is missing or of another kind."""
        if key not in self.values:
            self.fault(key, "is missing")
            return empty
        value = self.values[key]
        return value if self._is_kind(value, key, kind) else empty

    def is_null(self, key: str) -> bool:
        """Whether the key is there and says null."""
        return key in self.values and self.values[key] is None

    def optional_object(self, key: str) -> dict[str, Any] | None:
        """The object under a key that may be null."""
        return None if self.is_null(key) else self.take(key, dict, {})

    def text(self, key: str) -> str:
        """A line of text that says something."""
        value = self.take(key, str, "-")
        if not value.strip() or not value.isprintable():
            self.fault(key, "is empty or has control characters")
        return value

    def count(self, key: str, least: int) -> int:
        """A whole number of at least so much."""
        value = self.take(key, int, least)
        if value < least:
            self.fault(key, f"is {value}, less than {least}")
        return value

    def strings(self, key: str) -> list[str]:
        """A list of texts."""
        values = self.take(key, list, [])
        return [value for index, value in enumerate(values) if self._is_kind(value, f"{key}[{index}]", str)]

    def objects(self, key: str) -> list[JsonObject]:
        """A list of objects."""
        values = self.take(key, list, [])
        return [
            JsonObject(value, self.faults, f"{self.at}{key}[{index}].")
            for index, value in enumerate(values)
            if self._is_kind(value, f"{key}[{index}]", dict)
        ]

    def children(self, key: str) -> dict[str, JsonObject]:
        """An object of objects."""
        return {
            name: JsonObject(value, self.faults, f"{self.at}{key}.{name}.")
            for name, value in self.take(key, dict, {}).items()
            if self._is_kind(value, f"{key}.{name}", dict)
        }

    def _is_kind(self, value: object, key: str, kind: type[Any]) -> bool:
        # Exact, since True is an int to Python and not to JSON.
        if type(value) is kind:
            return True
        self.fault(key, f"must be {_KINDS[kind]}, not {_KINDS[type(value)]}")
        return False
