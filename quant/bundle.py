"""Bundle in, bundle out: every component quantized, and what that cost written into the new one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pochade.bundle import Bundle, BundleWriter, Component, Manifest
from pochade.errors import InputRefusedError, OutputError
from pochade.quant.component import ComponentReport, quantize_component
from pochade.quant.scheme import Kind, Scheme
from pochade.quant.scorecard import Scorecard

FLOAT_PRECISIONS = ("fp32", "fp16")

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how much of it is."""


def quantize_bundle(
    source: Path, target: Path, scheme: Scheme, *, overwrite: bool = False, progress: Progress | None = None
) -> Bundle:
    """Quantized copy of a float bundle, with its scorecard.

    Weights pass through memory one by one; the scorecard opens one component at a time.

    Args:
        source: fp32 or fp16 bundle.
        target: folder to make.
        scheme: how weights are stored.
        overwrite: replace an existing bundle.
        progress: called as weights are written and as the scorecard is measured.

    Raises:
        InputRefusedError: the source is quantized already.
        OutputError: the bundle cannot be written.
        UsageError: the scheme does not fit, or the target exists.
    """
    report = progress or (lambda *_: None)
    bundle = Bundle.open(source)
    done = [c.name for c in bundle.manifest.components.values() if c.precision not in FLOAT_PRECISIONS]
    if done:
        raise InputRefusedError(
            str(source), [f"{', '.join(done)} are quantized already; quantize the float bundle they came from"]
        )
    with BundleWriter(target, overwrite=overwrite) as writer:
        components = {}
        for name, component in bundle.manifest.components.items():
            components[name] = _quantized(bundle, component, writer.path, scheme, report)
        if bundle.tokenizer_path is not None:
            shutil.copyfile(bundle.tokenizer_path, writer.path / bundle.tokenizer_path.name)
        manifest = replace(
            bundle.manifest,
            name=writer.target.name,
            components=components,
            tokenizer=bundle.tokenizer_path.name if bundle.tokenizer_path else None,
            files=(),
        )
        scorecard = Scorecard.measure(bundle, Bundle(writer.path, manifest), report)
        return _finish(writer, manifest, scorecard)


def export_and_quantize(
    export: Callable[[Path], object], target: Path, scheme: Scheme, overwrite: bool, progress: Progress | None = None
) -> Bundle:
    """Quantized bundle straight from an exporter; the float bundle between them is temporary.

    Args:
        export: writes the float bundle to the folder it is given.
        target: folder to make.
        scheme: how weights are stored.
        overwrite: replace an existing bundle.
        progress: as for `quantize_bundle`.
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
        return quantize_bundle(between, target, scheme, overwrite=overwrite, progress=progress)


def _quantized(bundle: Bundle, component: Component, folder: Path, scheme: Scheme, report: Progress) -> Component:
    file = Path(component.file).name
    path = folder / file
    result = quantize_component(
        bundle.component_path(component.name),
        path,
        component.name,
        scheme,
        lambda done, total: report(f"quantizing {component.name}", done, total),
    )
    data = path.with_name(f"{file}.data")
    changed = any(weight.storage.kind is not Kind.FLOAT for weight in result.weights)
    return replace(
        component,
        file=file,
        external_data=(data.name,) if data.exists() else (),
        precision=scheme.name if changed else component.precision,
        quantization=_account(result, scheme) if changed else None,
    )


def _account(result: ComponentReport, scheme: Scheme) -> dict[str, object]:
    return {"scheme": scheme.to_manifest(), "weights": result.counts}


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
    )
