"""From a PyTorch module with unset weights to an ONNX graph whose weights are read when it is saved."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
)
from onnxscript import optimizer
from torch import Tensor

from pochade.export.component import ComponentPlan, WeightSource
from pochade.export.passes.fold_transpose import FoldTransposePass
from pochade.export.passes.part_inputs import PartInputsPass

OPSET = 20
"""Newest opset where every kernel used exists on CPU, CUDA and WebGPU."""
IR_VERSION = 10
INLINE_BYTES = 1024
"""Smaller tensors stay in the graph file: ONNX Runtime wants shape constants there."""
ALIGNMENT = 65536
"""So that every platform can map a large tensor straight from the file."""


def build(plan: ComponentPlan) -> ir.Model:
    """Traced and simplified graph of a component; its weights are lazy."""
    model = _trace(plan)
    graph = model.graph
    names = [value.name for value in graph.inputs]
    if names != list(plan.inputs) or [value.name for value in graph.outputs] != list(plan.outputs):
        raise AssertionError(f"{plan.name}: traced ports {names} differ from the plan")
    with _weights_out_of_reach(graph, plan):
        optimizer.optimize_ir(model, input_size_limit=4096, output_size_limit=65536)
    ir.passes.Sequential(
        LiftConstantsToInitializersPass(lift_all_constants=True),
        IdentityEliminationPass(),
        FoldTransposePass(),
        PartInputsPass(),
        CommonSubexpressionEliminationPass(),
        RemoveUnusedNodesPass(),
    )(model)
    _finish(model, plan)
    return model


def save(model: ir.Model, path: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Write the graph and, where it has weights, a file `<name>.data` beside it; they pass through one by one."""
    data = path.with_name(f"{path.name}.data")

    def callback(_: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        if progress:
            progress(info.index, info.total)

    ir.save(
        model,
        path,
        external_data=data.name,
        size_threshold_bytes=INLINE_BYTES,
        alignment=ALIGNMENT,
        callback=callback,
    )
    if data.stat().st_size == 0:
        # Made even where nothing is large enough for it, and a bundle may hold no unused file.
        data.unlink()


def _trace(plan: ComponentPlan) -> ir.Model:
    shapes = tuple(dict(plan.dynamic.get(name, {})) for name in plan.inputs)
    with torch.no_grad(), _quiet():
        exported = torch.export.export(plan.module, tuple(plan.inputs.values()), dynamic_shapes=shapes, strict=False)
        # Folding is left to _weights_out_of_reach: the weights hold nothing yet.
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            input_names=list(plan.inputs),
            output_names=list(plan.outputs),
        )
    assert program is not None
    return program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's remarks about libraries that we do not use."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _weights_out_of_reach(graph: ir.Graph, plan: ComponentPlan) -> Iterator[None]:
    """Show the parameters to the optimizer as graph inputs, so that it cannot fold what they do not hold yet.

    Afterwards they are initializers again, lazy ones.
    """
    parameters = dict(plan.module.named_parameters())
    hidden = [value for name, value in graph.initializers.items() if name in parameters]
    for value in hidden:
        assert value.name is not None
        graph.initializers.pop(value.name)
        # Rewrite rules look at the constant behind a value too, e.g. to drop a bias that happens to be zero.
        value.const_value = None
        graph.inputs.append(value)
    yield
    for value in hidden:
        assert value.name is not None
        graph.inputs.remove(value)
        if value.uses():
            example = parameters[value.name]
            value.const_value = lazy(value.name, example.shape, example.dtype, plan.weights[value.name])
            graph.register_initializer(value)


def lazy(name: str, shape: torch.Size, dtype: torch.dtype, source: WeightSource) -> ir.LazyTensor:
    """Tensor that is read, checked against `shape` and cast to `dtype` each time its data is asked for."""

    def read() -> ir.Tensor[Any]:
        tensor = source()
        if tensor.shape != shape:
            raise AssertionError(f"weight {name} came as {list(tensor.shape)}, the graph has {list(shape)}")
        return to_ir(tensor.detach().to(dtype), name)

    kind = {torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16}[dtype]
    return ir.LazyTensor(read, dtype=kind, shape=ir.Shape(shape), name=name)


def to_ir(tensor: Tensor, name: str) -> ir.Tensor[Any]:
    """Torch tensor as an ONNX tensor that shares its memory."""
    return ir.Tensor(tensor.contiguous().numpy(), name=name)


def _set_default(graph: ir.Graph, value: ir.Value, default: Tensor) -> None:
    """Let an input be an initializer too, which is what it is where a run leaves it out (ONNX IR, "Graphs")."""
    assert value.name is not None
    value.const_value = to_ir(default, value.name)
    graph.register_initializer(value)


def _finish(model: ir.Model, plan: ComponentPlan) -> None:
    """Name the axes, drop what the exporter noted about its own source, pin the versions."""
    graph = model.graph
    graph.name = plan.name
    for value in (*graph.inputs, *graph.outputs):
        assert value.name is not None
        value.shape = ir.Shape(plan.axes[value.name])
        if value.name in plan.defaults:
            _set_default(graph, value, plan.defaults[value.name])
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
    graph.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "pochade", None
    model.ir_version = IR_VERSION
    model.graph.opset_imports[""] = OPSET
    model.graph.opset_imports["com.microsoft"] = 1
