"""From a component of a bundle to a session: which of its graphs, on which device, with which settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from pochade.bundle import Bundle, Component
from pochade.component import FREE_AXIS
from pochade.errors import BundleInvalidError, DeviceUnavailableError
from pochade.machine import has_tiles, saturates
from pochade.runtime.expanded import expanded_weights
from pochade.runtime.ort import ort
from pochade.runtime.packed import PackedWeights, packed_key
from pochade.runtime.parted import PartedSession
from pochade.runtime.placement import RECORD, Placement, placement
from pochade.runtime.providers import CPU, Device
from pochade.runtime.rounded_attention import is_rounded
from pochade.runtime.strips import computes_in_strips

PACKED_BYTES = 100_000
"""Weights from this size on are mapped from the data file of a packed graph."""


@dataclass(frozen=True)
class Opening:
    """How a component is to be opened."""

    threads: int
    adapters: dict[str, NDArray[Any]]
    """Low-rank changes by the names of the inputs that take them."""
    packed: PackedWeights | None
    """Where packed weights are kept."""
    expanded: bool
    """Compute with weights expanded to 8 bits a number, which the component must be able to."""
    options: Any
    """Of the run that expands them, by which it can be ended."""
    sparing: bool = False
    """Multiply by kernels that need little memory beside what they are given."""
    captures: bool = False
    """Let runs be captured as CUDA graphs, which needs every node on the card and no loop."""
    at_once: int = 1
    """Strips to compute at the same time, where the component has parts."""


@dataclass(frozen=True)
class Opened:
    """A component that is open."""

    session: Any
    device: Device
    """Where it runs."""
    placement: Placement
    constants: dict[str, Any]
    """Inputs that are the same in every run."""
    note: str = ""
    """Why it does not run where it was to."""


def open_component(bundle: Bundle, component: Component, device: Device, how: Opening) -> Opened:
    """A session of a component.

    On a device that has kernels for some components alone, one that it lacks kernels for is opened on the CPU.

    Raises:
        BundleInvalidError: ONNX Runtime cannot open it.
        DeviceUnavailableError: the device was asked for by name and would not compute all of it, or the processor
            cannot.
    """
    if not device.half and (component.quantization or {}).get("half_layers"):
        reason = f"{device.name} has no float16 on this card, and it keeps layers so"
        return _open_on_cpu(bundle, component, how, reason)
    opened = _open_on(bundle, component, device, how)
    if not device.is_partial:
        if device.required:
            _check(opened.placement, component.name, device)
        return opened
    reason = ""
    if not opened.placement.is_covered:
        reason = f"{device.name} has no kernels for {opened.placement.strays_in_words}"
    elif opened.placement.attentions and not device.attends:
        reason = f"{device.name} computes attention wrongly on this card"
    if not reason:
        return opened
    del opened  # and its memory, before there is a second session
    return _open_on_cpu(bundle, component, how, reason)


def _open_on_cpu(bundle: Bundle, component: Component, how: Opening, reason: str) -> Opened:
    """A session that was to be on a device, and why it is not."""
    note = f"{component.name} is computed on the CPU: {reason}"
    return replace(_open_on(bundle, component, CPU, how), note=note)


def _open_on(bundle: Bundle, component: Component, device: Device, how: Opening) -> Opened:
    name, adapted = component.name, bool(how.adapters)
    gpu = component.variant(adapted).gpu
    usable = gpu is None or device.half or gpu.dtype != "float16"
    path = bundle.component_path(name, adapted, usable and takes_gpu_graph(component, device.on_gpu))
    if not device.on_gpu and saturates() and is_rounded(component):
        exact = component.variant(adapted).float_attention
        if exact is None:
            raise DeviceUnavailableError(
                f"{name} multiplies 8-bit numbers in its attention, which needs a processor with VNNI; quantize "
                "it again for a graph that others can run"
            )
        path = bundle.path / exact
    in_strips, constants = computes_in_strips(component), dict(how.adapters)
    if how.expanded:
        graph = component.variant(adapted).int8
        assert graph is not None, f"{name} has nothing to expand"
        constants |= expanded_weights(bundle.path, graph, how.threads, how.options)
        path = bundle.path / graph.file
    packed = how.packed
    if how.at_once > 1 and path == bundle.path / component.file and component.parts:
        session = _open_parts(bundle, component, device, how)
    elif how.expanded or packed is None or device.on_gpu or adapted or not packed.is_worthwhile(bundle, name):
        session = _open(path, bundle.path, device, how, in_strips)
    else:
        session = _open_packed(path, bundle, name, device, how, packed)
    return Opened(session, device, placement(session), constants)


def takes_gpu_graph(component: Component, on_gpu: bool) -> bool:
    """Whether a component runs by its graph without 8-bit activations.

    Cards have no kernels for those, and on processors whose 8-bit products may overflow exact ones take convolutions as
    long as float32 does.
    """
    return on_gpu or (saturates() and bool((component.quantization or {}).get("int8_convolutions")))


def _open_parts(bundle: Bundle, component: Component, device: Device, how: Opening) -> PartedSession:
    """A session of a component's parts."""
    each = replace(how, threads=1)
    sessions = [_open(bundle.path / part.file, bundle.path, device, each, True) for part in component.parts]
    return PartedSession(component, str(bundle.path), sessions, how.at_once)


def _open_packed(path: Path, bundle: Bundle, name: str, device: Device, how: Opening, packed: PackedWeights) -> Any:
    """A session on packed weights, which are written first where they are not kept yet."""

    def write(target: Path) -> None:
        _open(path, bundle.path, device, how, False, target)

    key = packed_key(bundle, name, ort.__version__)
    kept = packed.find(key) or packed.add(key, write)
    if kept is not None:
        try:
            return _open(kept, bundle.path, device, how, False)
        except BundleInvalidError:
            packed.drop(key)
    return _open(path, bundle.path, device, how, False)


def _open(path: Path, where: Path, device: Device, how: Opening, in_strips: bool, packed_to: Path | None = None) -> Any:
    """A session.

    Args:
        path: of the graph.
        where: bundle to name where it cannot be opened.
        device: to run on.
        how: to open it.
        in_strips: whether the graph computes strip by strip.
        packed_to: where to write the graph with its weights as they are packed.

    Raises:
        BundleInvalidError: ONNX Runtime cannot open it, or cannot write what it should.
    """
    options = ort.SessionOptions()
    if packed_to is not None:
        options.optimized_model_filepath = str(packed_to)
        for key, value in (
            ("optimized_model_external_initializers_file_name", f"{packed_to.name}.data"),
            # Smaller ones stay in the graph: shape inference does not look into data files.
            ("optimized_model_external_initializers_min_size_in_bytes", str(PACKED_BYTES)),
            ("save_external_prepacked_constant_initializers", "1"),
        ):
            options.add_session_config_entry(f"session.{key}", value)
    options.intra_op_num_threads = how.threads
    options.log_severity_level = 3
    # A pattern is one block for all that is ever alive, made anew for every strip of a codec.
    options.enable_mem_pattern = False
    # The arena spares fresh pages and, without patterns, a fifth of a transformer's memory. A codec's layers break into
    # strips there and leave holes, 0.3 GB of 0.9. Beside a card it stays: without it a Loop was given a number of
    # trips that nothing had written yet.
    options.enable_cpu_mem_arena = device.on_gpu or not in_strips
    # Threads that spin between operators take up the next one at once; after a run they would keep the cores from
    # whatever computes next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if in_strips:
        # Otherwise what is widened for several readers is widened for each of them.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        if not device.on_gpu:
            # Convolutions would have channels in blocks, as ONNX Runtime lets them outside of loops: each strip would
            # be rearranged twice, in more time than that spares.
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        # Tiles are for the kernel that copies out what each output is made of, nine times what a convolution reads.
        if how.sparing or not has_tiles():
            options.add_free_dimension_override_by_name(FREE_AXIS, 1)
    if device.on_gpu:
        options.add_session_config_entry(RECORD, "1")
    elif saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        session = device.open(path, options, how.captures)
    except Exception as error:  # ONNX Runtime raises a dozen unrelated types here
        reason = " ".join(str(error).split())
        raise BundleInvalidError(str(where), [f"onnxruntime cannot open {path.name}: {reason}"]) from None
    return session


def _check(placement: Placement, component: str, device: Device) -> None:
    """Whether a component runs where it was asked to, all of it.

    Raises:
        DeviceUnavailableError: it does not.
    """
    if placement.provider != device.provider:
        raise DeviceUnavailableError(
            f"{component} runs on {placement.provider} instead of {device.provider}; see pochade doctor"
        )
    if placement.strays:
        raise DeviceUnavailableError(
            f"{component} cannot run on {device.name} alone: the CPU would compute {placement.strays_in_words} of it; "
            "export and quantize the model again with this version, or take --device cpu"
        )
