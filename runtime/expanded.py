"""Weights stored in blocks of few bits, expanded to 8 bits a number when a component is opened.

Such a component runs two thirds as long and takes a byte a number of memory, on files as small as before.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pochade.bundle import Component
from pochade.component import Int8Graph
from pochade.errors import BundleInvalidError, CancelledError, DeviceUnavailableError, UsageError
from pochade.machine import saturates
from pochade.runtime.heap import return_freed_memory
from pochade.runtime.ort import ort
from pochade.runtime.plan import Way, Workload
from pochade.runtime.providers import Device

Expand = Literal["auto", "on", "off"]
"""Whether weights of few bits are expanded: `auto` on a CPU if the limit of memory allows it and there are steps enough
to make up for it."""

WHILE_EXPANDING = 200_000_000
"""Most bytes of what lies between stored and expanded weights while that is done, whatever the model."""

LEAST_RUNS = 8
"""Runs of a component from which on expanding its weights takes less time than it spares."""


def resolve_expand(wish: Expand, component: Component, adapted: bool, device: Device, runs: int) -> Expand:
    """What is left of a wish.

    Args:
        wish: of the user.
        component: that runs on every step.
        adapted: it takes low-rank changes.
        device: it runs on.
        runs: how often.

    Raises:
        UsageError: it has to be done, and there is nothing to expand or a graphics card.
        DeviceUnavailableError: it has to be done, and the processor lacks VNNI.
    """
    can = component.variant(adapted).int8 is not None and not device.on_gpu
    if wish == "on":
        if device.on_gpu:
            raise UsageError("weights are expanded on a CPU alone; leave expand away, or take device cpu")
        if not can:
            raise UsageError(
                f"{component.name} has nothing to expand: its bundle is not of 4 bits, or was quantized by an older "
                "version; leave expand away"
            )
        if saturates():
            raise DeviceUnavailableError("to expand weights needs a processor with VNNI; leave expand away")
    return wish if wish != "auto" or (can and not saturates() and runs >= LEAST_RUNS) else "off"


def bytes_to_expand(component: Component) -> int:
    """Most bytes that expanding takes: all expanded weights, the files that they come from, and what lies between."""
    if component.int8 is None:
        return 0
    expanded = component.int8.weights
    return expanded + component.held_weights() + min(expanded, WHILE_EXPANDING)


def ways_to_run(component: Component, work: Workload, base: int, taken: Callable[[bool], int]) -> list[Way]:
    """Ways to run a component on every step, the fastest first.

    Args:
        component: whose weights may be expanded.
        work: what is asked for.
        base: bytes that are taken already.
        taken: bytes that it takes at work, by whether its weights are expanded.
    """
    ways = []
    for expanded in {"auto": [True, False], "on": [True], "off": [False]}[work.expand]:
        opening = bytes_to_expand(component) if expanded else 0
        ways.append(Way(base + max(taken(expanded), opening), expanded=expanded))
    return ways


def expanded_weights(folder: Path, graph: Int8Graph, threads: int, options: Any) -> dict[str, Any]:
    """Codes and scales of all weights, as values by the names of the inputs that take them.

    Args:
        folder: of the bundle.
        graph: whose weights.
        threads: to expand with.
        options: of the run, by which it can be ended.

    Raises:
        BundleInvalidError: ONNX Runtime cannot open or run the expander.
        CancelledError: it was ended.
    """
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    # Or all weights would be expanded while the session opens, and everything on the way to them kept till then.
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.enable_mem_pattern = False
    settings.enable_cpu_mem_arena = False
    try:
        session = ort.InferenceSession(str(folder / graph.expander), settings, providers=["CPUExecutionProvider"])
        binding, values = session.io_binding(), {}
        for output in session.get_outputs():
            # Memory of our own: values that a session gives keep it alive, and with it the weights it came from.
            array = np.empty(output.shape, np.int8 if output.type == "tensor(int8)" else np.float32)
            values[output.name] = ort.OrtValue.ortvalue_from_numpy(array, "cpu", 0)
            binding.bind_ortvalue_output(output.name, values[output.name])
        session.run_with_iobinding(binding, options)
        del binding, session
        return_freed_memory()
        return values
    except Exception as error:  # ONNX Runtime raises a dozen unrelated types here
        if options.terminate:
            raise CancelledError("stopped on request") from None
        reason = " ".join(str(error).split())
        raise BundleInvalidError(str(folder), [f"onnxruntime cannot run {graph.expander}: {reason}"]) from None
