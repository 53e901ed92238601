"""Files of named tensors: safetensors, and the pickles of PyTorch read without running what is in them."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pochade.errors import InputRefusedError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth")

STATE_KEYS = ("ema", "module")
"""Where a DeepSpeed state (`*_model_states.pt`) keeps the weights, the averaged ones first."""

_log = logging.getLogger(__name__)


class TensorReader(Protocol):
    """An opened file of tensors."""

    def keys(self) -> Collection[str]:
        """Names of all tensors."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    def read(self, key: str) -> Tensor:
        """A tensor as stored; backed by the file, not copied, as long as nobody changes its dtype."""


def open_tensors(path: Path) -> TensorReader:
    """Reader of a file, by the ending of its name.

    Raises:
        InputRefusedError: missing, damaged, or of another kind.
    """
    if not path.is_file():
        raise InputRefusedError(str(path), ["the file is missing"])
    if path.suffix in PICKLE_SUFFIXES:
        return PickledTensors(path)
    return SafeTensors(path)


class SafeTensors:
    """A safetensors file; its header has been checked against the file by the library."""

    def __init__(self, path: Path) -> None:
        try:
            self._file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError, ValueError) as error:
            raise InputRefusedError(str(path), [f"it is no intact safetensors file ({error})"]) from None

    def keys(self) -> Collection[str]:
        """Names of all tensors."""
        keys: list[str] = self._file.keys()
        return keys

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._file.get_slice(key).get_shape())

    def read(self, key: str) -> Tensor:
        """A tensor as stored, backed by the file."""
        tensor: Tensor = self._file.get_tensor(key)
        return tensor


class PickledTensors:
    """A state dict written by `torch.save`, flat or in a DeepSpeed state.

    Only tensors and plain containers are unpickled, and a file in today's format is mapped rather than read. Entries
    that are no tensors are passed over: what a module needs is compared by name and shape anyway.
    """

    def __init__(self, path: Path) -> None:
        _log.warning("%s is a pickle: only its tensors are read, nothing in it is run; prefer safetensors", path)
        try:
            # The format before PyTorch 1.6 is no archive and cannot be mapped.
            mapped = zipfile.is_zipfile(path)
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # whatever the unpickler and the archive reader find
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputRefusedError(str(path), [f"it is no intact file of tensors alone ({reason})"]) from None
        self._tensors = _dense(_unwrap(state))
        if not self._tensors:
            raise InputRefusedError(str(path), ["it holds no tensors by name"])

    def keys(self) -> Collection[str]:
        """Names of all tensors."""
        return self._tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[key].shape)

    def read(self, key: str) -> Tensor:
        """A tensor as stored, backed by the file where that is mapped."""
        return self._tensors[key]


def _unwrap(state: object) -> object:
    """The weights of a DeepSpeed state, one level down; any other state as it is."""
    if isinstance(state, Mapping):
        for key in STATE_KEYS:
            if isinstance(state.get(key), Mapping):
                return state[key]
    return state


def _dense(state: object) -> dict[str, Tensor]:
    """The ordinary tensors of a state dict: in memory, neither sparse nor quantized."""
    if not isinstance(state, Mapping):
        return {}
    return {
        key: value.detach()
        for key, value in state.items()
        if isinstance(key, str)
        and isinstance(value, Tensor)
        and value.device.type == "cpu"
        and value.layout is torch.strided
        and not value.is_quantized
    }
