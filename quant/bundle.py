"""Bundle in, bundle out: every component quantized, and what that cost written into the new one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from pochade.bundle import Bundle, BundleWriter, Component, Manifest
from pochade.component import LoraGraph
from pochade.errors import InputRefusedError, OutputError, UsageError
from pochade.gpu_graph import with_gpu_graphs
from pochade.lora_graph import find_sites, save_lora_graph
from pochade.quant import attention
from pochade.quant.component import ComponentReport, quantize_component
from pochade.quant.fidelity import ENCODERS, Call, Progress
from pochade.quant.int8_graph import with_int8_graphs
from pochade.quant.scheme import Scheme
from pochade.quant.scorecard import Scorecard
from pochade.quant.search import Goal, Search, folder_size, read_recipe, write_recipe
from pochade.quant.sensitivity import Journal
from pochade.quant.trial import record_calibration
from pochade.strip_parts import with_parts

ATTEMPTS = 6
"""Times a search may quantize before it gives up on its goal."""

FLOAT_PRECISIONS = ("fp32", "fp16")


def quantize_bundle(
    source: Path,
    target: Path,
    scheme: Scheme,
    *,
    goal: Goal | None = None,
    recipe: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    prompts: Sequence[str] = (),
) -> Bundle:
    """Quantized copy of a float bundle, with its scorecard.

    Weights pass through memory one by one; the scorecard opens one component at a time. A search for the best bits
    keeps its measurements in `<target>.search.jsonl` until it is done, and goes on from there if it is interrupted.

    Args:
        source: fp32 or fp16 bundle.
        target: folder to make.
        scheme: how weights are stored.
        goal: search for the forms that reach it; the scheme decides what has no choice.
        recipe: file or bundle with forms that were found earlier; a copy goes into the bundle.
        overwrite: replace an existing bundle.
        progress: called as weights are written and as the scorecard is measured.
        prompts: to calibrate with; without any, what the bundle says its model is asked for.

    Raises:
        InputRefusedError: the source is quantized already, or the recipe is none.
        OutputError: the bundle cannot be written.
        UsageError: the scheme does not fit, the target exists, or the goal cannot be reached.
    """
    report = progress or (lambda *_: None)
    bundle = Bundle.open(source)
    scheme = scheme.for_family(bundle.manifest.family)
    done = [c.name for c in bundle.manifest.components.values() if c.precision not in FLOAT_PRECISIONS]
    if done:
        raise InputRefusedError(
            str(source), [f"{', '.join(done)} are quantized already; quantize the float bundle they came from"]
        )
    if scheme.int8_encoder and not ENCODERS & bundle.manifest.components.keys():
        raise UsageError(f"{bundle.path} has no encoder of pictures whose products could be of 8 bits")
    found: dict[str, Any] | None = None
    if recipe is not None:
        scheme, found = read_recipe(recipe, scheme)
    with BundleWriter(target, overwrite=overwrite) as writer:
        calls: Mapping[str, Sequence[Call]] = {}
        if goal or scheme.is_calibrated:
            calls = record_calibration(
                bundle, prompts, report, one=not (goal or scheme.is_fitted), encodes=scheme.int8_encoder
            )
        journal = Journal(
            target.with_name(f"{target.name}.search.jsonl"),
            {"bundle": bundle.digest, "scheme": scheme.to_manifest(), "prompts": list(prompts)},
        )
        search = Search(bundle, scheme, goal, calls, journal, report) if goal else None
        for _ in range(ATTEMPTS):
            if search is not None:
                scheme = search.choose()
                found = search.recipe()
            if found is not None:
                write_recipe(found, writer.path)
            manifest = _write_components(bundle, writer, scheme, calls, report)
            scorecard = Scorecard.measure(bundle, Bundle(writer.path, manifest), report)
            if search is None or not search.tighten(folder_size(writer.path), scorecard):
                break
        else:
            raise UsageError(f"the goal was missed in {ATTEMPTS} attempts; ask for a little less")
        finished = _finish(writer, manifest, scorecard)
        journal.remove()
        return finished


def _write_components(
    bundle: Bundle, writer: BundleWriter, scheme: Scheme, calls: Mapping[str, Sequence[Call]], report: Progress
) -> Manifest:
    """Everything but the manifest itself, which says so far what the files are."""
    components = {}
    for name, component in bundle.manifest.components.items():
        components[name] = _quantized(bundle, component, writer.path, scheme, report, calls.get(name, ()))
    for file in bundle.manifest.tokenizer_files:
        (writer.path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / file, writer.path / file)
    return replace(
        bundle.manifest,
        name=writer.target.name,
        components=components,
        files=(),
    )


def export_and_quantize(
    export: Callable[[Path], object],
    target: Path,
    scheme: Scheme,
    overwrite: bool,
    progress: Progress | None = None,
    **options: Any,
) -> Bundle:
    """Quantized bundle straight from an exporter; the float bundle between them is temporary.

    Args:
        export: writes the float bundle to the folder it is given.
        target: folder to make.
        scheme: how weights are stored.
        overwrite: replace an existing bundle.
        progress: as for `quantize_bundle`.
        **options: as for `quantize_bundle`.
    """
    # Refuses a bad target before the long part, not after it.
    BundleWriter(target, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror}; choose another folder") from None
    with temporary as folder:
        between = Path(folder) / target.name
        export(between)
        return quantize_bundle(between, target, scheme, overwrite=overwrite, progress=progress, **options)


def _quantized(
    bundle: Bundle, component: Component, folder: Path, scheme: Scheme, report: Progress, calls: Sequence[Call]
) -> Component:
    file = Path(component.file).name
    path = folder / file
    result = quantize_component(
        bundle.component_path(component.name),
        path,
        component.name,
        scheme,
        lambda done, total: report(f"quantizing {component.name}", done, total),
        calls,
    )
    data = path.with_name(f"{file}.data")
    quantized = replace(
        component,
        file=file,
        external_data=(data.name,) if data.exists() else (),
        precision=scheme.name if result.changed else component.precision,
        quantization=_account(result, scheme) if result.changed else None,
        memory=_memory(component, result),
        lora=_lora(bundle, component, path),
        gpu=None,
        float_attention=None,
    )
    dtype = component.gpu.dtype if component.gpu is not None else "float32"
    quantized = with_gpu_graphs(quantized, folder, dtype)
    quantized = attention.with_float_attention(with_int8_graphs(quantized, folder, scheme), folder)
    return with_parts(quantized, folder)


def _lora(bundle: Bundle, component: Component, path: Path) -> LoraGraph | None:
    """The graph that takes low-rank changes, made anew from the quantized one."""
    if component.lora is None:
        return None
    known = {layer.name: layer for layer in component.lora.layers}
    return save_lora_graph(path, find_sites(ir.load(bundle.component_path(component.name)), known))


def _memory(source: Component, result: ComponentReport) -> dict[str, int]:
    """What planning needs to know; layers kept in float16 take half of what they took, in 8 bits a quarter."""
    layers = {name: size for name, size in (source.memory or {}).items() if name != "weights"}
    convolved = layers.pop("per_pixel_convolved", 0)
    if result.half_layers:
        layers = {name: size // 2 for name, size in layers.items()}
        if result.convolutions and convolved:
            layers["per_pixel"] -= convolved // 4
    return {"weights": result.weight_bytes, **layers}


def _account(result: ComponentReport, scheme: Scheme) -> dict[str, object]:
    return {
        "scheme": scheme.to_manifest(),
        "weights": result.counts,
        "int8_attentions": result.attentions,
        "int8_convolutions": result.convolutions,
        "half_layers": result.half_layers,
    }


def _finish(writer: BundleWriter, manifest: Manifest, scorecard: Scorecard) -> Bundle:
    return writer.finish(
        name=manifest.name,
        family=manifest.family,
        family_revision=manifest.family_revision,
        task=manifest.task,
        components=manifest.components,
        tokenizer=manifest.tokenizer,
        scheduler=manifest.scheduler,
        defaults=manifest.defaults,
        source=manifest.source,
        scorecard=scorecard.to_manifest(),
        more_tokenizers=manifest.more_tokenizers,
    )
