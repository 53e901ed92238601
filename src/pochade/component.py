"""What `bundle.json` says about one component: its graphs, what they take and give, and how large they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pochade.bundle_paths import folder_prefix, read_path, read_paths, repeated
from pochade.strict_json import JsonObject

DTYPES = frozenset({"float32", "float16", "int64", "int32", "uint8", "bool"})

FREE_AXIS = "free_zero_points"
"""The axis, of length 1, by which a graph's input tells whether zero points of convolutions may be taken for constants:
they may where its length is given before the graph is opened (`pochade.quant.int8_conv`)."""

ATTENDED_HEADS = 4
"""Heads of an attention of 8-bit numbers that are computed at a time (`pochade.quant.attention`)."""

INPUTS_FROM = ".inputs_from_"
"""In names of weights of a linear layer that was parted by its inputs, before the first of them."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a component."""

    name: str
    dtype: str
    """One of `DTYPES`, spelt as NumPy does."""
    shape: tuple[int | str, ...]
    """Axes in order; text names an axis whose length is known only when it runs."""
    optional: bool = False
    """Whether an input may be left out; the graph holds what it is then."""


@dataclass(frozen=True)
class AdaptedLayer:
    """Linear layers that a low-rank change can be added to, computed as one product."""

    inputs: int
    outputs: Mapping[str, int]
    """Width of each layer's result by its published name, in the order in which they stand side by side."""
    norms: Mapping[str, float]
    """Frobenius norm of each layer's weight before quantization."""

    @property
    def name(self) -> str:
        """What its inputs `<name>.lora_A` (inputs, rank) and `<name>.lora_B` (rank, outputs) are named after."""
        return next(iter(self.outputs))


@dataclass(frozen=True)
class GpuGraph:
    """Another graph of a component, on the same data files, in the operators and types of graphics cards."""

    file: str
    dtype: str
    """What its matrix products compute in: float32 or float16; its inputs and outputs are those of the first."""
    weights: int
    """Bytes that an open session holds of the weights."""


@dataclass(frozen=True)
class Int8Graph:
    """Graphs by which a component that is stored in blocks computes with 8 bits a number, on the same data files."""

    file: str
    """Takes codes and scales of weights as further inputs; otherwise as the first."""
    expander: str
    """Gives these codes and scales, from the data files."""
    weights: int
    """Bytes that an open session and what was expanded for it hold of the weights."""


@dataclass(frozen=True)
class LoraGraph:
    """Another graph of a component, on the same data files, that takes low-rank changes as further inputs."""

    file: str
    dtype: str
    """Of the changes: float32 or float16."""
    layers: tuple[AdaptedLayer, ...]
    gpu: GpuGraph | None = None
    """The same for graphics cards; None where this one is as good there."""
    int8: Int8Graph | None = None
    """The same on expanded weights; None where nothing is stored in blocks."""
    float_attention: str | None = None
    """File of the same with attention in float32; None where it is in this one."""


@dataclass(frozen=True)
class StripPart:
    """A part of a component's graph as a graph of its own, on the same data files (`pochade.strip_parts`)."""

    file: str
    strips: Mapping[str, str]
    """Of a part that runs once for each strip, its inputs that differ from strip to strip: the values, given by earlier
    parts, along whose first axis they lie. Other inputs and all outputs bear the names of their values."""


@dataclass(frozen=True)
class Component:
    """One exported graph of a bundle."""

    name: str
    file: str
    external_data: tuple[str, ...]
    """Files that hold this graph's large tensors; like every path here, relative to the bundle."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: str
    """Short name for people and for planning: fp32, fp16, int8, int4."""
    quantization: Mapping[str, Any] | None
    """The scheme as the quantizer wrote it; None where nothing is quantized."""
    num_parameters: int
    memory: Mapping[str, int] | None = None
    """What planning needs to know, in bytes: `weights`, what an open session holds of them; `per_pixel` and
    `per_pixel_recomputed`, of a codec, the layers kept at most while it works; `per_pixel_convolved`, how much of the
    first convolutions give, which may be kept in 8 bits. None in bundles made before."""
    lora: LoraGraph | None = None
    """None for a component that takes no LoRA."""
    gpu: GpuGraph | None = None
    """None where the first graph is as good on a graphics card, or is all there is."""
    int8: Int8Graph | None = None
    """None where nothing is stored in blocks, in what runs once, and in bundles made before."""
    float_attention: str | None = None
    """File of the same graph with attention in float32, for processors whose 8-bit products may overflow; None where it
    is so in the first, and in bundles made before."""
    parts: tuple[StripPart, ...] = ()
    """Of what computes strip by strip, in the order in which they run; they keep every layer. None in bundles made
    before."""

    @property
    def graphs(self) -> tuple[str, ...]:
        """Its graph files, the first one first."""
        parts = (part.file for part in self.parts)
        return (*_files(self), *(() if self.lora is None else _files(self.lora)), *parts)

    def held_weights(self, on_gpu: bool = False) -> int:
        """Bytes that an open session holds of the weights.

        Args:
            on_gpu: on a graphics card, of the graph for one.

        Raises:
            KeyError: the bundle, an old one, does not tell.
        """
        known = (self.memory or {})["weights"]
        return self.gpu.weights if on_gpu and self.gpu is not None else known

    def variant(self, adapted: bool) -> Component | LoraGraph:
        """What to take a graph from.

        Args:
            adapted: it has to take low-rank changes, which the component must be able to.
        """
        if not adapted:
            return self
        assert self.lora is not None, f"{self.name} takes no low-rank changes"
        return self.lora

    def graph_file(self, adapted: bool, on_gpu: bool) -> str:
        """The graph to open.

        Args:
            adapted: see `variant`.
            on_gpu: it will run on a graphics card.
        """
        chosen = self.variant(adapted)
        return chosen.gpu.file if on_gpu and chosen.gpu is not None else chosen.file


def with_graphs(component: Component, kind: str, save: Callable[[str], Any]) -> Component:
    """A component with other graphs of one kind written beside its own and beside that which takes low-rank changes.

    Args:
        component: whose graphs they are made from.
        kind: `gpu`, `int8` or `float_attention`.
        save: given the file of a graph writes the other, and gives what is said about it, None where there is none.
    """
    lora = component.lora
    if lora is not None:
        lora = replace(lora, **{kind: save(lora.file)})
    return replace(component, **{kind: save(component.file)}, lora=lora)


def _files(graphs: Component | LoraGraph) -> tuple[str, ...]:
    """Graph files, that of the CPU first."""
    gpu = () if graphs.gpu is None else (graphs.gpu.file,)
    int8 = () if graphs.int8 is None else (graphs.int8.file, graphs.int8.expander)
    exact = () if graphs.float_attention is None else (graphs.float_attention,)
    return (graphs.file, *gpu, *int8, *exact)


def read_component(name: str, item: JsonObject) -> Component:
    """A component of this name; its faults are noted."""
    return Component(
        name=name,
        file=read_path(item, "file"),
        external_data=read_paths(item, "external_data"),
        inputs=_tensors(item, "inputs"),
        outputs=_tensors(item, "outputs"),
        precision=item.text("precision"),
        quantization=item.optional_object("quantization"),
        num_parameters=item.count("num_parameters", least=0),
        memory=_memory(item),
        lora=_lora(item),
        gpu=_gpu(item),
        int8=_int8(item),
        float_attention=_float_attention(item),
        parts=_parts(item),
    )


def _memory(item: JsonObject) -> dict[str, int] | None:
    """Byte counts by name, where there are any."""
    if "memory" not in item.values:
        return None
    memory = JsonObject(item.take("memory", dict, {}), item.faults, f"{item.at}memory.")
    return {name: memory.count(name, least=0) for name in memory.values}


def _lora(item: JsonObject) -> LoraGraph | None:
    """The graph that takes low-rank changes, where there is one."""
    if "lora" not in item.values:
        return None
    lora = JsonObject(item.take("lora", dict, {}), item.faults, f"{item.at}lora.")
    layers = tuple(_adapted_layer(layer) for layer in lora.objects("layers"))
    for name in repeated(name for layer in layers for name in layer.outputs):
        lora.fault("layers", f"has {name!r} twice")
    return LoraGraph(
        read_path(lora, "file"), _float_type(lora), layers, _gpu(lora), _int8(lora), _float_attention(lora)
    )


def _gpu(item: JsonObject) -> GpuGraph | None:
    """The graph for graphics cards, where there is one."""
    if "gpu" not in item.values:
        return None
    gpu = JsonObject(item.take("gpu", dict, {}), item.faults, f"{item.at}gpu.")
    return GpuGraph(read_path(gpu, "file"), _float_type(gpu), gpu.count("weights", least=0))


def _int8(item: JsonObject) -> Int8Graph | None:
    """The graphs on expanded weights, where there are any."""
    if "int8" not in item.values:
        return None
    int8 = JsonObject(item.take("int8", dict, {}), item.faults, f"{item.at}int8.")
    return Int8Graph(read_path(int8, "file"), read_path(int8, "expander"), int8.count("weights", least=0))


def _float_attention(item: JsonObject) -> str | None:
    """The file with attention in float32, where there is one."""
    return read_path(item, "float_attention") if "float_attention" in item.values else None


def _parts(item: JsonObject) -> tuple[StripPart, ...]:
    """The graphs that it is parted into, where it is."""
    return tuple(_part(part) for part in item.objects("parts")) if "parts" in item.values else ()


def _part(item: JsonObject) -> StripPart:
    strips = JsonObject(item.take("strips", dict, {}), item.faults, f"{item.at}strips.")
    return StripPart(read_path(item, "file"), {name: strips.text(name) for name in strips.values})


def _float_type(item: JsonObject) -> str:
    """float32 or float16."""
    dtype: str = item.take("dtype", str, "float32")
    if dtype not in ("float32", "float16"):
        item.fault("dtype", f"{dtype!r} is neither float32 nor float16")
    return dtype


def _adapted_layer(item: JsonObject) -> AdaptedLayer:
    outputs = JsonObject(item.take("outputs", dict, {}), item.faults, f"{item.at}outputs.")
    norms = JsonObject(item.take("norms", dict, {}), item.faults, f"{item.at}norms.")
    if not outputs.values or outputs.values.keys() != norms.values.keys():
        item.fault("outputs", "and norms do not name the same layers")
    return AdaptedLayer(
        item.count("inputs", least=1),
        {name: outputs.count(name, least=1) for name in outputs.values},
        {name: float(norms.take(name, float, 0.0)) for name in norms.values},
    )


def _tensors(item: JsonObject, key: str) -> tuple[TensorSpec, ...]:
    """The declared inputs or outputs, each with a name of its own."""
    specs = tuple(_tensor(tensor) for tensor in item.objects(key))
    if item.values.get(key) == []:
        item.fault(key, "is empty: what a component takes and gives must be declared")
    for name in repeated(spec.name for spec in specs):
        item.fault(key, f"has {name!r} twice")
    for spec in specs if key == "outputs" else ():
        if spec.optional:
            item.fault(key, f"has {spec.name!r}, which is optional: only inputs can be left out")
    return specs


def _tensor(item: JsonObject) -> TensorSpec:
    dtype = item.take("dtype", str, "float32")
    if dtype not in DTYPES:
        item.fault("dtype", f"{dtype!r} is none of {', '.join(sorted(DTYPES))}")
    axes = item.take("shape", list, [])
    for index, axis in enumerate(axes):
        if not (type(axis) is int and axis > 0) and not (type(axis) is str and axis.strip() and axis.isprintable()):
            item.fault(f"shape[{index}]", "is neither a length above 0 nor the name of an axis")
    optional = item.take("optional", bool, False) if "optional" in item.values else False
    return TensorSpec(name=item.text("name"), dtype=dtype, shape=tuple(axes), optional=optional)


def component_faults(component: Component, listed: set[str]) -> Iterator[str]:
    """Why this component cannot be made of these files."""
    for path in component.graphs:
        if not path.endswith(".onnx"):
            # ONNX Runtime reads .ort as a format of its own, which nothing here looks into.
            yield f"{path!r} does not end in .onnx"
    for path in component.external_data:
        if not path.startswith(folder_prefix(component.file)):
            yield f"{path!r} is not below the folder of {component.file!r}"
    for path in component.graphs[1:]:
        if folder_prefix(path) != folder_prefix(component.file):
            yield f"{path!r} is not in the folder of {component.file!r}"
    for path in repeated((*component.graphs, *component.external_data)):
        yield f"{path!r} is named twice"
    for path in sorted({*component.graphs, *component.external_data} - listed):
        yield f"{path!r} is not listed in files"
