"""One component in, its quantized form out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from pochade.errors import UsageError
from pochade.quant import (
    attention,
    dynamic_int8,
    expand,
    gather,
    half_layers,
    int8_conv,
    int8_strips,
    nbits,
    static_int8,
    strip_folds,
)
from pochade.quant.fidelity import Call
from pochade.quant.instrument import Instrument
from pochade.quant.moments import Moment, input_moments
from pochade.quant.scheme import FLOAT, Kind, Scheme, Storage, Use
from pochade.quant.select import FLOATS, Weight, find_weights
from pochade.quant.surgery import MICROSOFT, store_in_subgraphs
from pochade.session_memory import weight_bytes

INLINE_BYTES = 1024
"""Tensors up to this size stay in the graph file: shape inference does not look into data files."""

ALIGNMENT = 4096
"""Offsets in the data file are multiples of a memory page, so that every tensor is mapped by itself, aligned."""

Progress = Callable[[int, int], None]
"""Called before each tensor is written, with the number of tensors done and their total."""

Rewrite = Callable[[Weight, Storage], None]

REWRITES: dict[tuple[Use, Kind], Rewrite] = {
    (Use.LINEAR, Kind.BLOCKS): nbits.rewrite,
    (Use.LINEAR, Kind.DYNAMIC): dynamic_int8.rewrite,
    (Use.LINEAR, Kind.HALF): expand.rewrite,
    (Use.EMBEDDING, Kind.BLOCKS): gather.rewrite,
    (Use.EMBEDDING, Kind.HALF): expand.rewrite,
    (Use.CONV, Kind.CHANNELS): expand.rewrite,
    (Use.CONV, Kind.HALF): expand.rewrite,
}
"""What to do for each use of a weight and each form but float."""


AS_HALF = replace(FLOAT, bits=16)
"""As it came, which was float16: widening it would add bytes and nothing else."""


@dataclass(frozen=True)
class StoredWeight:
    """What became of one weight."""

    name: str
    """Of the initializer in the source graph."""
    shape: tuple[int, ...]
    use: Use
    storage: Storage


@dataclass(frozen=True)
class ComponentReport:
    """What became of one component."""

    component: str
    parameters: int
    """Numbers in all float initializers of the source."""
    bytes_before: int
    """Size of the graph file and its data files."""
    bytes_after: int
    weights: tuple[StoredWeight, ...]
    """Weights of linear layers, embeddings and convolutions; everything else stays as it was."""
    attentions: int
    """Attentions that multiply 8-bit numbers."""
    convolutions: int
    """Convolutions that multiply 8-bit numbers."""
    half_layers: int
    """Layers whose output is kept in float16."""
    weight_bytes: int
    """Of the weights, in an open session."""

    @property
    def changed(self) -> bool:
        """Whether anything but the file was."""
        return bool(self.attentions or self.half_layers) or any(
            weight.storage.kind is not Kind.FLOAT for weight in self.weights
        )

    @property
    def counts(self) -> dict[str, int]:
        """Number of weights per storage, by its short form."""
        return dict(Counter(str(weight.storage) for weight in self.weights))


def quantize_component(
    source: Path,
    target: Path,
    component: str,
    scheme: Scheme,
    progress: Progress | None = None,
    calls: Sequence[Call] = (),
) -> ComponentReport:
    """Quantize the weights of one graph, tensor by tensor.

    Args:
        source: graph file; its data files lie beside it.
        target: graph file to write, elsewhere; everything above a kilobyte goes to `<target name>.data` beside it.
        component: what the bundle calls it; first half of the paths that the rules of the scheme look at.
        scheme: how to keep each weight.
        progress: told about each tensor.
        calls: runs of the float component, for methods of rounding that look at what layers are given.

    Raises:
        UsageError: source and target are the same file, or the scheme does not fit the component.
        InputRefusedError: a weight holds NaN or infinity.
    """
    if source.resolve() == target.resolve():
        raise UsageError(f"{target} would overwrite what is read: name another output")
    model = ir.load(source)
    parameters, bytes_before = _count_parameters(model), _size(source, model)
    decided = [(weight, decide(weight, component, scheme)) for weight in find_weights(model)]
    special = {w.name: (w, storage) for w, storage in decided if _is_special(w, storage, scheme)}
    for weight, storage in decided:
        if storage.kind is not Kind.FLOAT and weight.name not in special and not _is_measured(weight, storage):
            REWRITES[weight.use, storage.kind](weight, storage)
    _rewrite_special(source, special, scheme, calls, progress)
    wide = [weight for weight, storage in decided if _is_measured(weight, storage)]
    rounded = _rewrite_convolutions(source, model, wide, calls, scheme.conv)
    decided = [
        (weight, scheme.conv if _is_measured(weight, storage) and weight.name not in rounded else storage)
        for weight, storage in decided
    ]
    attentions = attention.rewrite(model) if scheme.int8_attention else 0
    narrowed = half_layers.rewrite(model) if scheme.half_layers else 0
    strip_folds.rewrite(model)
    model.graph.opset_imports.setdefault(MICROSOFT, 1)
    held = weight_bytes(model)
    store_in_subgraphs(model, INLINE_BYTES)
    data = _save(model, target, progress)
    return ComponentReport(
        component,
        parameters,
        bytes_before,
        target.stat().st_size + (data.stat().st_size if data.exists() else 0),
        tuple(StoredWeight(weight.name, weight.shape, weight.use, storage) for weight, storage in decided),
        attentions,
        len(rounded),
        narrowed,
        held,
    )


def decide(weight: Weight, component: str, scheme: Scheme) -> Storage:
    """How the scheme keeps a weight, once the weight's size and type have had their say."""
    storage = scheme.storage(weight.use, f"{component}/{weight.name}")
    if storage.kind in (Kind.DYNAMIC, Kind.STATIC) and weight.dtype is ir.DataType.FLOAT16:
        raise UsageError(
            f"scheme {scheme.name} needs float32 activations, {component} computes in float16: "
            "quantize a float32 bundle, or take scheme int4"
        )
    tiny = weight.tensor.size < scheme.min_elements
    narrow = weight.use is Use.LINEAR and weight.width < scheme.min_width
    # Two codes of a row share a byte, two rows never do.
    splits_byte = weight.use is Use.EMBEDDING and weight.width * storage.bits % 8 != 0
    if tiny or narrow or splits_byte:
        storage = FLOAT
    came_as_half = weight.tensor.dtype is ir.DataType.FLOAT16
    return AS_HALF if came_as_half and storage.kind in (Kind.FLOAT, Kind.HALF) else storage


def _is_special(weight: Weight, storage: Storage, scheme: Scheme) -> bool:
    """Whether a weight needs more than rounding to nearest."""
    other_method = storage.kind is Kind.BLOCKS and storage.bits == 4 and scheme.rounding != "rtn"
    return weight.use is Use.LINEAR and (other_method or scheme.looks_at_inputs(storage))


def _is_measured(weight: Weight, storage: Storage) -> bool:
    """Whether a weight is a convolution that has to know what it is given."""
    return (weight.use, storage.kind) == (Use.CONV, Kind.STATIC)


def _rewrite_convolutions(
    source: Path, model: ir.Model, weights: Sequence[Weight], calls: Sequence[Call], otherwise: Storage
) -> set[str]:
    """Let convolutions multiply 8-bit numbers as far as they ran in the calls, and keep the others as is said.

    Returns:
        The names of the former.
    """
    ranges = int8_conv.measure_ranges(source, calls) if weights and calls else {}
    measured = [weight for weight in weights if weight.name in ranges]
    int8_conv.rewrite(model, measured, ranges)
    int8_strips.rewrite(model)
    for weight in weights:
        if weight.name not in ranges and otherwise.kind is not Kind.FLOAT:
            expand.rewrite(weight, otherwise)
    return {weight.name for weight in measured}


def _rewrite_special(
    source: Path,
    chosen: dict[str, tuple[Weight, Storage]],
    scheme: Scheme,
    calls: Sequence[Call],
    progress: Progress | None,
) -> None:
    """Rewrite what looks at layer inputs or takes its time, a group of inputs in memory at a time."""
    left = dict(chosen)

    def rewrite(name: str, moment: Moment | None) -> None:
        weight, storage = left.pop(name)
        if storage.kind is Kind.BLOCKS:
            nbits.rewrite_calibrated(weight, storage, scheme.rounding, moment, scheme.low_rank)
        elif moment is None:
            dynamic_int8.rewrite(weight, storage)
        elif storage.kind is Kind.STATIC:
            static_int8.rewrite(weight, moment)
        else:
            dynamic_int8.rewrite_smoothed(weight, moment, scheme.smoothing)
        if progress is not None:
            progress(len(chosen) - len(left), len(chosen))

    if calls and left:
        for name, moment in input_moments(Instrument(source, replacing=False), list(left), calls):
            rewrite(name, moment)
    for name in list(left):
        rewrite(name, None)


def _save(model: ir.Model, target: Path, progress: Progress | None) -> Path:
    """Write the graph and its data file; returns where the data file is, if there is one."""
    data = target.with_name(f"{target.name}.data")

    def report(_: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        if progress is not None:
            progress(info.index, info.total)

    ir.save(
        model,
        target,
        external_data=data.name,
        size_threshold_bytes=INLINE_BYTES,
        callback=report,
        alignment=ALIGNMENT,
        align_threshold=0,
    )
    if data.stat().st_size == 0:
        # The writer makes the file even where nothing is large enough for it, and a bundle may hold no unused file.
        data.unlink()
    return data


def _count_parameters(model: ir.Model) -> int:
    tensors = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    return sum(int(tensor.size) for tensor in tensors if tensor is not None and tensor.dtype in FLOATS)


def _size(source: Path, model: ir.Model) -> int:
    tensors = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    files = {Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return source.stat().st_size + sum(path.stat().st_size for path in files)
