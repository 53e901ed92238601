"""A second graph of a component, on the same weights, that adds low-rank changes; for export and quantization.

Each linear layer y = x W of it also adds x A B, where A (inputs, rank) and B (rank, outputs) are graph inputs of rank 0
unless a run is given others (Hu et al. 2021, arXiv 2106.09685). It is a graph of its own since 280 sums of zeros are
not free, and most pictures are painted without.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from pochade.component import INPUTS_FROM, AdaptedLayer, LoraGraph

ENDINGS = (".weight.T", ".weight")
"""Of the names that exported linear weights have, laid out (inputs, outputs) and (outputs, inputs)."""

WEIGHED = 1 << 22
"""Numbers of a weight that are squared at a time."""


@dataclass(frozen=True)
class Site:
    """Where a graph computes a linear layer, or several side by side."""

    layer: AdaptedLayer
    sources: tuple[str, ...]
    """Names of the values that it reads, side by side."""
    result: str
    """Name of the value that it gives, its bias added."""
    dtype: ir.DataType
    """What it is computed in."""


def find_sites(model: ir.Model, known: Mapping[str, AdaptedLayer] | None = None) -> list[Site]:
    """Linear layers at the top level of a graph that has not been quantized.

    Args:
        model: whose weights are read for their norms, unless they are known.
        known: layers by name, from the manifest.
    """
    return [site for node in model.graph if (site := _site(node, known or {})) is not None]


def save_lora_graph(path: Path, sites: Sequence[Site]) -> LoraGraph | None:
    """Write the second graph beside a component's first.

    Args:
        path: of the first graph, `<name>.onnx`; quantization keeps the names of values.
        sites: of the graph that the first one came from.

    Returns:
        What the manifest says about it, its file relative to the folder; None without sites.
    """
    if not sites:
        return None
    model = ir.load(path)
    values = {value.name: value for value in _values(model.graph)}
    for site in sites:
        # A later layer may read this one's result, which has to be the changed one.
        sources = [values[name] for name in site.sources]
        values[site.result] = _add_branch(model.graph, site, sources, values[site.result])
    target = path.with_name(f"{path.stem}.lora.onnx")
    ir.save(model, target)
    dtypes = {str(site.dtype.numpy()) for site in sites}
    assert len(dtypes) == 1, f"{path.name} computes linear layers in {' and '.join(dtypes)}"
    return LoraGraph(target.name, dtypes.pop(), tuple(site.layer for site in sites))


def _site(node: ir.Node, known: Mapping[str, AdaptedLayer]) -> Site | None:
    if node.op_type not in ("MatMul", "Gemm") or node.domain != "":
        return None
    weight, source = _stored(node.inputs[1]), node.inputs[0]
    if weight is None or source is None or weight.name is None or len(weight.shape) != 2:
        return None
    if INPUTS_FROM in weight.name:
        return _parted_site(node, known)
    names = [_layer(part) for part in weight.name.split("+")]
    is_transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    inputs, width = reversed(weight.shape.numpy()) if is_transposed else weight.shape.numpy()
    result = _with_bias(node, width)
    widths = _widths(result, width, len(names))
    if not all(names) or widths is None:
        return None
    outputs = dict(zip((name for name in names if name), widths, strict=True))
    layer = known.get(next(iter(outputs)))
    if layer is None:
        norms = dict(zip(outputs, _norms(weight, widths, axis=0 if is_transposed else 1), strict=True))
        layer = AdaptedLayer(int(inputs), outputs, norms)
        if isinstance(weight, ir.ExternalTensor):
            weight.release()  # or every weight of the network stays mapped until the graph goes
    assert source.name is not None and result.name is not None
    return Site(layer, (source.name,), result.name, _dtype(node.inputs[1], weight))


def _parted_site(first: ir.Node, known: Mapping[str, AdaptedLayer]) -> Site | None:
    """A layer that was parted by its inputs (`pochade.export.passes.part_inputs`), at the product of the first ones."""
    stored, graph = _stored(first.inputs[1]), first.graph
    assert stored is not None and stored.name is not None and isinstance(graph, ir.Graph)
    whole, _, start = stored.name.partition(INPUTS_FROM)
    name = _layer(whole)
    if start != "0" or name is None:
        return None
    prefix = f"{whole}{INPUTS_FROM}"
    parts = sorted((int(key.removeprefix(prefix)), key) for key in graph.initializers if key.startswith(prefix))
    weights, sources = [], []
    for _, key in parts:
        reader = _reader(graph.initializers[key])
        weight, source = _stored(reader.inputs[1]), reader.inputs[0]
        assert weight is not None and source is not None and source.name is not None
        weights.append(weight)
        sources.append(source.name)
    total = _reader(first.outputs[0]).outputs[0]
    layer = known.get(name)
    if layer is None:
        norm = sum(next(_norms(weight, [weight.shape.numpy()[1]], axis=1)) ** 2 for weight in weights) ** 0.5
        inputs, width = sum(weight.shape.numpy()[0] for weight in weights), stored.shape.numpy()[1]
        layer = AdaptedLayer(inputs, {name: width}, {name: float(f"{norm:.6g}")})
        for weight in weights:
            if isinstance(weight, ir.ExternalTensor):
                weight.release()  # as below
    assert total.name is not None
    return Site(layer, tuple(sources), total.name, _dtype(first.inputs[1], stored))


def _reader(value: ir.Value) -> ir.Node:
    """The one node that reads a value, or what a Cast makes of it."""
    (use,) = value.uses()
    return _reader(use.node.outputs[0]) if use.node.op_type == "Cast" else use.node


def _stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The initializer behind a value, which a Cast may widen."""
    cast = value.producer() if value is not None else None
    if cast is not None and cast.op_type == "Cast":
        value = cast.inputs[0]
    return value.const_value if value is not None and value.is_initializer() else None


def _dtype(value: ir.Value | None, stored: ir.TensorProtocol) -> ir.DataType:
    """Type in which a stored weight is read."""
    cast = value.producer() if value is not None else None
    return stored.dtype if cast is None else ir.DataType(cast.attributes.get_int("to"))


def _layer(weight: str) -> str | None:
    """Published name of the layer that a weight belongs to."""
    return next((weight.removesuffix(ending) for ending in ENDINGS if weight.endswith(ending)), None)


def _with_bias(node: ir.Node, width: int) -> ir.Value:
    """The layer's result: that of the node, or of the Add of a bias after it, which quantization makes one node of."""
    output = node.outputs[0]
    uses = output.uses()
    if node.op_type == "MatMul" and len(uses) == 1 and not output.is_graph_output():
        add = next(iter(uses)).node
        bias = [_stored(value) for value in add.inputs if value is not output] if add.op_type == "Add" else []
        if any(tensor is not None and tuple(tensor.shape.numpy()) == (width,) for tensor in bias):
            return add.outputs[0]
    return output


def _widths(result: ir.Value, width: int, count: int) -> list[int] | None:
    """Widths of layers side by side, from the Split that takes them apart."""
    if count == 1:
        return [width]
    for use in result.uses():
        sizes = _stored(use.node.inputs[1]) if use.node.op_type == "Split" else None
        if sizes is not None and sizes.shape.numpy() == (count,):
            return [int(size) for size in sizes.numpy()]
    return None


def _norms(weight: ir.TensorProtocol, widths: Sequence[int], axis: int) -> Iterator[float]:
    """Frobenius norms of parts of a weight, to six digits."""
    parts = np.split(weight.numpy(), np.cumsum(widths)[:-1], axis=axis)
    for part in parts:
        rows = max(1, WEIGHED // part.shape[1])
        squares = (float(np.square(part[i : i + rows], dtype=np.float64).sum()) for i in range(0, len(part), rows))
        yield float(f"{sum(squares) ** 0.5:.6g}")


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _add_branch(graph: ir.Graph, site: Site, sources: Sequence[ir.Value], result: ir.Value) -> ir.Value:
    """Let everything that reads a result read it with x A B added; the sum, which takes its name."""
    after, layer = result.producer(), site.layer
    assert after is not None, f"{result.name} is no computed value"
    width = sum(layer.outputs.values())
    # A rank of its own for each: ONNX Runtime may share memory between shapes of one name.
    rank = f"{layer.name}.rank"
    down = _optional(graph, f"{layer.name}.lora_A", site.dtype, (layer.inputs, rank))
    up = _optional(graph, f"{layer.name}.lora_B", site.dtype, (rank, width))
    joined = [ir.node("Concat", sources, {"axis": -1}, name=f"{layer.name}.inputs")] if len(sources) > 1 else []
    source = joined[0].outputs[0] if joined else sources[0]
    thin = ir.node("MatMul", [source, down], name=f"{layer.name}.lora_A.product")
    wide = ir.node("MatMul", [thin.outputs[0], up], name=f"{layer.name}.lora_B.product")
    total = ir.node("Add", [result, wide.outputs[0]], name=f"{layer.name}.lora_sum")
    for node in (*joined, thin, wide, total):
        node.outputs[0].name, node.outputs[0].dtype = node.name, site.dtype
    graph.insert_after(after, [*joined, thin, wide, total])
    result.replace_all_uses_with(total.outputs[0], replace_graph_outputs=True)
    total.replace_input_with(0, result)
    result.name, total.outputs[0].name = f"{result.name}.product", result.name
    total.outputs[0].shape = result.shape
    return total.outputs[0]


def _optional(graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[Any, Any]) -> ir.Value:
    """A graph input that is an empty matrix where a run gives none."""
    empty = ir.Tensor(np.zeros([n if isinstance(n, int) else 0 for n in shape], dtype.numpy()), name=name)
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=empty)
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value
