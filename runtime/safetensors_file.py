"""Tensors of a safetensors file, read with numpy alone (https://github.com/huggingface/safetensors, format section).

The file is eight bytes of length, a JSON header of that length, and the tensors. It is opened as something that anybody
may have written: nothing is believed before it was checked against the size of the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pochade.errors import InputRefusedError
from pochade.strict_json import parse_object

MAX_HEADER = 16 << 20
"""Bytes; that of a whole large model has less than one megabyte."""
MAX_FILE = 4 << 30
"""Bytes; the file is held in memory while its tensors are read."""

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}
"""Those that adapters come in; bfloat16 is read as the upper half of a float32."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte of the file."""


class SafetensorsFile:
    """A file in memory."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            InputRefusedError: it is no safetensors file, or says what cannot be.
        """
        self.path = path
        if not path.is_file():
            raise InputRefusedError(str(path), ["there is no such file; give the path of a .safetensors file"])
        try:
            size = path.stat().st_size
            if size > MAX_FILE:
                raise ValueError(f"has {size} bytes, more than any adapter")
            # Once, since a file has hundreds of tensors and loading an adapter should take milliseconds.
            self._data = np.fromfile(path, np.uint8)
            size = len(self._data)
            length = int.from_bytes(self._data[:8].tobytes(), "little")
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise ValueError("is no safetensors file")
            header = parse_object(self._data[8 : 8 + length].tobytes().decode())
            self.metadata = _metadata(header.pop("__metadata__", {}))
            self.tensors = {name: _stored(name, entry, 8 + length, size) for name, entry in header.items()}
        except OSError as error:
            raise InputRefusedError(str(path), [f"it cannot be read: {error.strerror}"]) from None
        except ValueError as error:
            raise InputRefusedError(str(path), [f"it {error}"]) from None

    def read(self, name: str) -> NDArray[np.float32]:
        """A tensor as float32."""
        stored = self.tensors[name]
        count = math.prod(stored.shape)
        raw = np.frombuffer(self._data, DTYPES[stored.dtype], count, stored.start)
        wide = (raw.astype("<u4") << 16).view("<f4") if stored.dtype == "BF16" else raw.astype("<f4")
        return np.asarray(wide, np.float32).reshape(stored.shape)


def _metadata(value: Any) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("has metadata that are no texts")
    return value


def _stored(name: str, entry: Any, base: int, size: int) -> StoredTensor:
    """A header's entry, checked.

    Raises:
        ValueError: it cannot be meant.
    """
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"describes tensor {name!r} in an unknown way") from None
    if dtype not in DTYPES:
        raise ValueError(f"holds {name!r} as {dtype!r}; known are {', '.join(DTYPES)}")
    numbers = [start, end, *shape] if isinstance(shape, list) else [-1]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"describes tensor {name!r} by numbers that are none")
    if end - start != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize or base + end > size:
        raise ValueError(f"has no room for tensor {name!r}: it is cut short or damaged")
    return StoredTensor(dtype, tuple(shape), base + start)
