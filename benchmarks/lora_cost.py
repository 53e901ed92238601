"""What an adapter costs a pass of the transformer: without one, with empty changes, and with full ones, taking turns.

    python -m pochade.benchmarks.lora_cost BUNDLE [--size 512x512] [--rank 16] [--rounds 5] [--json FILE]

The changes are random and cover every linear layer; how long a file of them takes to load is measured too. Time is that
of the processor, all threads together, which other work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pochade.benchmarks.machine_card import write_report
from pochade.component import LoraGraph
from pochade.errors import UsageError
from pochade.quant.fidelity import Recorder, open_pipeline
from pochade.quant.trial import typical_prompts
from pochade.runtime.pipeline import Pipeline
from pochade.runtime.session import ComponentSession, Stop
from pochade.sizes import read_picture_size

COMPONENT = "transformer"

Arrays = Mapping[str, NDArray[Any]]


def measure(pipe: Pipeline, size: tuple[int, int], rank: int, rounds: int) -> dict[str, Any]:
    """CPU seconds of a pass in each case, every round once each.

    Raises:
        UsageError: the bundle takes no LoRA.
    """
    graph = pipe.bundle.manifest.components[COMPONENT].lora
    if graph is None:
        raise UsageError(f"{pipe.bundle.manifest.name} takes no LoRA; export it again")
    inputs = _step_inputs(pipe, size)
    cases: dict[str, Arrays] = {"none": {}, "rank 0": _changes(graph, 0), f"rank {rank}": _changes(graph, rank)}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, changes in cases.items():
            session = ComponentSession(pipe.bundle, COMPONENT, pipe.device, pipe.threads, Stop(), adapters=changes)
            session.run(inputs)  # the first run lays out what is laid out late
            start = time.process_time()
            session.run(inputs)
            seconds[name].append(time.process_time() - start)
            session.close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "cpu_seconds": seconds,
        "ratio_to_none": {name: round(value / medians["none"], 4) for name, value in medians.items()},
        "load_cpu_seconds": _load_seconds(pipe, graph, rank),
    }


def _step_inputs(pipe: Pipeline, size: tuple[int, int]) -> Arrays:
    """What the transformer is given while a picture is painted."""
    recorder = Recorder()
    pipe.observer = recorder
    pipe(typical_prompts(pipe.bundle)[0], width=size[0], height=size[1], num_inference_steps=1, seed=0)
    pipe.observer = None
    return next(call.inputs for call in recorder.calls if call.component == COMPONENT)


def _changes(graph: LoraGraph, rank: int) -> dict[str, NDArray[Any]]:
    rng, changes = np.random.default_rng(0), {}
    for product in graph.layers:
        width = sum(product.outputs.values())
        for name, shape in (("lora_A", (product.inputs, rank)), ("lora_B", (rank, width))):
            changes[f"{product.name}.{name}"] = (0.01 * rng.standard_normal(shape)).astype(graph.dtype)
    return changes


def _load_seconds(pipe: Pipeline, graph: LoraGraph, rank: int) -> list[float]:
    """To read a file and find its layers, three times."""
    from safetensors.numpy import save_file

    rng, tensors = np.random.default_rng(0), {}
    for product in graph.layers:
        for layer, width in product.outputs.items():
            tensors[f"{layer}.lora_A.weight"] = rng.standard_normal((rank, product.inputs)).astype(np.float16)
            tensors[f"{layer}.lora_B.weight"] = rng.standard_normal((width, rank)).astype(np.float16)
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.safetensors"
        save_file(tensors, path)
        for _ in range(3):
            start = time.process_time()
            lora = pipe.load_lora(path)
            pipe.unload_lora(lora)
            taken.append(time.process_time() - start)
    return taken


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure what an adapter costs a pass of the transformer.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    from pochade.bundle import Bundle

    size = read_picture_size(arguments.size)
    with open_pipeline(Bundle.open(arguments.bundle)) as pipe:
        found = measure(pipe, size, arguments.rank, arguments.rounds)
    for name, seconds in found["cpu_seconds"].items():
        print(f"{name:8}  {statistics.median(seconds):8.3f} s  {found['ratio_to_none'][name]:.3f}x")
    print(f"load      {1000 * statistics.median(found['load_cpu_seconds']):8.1f} ms")
    settings = {"bundle": arguments.bundle.name, "size": arguments.size, "rank": arguments.rank}
    write_report(arguments.json, "lora cost", {"settings": settings} | found)


if __name__ == "__main__":
    main()
