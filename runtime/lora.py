"""Low-rank changes of a bundle's layers, ready to be given to its graphs."""

from __future__ import annotations

import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pochade.bundle import Bundle
from pochade.component import AdaptedLayer
from pochade.errors import InputRefusedError, UsageError
from pochade.runtime.lora_file import LoraFile, LowRank

SHOWN = 3
"""Keys that a message names."""


NETWORK = ("transformer", "condition")
"""Components that files know as one network."""

PREFIXES: dict[str, Sequence[str]] = {
    "base_model.model.": NETWORK,
    "transformer.": NETWORK,
    "lora_unet_": NETWORK,
    "lora_transformer_": NETWORK,
    "text_encoder.": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te_": ("text_encoder",),
    "": NETWORK,
}
"""What PEFT, diffusers and Kohya's scripts put before a layer's name."""


@dataclass(frozen=True)
class LoraNames:
    """How files name the layers of a family."""

    prefixes: Mapping[str, Sequence[str]] = field(default_factory=lambda: PREFIXES)
    """Components by what files put before a layer's name, "" for nothing."""
    originals: Sequence[tuple[str, Sequence[str]]] = ()
    """Names of another layout: a regular expression, and the published layers that it stands for, rows of whose weights
    lie below each other in it. Points and underscores count as points."""


@dataclass(frozen=True)
class Change:
    """What is added to one product of a component."""

    down: NDArray[np.float32]
    """(rank, inputs)"""
    up: NDArray[np.float32]
    """(outputs, rank), zeros for layers of the product that stay as they are."""

    @property
    def squared_norm(self) -> float:
        """|B A|^2 as the trace of (B^T B) (A A^T), which never makes the large matrix."""
        return float(((self.up.T @ self.up) * (self.down @ self.down.T)).sum(dtype=np.float64))


@dataclass(frozen=True)
class Lora:
    """An opened adapter that fits a bundle."""

    path: Path
    scale: float
    """What its changes are multiplied by."""
    changes: Mapping[str, Mapping[str, tuple[Change, ...]]]
    """By component and product, see `AdaptedLayer.name`."""
    keys: int
    """Tensors of the file, and how many of them are used."""
    used_keys: int
    unused: tuple[str, ...]
    """Names of the others."""
    weight_norm: float
    """Frobenius norm of the weights that it changes."""

    @functools.cached_property
    def relative_norm(self) -> float:
        """Frobenius norm of all changes, `scale` in it, over that of the weights that they change."""
        products = itertools.chain.from_iterable(some.values() for some in self.changes.values())
        squares = sum(change.squared_norm for several in products for change in several)
        return float(abs(self.scale) * squares**0.5 / self.weight_norm) if self.weight_norm else 0.0

    def __str__(self) -> str:
        """For people."""
        share = f"{100 * self.relative_norm:.2f} % of the norm of the weights it changes"
        return f"LoRA {self.path.name}: {self.used_keys} of {self.keys} keys, {share}"

    def nbytes(self, component: str) -> int:
        """Bytes of what is added to a component."""
        changes = self.changes.get(component, {}).values()
        return sum(change.down.nbytes + change.up.nbytes for several in changes for change in several)


def open_lora(path: Path, scale: float, bundle: Bundle, names: LoraNames, partial: bool = False) -> Lora:
    """Read an adapter and find the layer of each of its changes.

    Args:
        path: see `LoraFile.open`.
        scale: finite; what the changes are multiplied by.
        bundle: whose layers are changed.
        names: of the bundle's family.
        partial: use what can be used, where otherwise a single key that cannot refuses the file.

    Raises:
        InputRefusedError: it is no LoRA, not one of this model, or not one of it alone.
        UsageError: the bundle takes none.
    """
    layers, file = _Layers(bundle, names), LoraFile.open(path)
    found: dict[str, dict[str, list[Change]]] = defaultdict(lambda: defaultdict(list))
    unused, used = list(file.unknown), 0
    whole: dict[tuple[str, str], float] = {}
    for name, low_rank in file.layers.items():
        places = layers.find(name)
        if not places:
            unused += low_rank.keys
            continue
        used += len(low_rank.keys)
        for component, product, change in _placed(file.path, name, low_rank, places):
            found[component][product.name].append(change)
        whole |= {(place.component, place.layer): place.norm for place in places}
    if not used:
        shown = ", ".join(unused[:SHOWN])
        raise InputRefusedError(str(path), [f"none of its keys belongs to {bundle.manifest.family} ({shown}, ...)"])
    if unused and not partial:
        shown = (
            f"{len(unused)} of its {used + len(unused)} keys have no place in this model ({', '.join(unused[:SHOWN])})"
        )
        raise InputRefusedError(str(path), [f"{shown}; --lora-partial uses the others"])
    changes = {name: {product: tuple(several) for product, several in some.items()} for name, some in found.items()}
    norm = sum(norm**2 for norm in whole.values()) ** 0.5
    return Lora(path, scale, changes, used + len(unused), used, tuple(unused), norm)


def stacked(loras: Sequence[Lora], component: str, dtype: str) -> dict[str, NDArray[np.floating]]:
    """Inputs of a component for several adapters at once, whose ranks add up; empty if none changes it."""
    parts: dict[str, list[tuple[float, Change]]] = defaultdict(list)
    for lora in loras:
        for product, changes in lora.changes.get(component, {}).items():
            parts[product] += [(lora.scale, change) for change in changes]
    inputs = {}
    for product, several in parts.items():
        down = np.concatenate([change.down for _, change in several]).T
        up = np.concatenate([np.float32(scale) * change.up for scale, change in several], axis=1).T
        inputs[f"{product}.lora_A"] = np.ascontiguousarray(down, dtype)
        inputs[f"{product}.lora_B"] = np.ascontiguousarray(up, dtype)
    return inputs


@dataclass(frozen=True)
class _Place:
    """Where a layer is computed."""

    component: str
    layer: str
    product: AdaptedLayer
    start: int
    """First column of its result."""

    @property
    def width(self) -> int:
        return self.product.outputs[self.layer]

    @property
    def norm(self) -> float:
        return self.product.norms[self.layer]


class _Layers:
    """Layers of a bundle by the names that files give them."""

    def __init__(self, bundle: Bundle, names: LoraNames) -> None:
        self._names = names
        self._places: dict[str, dict[str, _Place]] = {}
        for component in bundle.manifest.components.values():
            if component.lora is not None:
                products = component.lora.layers
                self._places[component.name] = {
                    _plain(place.layer): place for place in _places(component.name, products)
                }
        if not self._places:
            raise UsageError(f"{bundle.manifest.name} takes no LoRA, being an old bundle; export it again")

    def find(self, name: str) -> list[_Place]:
        """Where the layers are that a name stands for, in order; none if it stands for nothing here."""
        plain = _plain(name)
        for prefix, components in self._names.prefixes.items():
            if plain.startswith(_plain(prefix)):
                places = self._within(plain.removeprefix(_plain(prefix)), components)
                if places:
                    return places
        return []

    def _within(self, plain: str, components: Sequence[str]) -> list[_Place]:
        wanted: Sequence[str] = [plain]
        for pattern, layers in self._names.originals:
            match = re.fullmatch(pattern, plain)
            if match is not None:
                wanted = [_plain(match.expand(layer)) for layer in layers]
        known: dict[str, _Place] = {}
        for component in components:
            known |= self._places.get(component, {})
        return [known[layer] for layer in wanted] if all(layer in known for layer in wanted) else []


def _places(component: str, products: Sequence[AdaptedLayer]) -> Iterator[_Place]:
    for product in products:
        start = 0
        for layer, width in product.outputs.items():
            yield _Place(component, layer, product, start)
            start += width


def _plain(name: str) -> str:
    """A name as all formats have it: Kohya writes underscores for points, Tencent's demo points for underscores."""
    return name.replace("_", ".")


def _placed(
    path: Path, name: str, low_rank: LowRank, places: Sequence[_Place]
) -> Iterator[tuple[str, AdaptedLayer, Change]]:
    """The change of a layer of a file for each product that it concerns."""
    widths, shapes = [place.width for place in places], (low_rank.down.shape[1], len(low_rank.up))
    expected = (places[0].product.inputs, sum(widths))
    if shapes != expected:
        reason = (
            f"{name} is for {shapes[0]} inputs and {shapes[1]} outputs, the model has {expected[0]} and {expected[1]}"
        )
        raise InputRefusedError(str(path), [reason])
    rows = np.split(low_rank.up, np.cumsum(widths)[:-1])
    for product in dict.fromkeys((place.component, place.product.name) for place in places):
        here = [(p, up) for p, up in zip(places, rows, strict=True) if (p.component, p.product.name) == product]
        whole = here[0][0].product
        up = np.zeros((sum(whole.outputs.values()), low_rank.up.shape[1]), np.float32)
        for place, part in here:
            up[place.start : place.start + place.width] = part
        yield product[0], whole, Change(low_rank.down, up)
