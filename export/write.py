"""The export itself: a checkpoint folder becomes a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from pochade import __version__
from pochade.bundle import Bundle, BundleWriter, Component, TensorSpec
from pochade.errors import UsageError
from pochade.export.families import FAMILIES
from pochade.export.passes.store_half import StoreHalfPass
from pochade.export.recipes import Recipe, choose, read_recipes
from pochade.export.trace import save
from pochade.gpu_graph import with_gpu_graphs
from pochade.lora_graph import find_sites, save_lora_graph
from pochade.session_memory import weight_bytes
from pochade.strip_parts import with_parts

TOKENIZER = "tokenizer.json"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how much of it is."""


def export_checkpoint(
    checkpoint: Path,
    target: Path,
    *,
    dtype: str = "fp32",
    recipe: str | None = None,
    text_encoder: Path | None = None,
    transformer: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Bundle of a checkpoint in its published layout.

    Weights are streamed one by one, so memory stays far below the size of the checkpoint.

    Args:
        checkpoint: folder as published, or the file where a family is published as one.
        target: folder to make.
        dtype: `fp32`, or `fp16` for weights and for the activations of text encoder and transformer; what has to
            be float32 (condition, sampler, codec) computes in float32 from weights stored as float16.
        recipe: row of models.yaml; None finds the one that fits.
        text_encoder: folder of another text tower of the same shape.
        transformer: folder of another transformer for the same text tower and codec.
        overwrite: replace an existing bundle.
        progress: called as weights are written.

    Raises:
        InputRefusedError: the checkpoint is not what it should be.
        OutputError: the bundle cannot be written.
        UsageError: unknown dtype or recipe, or the target exists.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown; choose {' or '.join(DTYPES)}")
    row = choose(read_recipes(), checkpoint, recipe)
    model = FAMILIES[row.family].open(checkpoint, text_encoder, transformer)
    with BundleWriter(target, overwrite=overwrite) as writer:
        components = {}
        for name, graph in model.graphs(DTYPES[dtype]):
            if progress:
                progress(name, 0, 0)
            component = write_component(graph(), writer.path, name, dtype, progress, model.layer_bytes(name))
            if name in model.lora_components:
                path = writer.path / component.file
                component = replace(component, lora=save_lora_graph(path, find_sites(ir.load(path))))
            gpu_dtype = "float16" if name in model.half_components else "float32"
            components[name] = with_parts(with_gpu_graphs(component, writer.path, gpu_dtype), writer.path)
        first = model.tokenizer()
        if first is not None:
            first.save(str(writer.path / TOKENIZER), pretty=False)
        more_tokenizers = {}
        for name, tokenizer in model.more_tokenizers().items():
            more_tokenizers[name] = f"{name}_tokenizer.json"
            tokenizer.save(str(writer.path / more_tokenizers[name]), pretty=False)
        return writer.finish(
            name=writer.target.name,
            family=row.family,
            family_revision=model.revision,
            task=model.task,
            components=components,
            tokenizer=TOKENIZER if first is not None else None,
            scheduler=model.scheduler_manifest(),
            defaults=dict(row.defaults),
            source=_source(row, checkpoint, {"text_encoder": text_encoder, "transformer": transformer}),
            more_tokenizers=more_tokenizers,
        )


def write_component(
    model: ir.Model, folder: Path, name: str, dtype: str, progress: Progress | None, layer_bytes: dict[str, int]
) -> Component:
    """Write one graph, and say what it is.

    Args:
        model: weights may be lazy.
        folder: to write `<name>.onnx` and its data file to.
        name: of the component.
        dtype: one of `DTYPES`.
        progress: called as weights are written.
        layer_bytes: for the memory plan, see `Component.memory`.
    """
    if dtype == "fp16":
        StoreHalfPass()(model)
    path = folder / f"{name}.onnx"
    save(model, path, (lambda done, total: progress(name, done, total)) if progress else None)
    data = path.with_name(path.name + ".data")
    weights = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    return Component(
        name=name,
        file=path.name,
        external_data=(data.name,) if data.exists() else (),
        inputs=tuple(_spec(value) for value in model.graph.inputs),
        outputs=tuple(_spec(value) for value in model.graph.outputs),
        precision=dtype,
        quantization=None,
        num_parameters=sum(w.size for w in weights if w.dtype.is_floating_point()),
        memory={"weights": weight_bytes(model), **layer_bytes},
    )


def _spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None and value.dtype is not None and value.shape is not None
    shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    return TensorSpec(value.name, str(value.dtype.numpy()), shape, optional=value.is_initializer())


def _source(recipe: Recipe, checkpoint: Path, elsewhere: Mapping[str, Path | None]) -> dict[str, Any]:
    source: dict[str, Any] = {
        "recipe": recipe.name,
        "checkpoint": recipe.checkpoint,
        "folder": checkpoint.resolve().name,
        "licence": recipe.licence,
        "prompts": list(recipe.prompts),
        "exporter": f"pochade {__version__}, torch {torch.__version__}",
    }
    return source | {part: folder.resolve().name for part, folder in elsewhere.items() if folder}
