"""How much each weight's forms cost: bytes in the file, and noise in what the component gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pochade.errors import InputRefusedError
from pochade.quant import half_layers
from pochade.quant.blocks import round_blocks
from pochade.quant.component import ALIGNMENT, INLINE_BYTES, decide
from pochade.quant.fidelity import Call, Difference
from pochade.quant.instrument import Instrument
from pochade.quant.moments import Moment, input_moments
from pochade.quant.rtn import block_count, channel_scales, round_channels, unpack_blocks
from pochade.quant.scheme import CHANNELS, HALF, Kind, Scheme, Storage, Use, blocks
from pochade.quant.select import Weight
from pochade.quant.streamed import read
from pochade.runtime.graph import GraphSession

TRIALS = 4
"""Recorded calls that every trial is run on, spread over the recording."""

Array = NDArray[Any]
Progress = Callable[[int, int], None]
"""Weights measured, and all there are."""


@dataclass(frozen=True)
class Option:
    """One form of one weight."""

    storage: Storage
    bytes: int
    """In the data file, padding to whole pages included."""
    noise: float
    """Power of the error in the component's float outputs as a share of their power, this weight alone rounded."""

    def to_json(self) -> dict[str, Any]:
        """For journals and recipes."""
        return {"storage": self.storage.to_manifest(), "bytes": self.bytes, "noise": self.noise}


class Journal:
    """Measurements on disk, a line each, so that an interrupted search goes on where it stopped."""

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        """Read what is there.

        Args:
            path: the file; made with the first entry.
            key: what the measurements depend on; a file with another key is begun anew.
        """
        self.path = path
        self._key = json.dumps({"key": dict(key)}, sort_keys=True)
        self._noise: dict[str, dict[str, float]] = {}
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        if lines[:1] != [self._key]:
            self._fresh = True
            return
        self._fresh = False
        for line in lines[1:]:
            try:
                entry = json.loads(line)
                self._noise[entry["weight"]] = entry["noise"]
            except (ValueError, KeyError, TypeError):
                break  # the line that was being written when the process ended

    def get(self, path: str) -> dict[str, float] | None:
        """Noise by storage of the weight at `component/name`, if it was measured."""
        return self._noise.get(path)

    def put(self, path: str, noise: dict[str, float]) -> None:
        """Keep a measurement."""
        self._noise[path] = noise
        with self.path.open("w" if self._fresh else "a", encoding="utf-8") as file:
            if self._fresh:
                file.write(self._key + "\n")
                self._fresh = False
            file.write(json.dumps({"weight": path, "noise": noise}) + "\n")

    def remove(self) -> None:
        """Delete the file: what it was for is done."""
        self.path.unlink(missing_ok=True)


def forms(use: Use, scheme: Scheme) -> tuple[Storage, ...]:
    """The forms a weight may choose from, the smallest first."""
    size = scheme.linear.block_size or 128
    if use is Use.CONV:
        return (CHANNELS, HALF)
    return (blocks(4, size), blocks(8, size), HALF)


def stored_bytes(weight: Weight, storage: Storage) -> int:
    """Bytes of a weight in the data file."""
    numbers = int(weight.tensor.size)
    match storage.kind:
        case Kind.BLOCKS:
            assert storage.block_size is not None
            count = weight.rows * block_count(weight.width, storage.block_size)
            codes = count * storage.block_size if weight.use is Use.LINEAR else numbers
            return _pages(codes * storage.bits // 8) + _pages(count * weight.dtype.itemsize)
        case Kind.CHANNELS | Kind.DYNAMIC | Kind.STATIC:
            return _pages(numbers) + _pages(4 * weight.rows)
        case Kind.HALF:
            return _pages(2 * numbers)
        case _:
            return _pages(numbers * weight.tensor.dtype.itemsize)


def other_bytes(model: ir.Model, weights: Sequence[Weight]) -> int:
    """Bytes that a graph's other initializers take in the data file."""
    names = {weight.name for weight in weights}
    tensors = (v.const_value for graph in model.graphs() for k, v in graph.initializers.items() if k not in names)
    return sum(_pages(tensor.nbytes) for tensor in tensors if tensor is not None and tensor.nbytes > INLINE_BYTES)


def _pages(size: float) -> int:
    return -(-int(size) // ALIGNMENT) * ALIGNMENT


def measure(
    path: Path, component: str, scheme: Scheme, calls: Sequence[Call], journal: Journal, progress: Progress
) -> dict[str, tuple[Option, ...]]:
    """Every weight's options, cheapest first; a weight that has no choice has one, without noise.

    The smallest form of each weight is tried for real: the component runs with it and with all else exact. What the
    larger forms cost is inferred from that and from how much smaller their error is in the layer's own output.

    Args:
        path: the float graph.
        component: its name in the bundle.
        scheme: decides what has no choice (exact and tiny weights, the user's rules), and how weights are rounded.
        calls: recorded runs of the component.
        journal: keeps what was measured.
        progress: told about each weight.
    """
    # For moments and trials alike: a second session would map all weights once more.
    instrument = Instrument(path)
    weights = instrument.weights
    fixed = {name for name, weight in weights.items() if not _has_choice(weight, component, scheme)}
    out: dict[str, tuple[Option, ...]] = {
        name: (Option(kept, stored_bytes(weights[name], kept), 0.0),)
        for name in fixed
        for kept in [decide(weights[name], component, scheme)]
    }
    missing = [name for name in weights if name not in fixed and journal.get(f"{component}/{name}") is None]
    # Tried on other pictures than those the rounding was fitted to, or GPTQ would look better than it is.
    fitted = calls[: len(calls) - len(calls) // 4]
    unseen = calls[len(fitted) :] or calls
    trials = _spread(unseen)
    exact = [instrument.run(call.inputs) for call in trials] if missing else []
    done = len(weights) - len(missing)
    for name, moment in _with_moments(instrument, missing, fitted):
        progress(done, len(weights))
        noise = _noise(instrument, weights[name], scheme, moment, trials, exact)
        journal.put(f"{component}/{name}", noise)
        done += 1
    for name, weight in weights.items():
        if name in fixed:
            continue
        known = journal.get(f"{component}/{name}") or {}
        out[name] = tuple(
            Option(storage, stored_bytes(weight, storage), known[str(storage)]) for storage in forms(weight.use, scheme)
        )
    return out


def layers_noise(path: Path, calls: Sequence[Call]) -> float:
    """What layers kept in float16 cost by themselves, all weights exact: noise power as a share of the signal's.

    Args:
        path: the float graph.
        calls: recorded runs of the component.
    """
    model = ir.load(path)
    if not half_layers.rewrite(model):
        return 0.0
    session = GraphSession(ir.to_proto(model).SerializeToString(), path.parent)
    total = Difference()
    for call in _spread(calls):
        total.add(call.outputs, session.run(list(call.outputs), call.inputs))
    return total.noise / total.signal if total.signal else 0.0


def _spread(calls: Sequence[Call]) -> Sequence[Call]:
    """At most TRIALS of the calls."""
    return calls[:: max(1, len(calls) // TRIALS)][:TRIALS]


def _has_choice(weight: Weight, component: str, scheme: Scheme) -> bool:
    """Whether the scheme leaves the weight's form open."""
    path = f"{component}/{weight.name}"
    kept = decide(weight, component, scheme)
    is_measured = (weight.use, kept.kind) == (Use.CONV, Kind.STATIC)
    ruled = kept.kind is Kind.FLOAT or is_measured or any(rule.matches(path) for rule in scheme.keep)
    # Two 4-bit codes share a byte.
    return not ruled and not (weight.use is Use.EMBEDDING and weight.width % 2)


def _with_moments(
    instrument: Instrument, names: Sequence[str], calls: Sequence[Call]
) -> Iterator[tuple[str, Moment | None]]:
    """The weights with what is known of their inputs, in an order that needs few moments at a time."""
    left = dict.fromkeys(names)
    for name, moment in input_moments(instrument, names, calls):
        del left[name]
        yield name, moment
    for name in left:
        yield name, None


def _noise(
    instrument: Instrument,
    weight: Weight,
    scheme: Scheme,
    moment: Moment | None,
    trials: Sequence[Call],
    exact: Sequence[Mapping[str, Array]],
) -> dict[str, float]:
    """Noise of every form of a weight, by the form's short name."""
    options = forms(weight.use, scheme)
    kept = {storage: rounded(weight, storage, scheme.rounding, moment) for storage in options}
    smallest = options[0]
    total = Difference()
    replaced = {weight.name: kept[smallest].astype(weight.tensor.dtype.numpy(), copy=False)}
    for call, expected in zip(trials, exact, strict=True):
        found = instrument.run(call.inputs, replaced)
        total.add({name: v for name, v in expected.items() if np.issubdtype(v.dtype, np.floating)}, found)
    measured = total.noise / total.signal if total.signal else 0.0
    own = {storage: _layer_error(weight, kept[storage], moment) for storage in options}
    base = own[smallest]
    return {str(storage): measured * (own[storage] / base if base else 0.0) for storage in options}


def rounded(weight: Weight, storage: Storage, method: str, moment: Moment | None) -> Array:
    """The weight as it comes back from a form, in its own shape, float32.

    Raises:
        InputRefusedError: it holds NaN or infinity.
    """
    original = read(weight.tensor)
    if storage.kind is Kind.HALF:
        with np.errstate(over="ignore"):
            return original.astype(np.float16).astype(np.float32)
    if storage.kind is Kind.CHANNELS:
        try:
            scales = channel_scales(original, weight.axis)
        except FloatingPointError as error:
            raise InputRefusedError(f"weight {weight.name}", [str(error)]) from error
        wide = scales.reshape([-1 if axis == weight.axis else 1 for axis in range(original.ndim)])
        return round_channels(original, wide).astype(np.float32) * wide
    four_bit_linear = weight.use is Use.LINEAR and storage.bits == 4
    held = round_blocks(weight, storage, method if four_bit_linear else "rtn", moment)
    rows = unpack_blocks(held.packed, held.scales, storage.bits, weight.width)
    return rows if weight.axis == 0 else np.ascontiguousarray(rows.T)


def _layer_error(weight: Weight, kept: Array, moment: Moment | None) -> float:
    """Power of a layer's output error, up to a factor that is the same for all forms of the weight."""
    error = (read(weight.tensor).astype(np.float32) - kept).astype(np.float32, copy=False)
    if moment is None:
        return float(np.square(error, dtype=np.float64).sum())
    rows = error if weight.axis == 0 else error.T
    return float(np.einsum("ij,ij->", rows @ moment.damped.astype(np.float32), rows))
