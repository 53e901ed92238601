"""Graphics cards that are none: the CPU under their names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pochade.runtime.ort import ort
from pochade.runtime.placement import CPU as CPU_PROVIDER
from pochade.runtime.providers import CPU, Device


class Pretended:
    """A session on the CPU that says it is on a card, but for some operators."""

    def __init__(self, session: Any, provider: str, strays: list[str]) -> None:
        self._session, self._provider, self._strays = session, provider, strays

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def get_providers(self) -> list[str]:
        return [self._provider, CPU_PROVIDER]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        parts = ((self._provider, ["MatMul", "Add"]), (CPU_PROVIDER, ["Shape", *self._strays]))
        return [
            SimpleNamespace(ep_name=place, get_nodes=lambda ops=ops: [SimpleNamespace(op_type=op) for op in ops])
            for place, ops in parts
        ]

    def io_binding(self) -> Any:
        binding = self._session.io_binding()
        bind = binding.bind_output
        binding.bind_output = lambda name, _device: bind(name, "cpu")
        return binding


class Card(Device):
    """A card that is none, and the graphs that were opened on it."""

    strays: dict[str, list[str]]
    opened: list[str]
    brought: list[tuple[int, ...]]
    """Shapes of all arrays that were made values."""
    captured: list[str]
    """Graphs that were opened to be captured."""

    def open(self, path: Path | bytes, options: Any, captures: bool = False) -> Any:
        assert isinstance(path, Path)
        self.opened.append(path.name)
        self.captured += [path.name] * captures
        return Pretended(CPU.open(path, options), self.provider, self.strays.get(path.name.split(".")[0], []))


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, strays: dict[str, list[str]], **more: Any) -> type[Card]:
    """Let every device be a card of that name, which lacks operators of components; gives what was opened on it."""
    Card.strays, Card.opened, Card.brought, Card.captured = strays, [], [], []

    def value(array: Any, _device: str) -> Any:
        Card.brought.append(array.shape)
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

    monkeypatch.setattr("pochade.runtime.loading.choose", lambda _: Card(name, required=True, **more))

    def empty(shape: Any, dtype: str, _device: str) -> Any:
        return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), np.dtype(dtype), "cpu", 0)

    monkeypatch.setattr("pochade.runtime.session._value", value)
    monkeypatch.setattr("pochade.runtime.session._empty", empty)
    return Card
