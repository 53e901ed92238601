"""How near a pass of a transformer comes to what the processor does at best.

    python -m pochade.benchmarks.step_bound BUNDLE [--size 1024x1024] [--json FILE]

A first pass is recorded and repeated, once more with ONNX Runtime telling what all products and attentions are given.
The largest of each kind are then run by themselves. The bound is all operations at the best rate that any of their kind
reached, and nothing else: no norms, no moving of numbers.

The same bound with all of it in float32, at the best rates that are reached so, tells how many times as fast as a
program in floats a pass could be at most, if both were at their bounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pochade.benchmarks.machine_card import write_report
from pochade.bundle import Bundle
from pochade.machine import usable_cores
from pochade.quant import attention
from pochade.quant.fidelity import Recorder, open_pipeline
from pochade.quant.surgery import MICROSOFT
from pochade.runtime.locate import resolve
from pochade.runtime.ort import ort
from pochade.sizes import read_picture_size

INT8, FLOAT, ATTENTION = "int8 products", "float products", "attention"

KINDS = {"DynamicQuantizeMatMul": INT8, "MatMul": FLOAT, "Gemm": FLOAT, "Conv": FLOAT, "MultiHeadAttention": ATTENTION}
"""Operators that multiply matrices, and what they count as."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Work:
    """One operator of a pass, by what it is given."""

    op_type: str
    shapes: tuple[tuple[int, ...], ...]
    heads: int = 0
    """Of an attention."""
    rounded: bool = False
    """Whether an attention multiplies 8-bit numbers."""

    @property
    def kind(self) -> str:
        """What its rate is compared with."""
        return KINDS[self.op_type]

    @property
    def operations(self) -> int:
        """Multiplications and additions, two for each product of numbers."""
        if self.op_type == "MultiHeadAttention":
            (batch, queries, width), (_, keys, _), *_ = self.shapes
            return 4 * batch * queries * keys * width
        if self.op_type == "Conv":
            (_, _, *size), (outputs, inputs, *kernel) = self.shapes[:2]
            return 2 * int(np.prod(size)) * outputs * inputs * int(np.prod(kernel))
        given, weight = self.shapes[:2]
        return 2 * int(np.prod(given)) * weight[-1]


def read_work(profile: Path, model: ir.Model) -> Iterator[Work]:
    """What a profiled run multiplied.

    Args:
        profile: JSON that ONNX Runtime wrote; of packed weights it does not tell.
        model: the graph that ran.
    """
    nodes = {node.name: node for node in model.graph.all_nodes()}
    for event in json.loads(profile.read_text("utf-8")):
        arguments = event.get("args", {})
        op_type = arguments.get("op_name")
        if event.get("cat") == "Node" and op_type in KINDS and event["name"].endswith("_kernel_time"):
            shapes = [tuple(next(iter(each.values()))) for each in arguments["input_type_shape"]]
            node = nodes.get(event["name"].removesuffix("_kernel_time"))
            weight = node.inputs[1].shape if node is not None and node.inputs[1] is not None else None
            if weight is not None and weight.is_static():
                shapes[1:] = [tuple(weight.numpy())]
            yield Work(op_type, tuple(shapes), node.attributes.get_int("num_heads", 0) if node is not None else 0)


def work_of(path: Path, inputs: Mapping[str, Array], threads: int) -> list[Work]:
    """What one run of a graph multiplies.

    Args:
        path: of the graph.
        inputs: of the run.
        threads: to run it with.
    """
    with tempfile.TemporaryDirectory() as folder:
        session = open_graph(str(path), threads, Path(folder) / "pass")
        session.run(None, dict(inputs))
        return list(read_work(Path(session.end_profiling()), ir.load(path)))


def open_graph(model: str | bytes, threads: int, profile: Path | None = None) -> Any:
    """A session as painting opens one."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def rate(work: Work, threads: int, seconds: float) -> float:
    """Operations a second of one operator by itself, the best of as many runs as fit in a time."""
    random = np.random.default_rng(0)
    feeds = {"x": random.standard_normal(work.shapes[0], dtype=np.float32)}
    attributes: dict[str, Any] = {}
    constants: dict[str, Array] = {}
    if work.op_type == "MultiHeadAttention":
        feeds |= {name: random.standard_normal(work.shapes[i + 1], dtype=np.float32) for i, name in enumerate("kv")}
        attributes["num_heads"] = work.heads
    elif work.kind == INT8:
        weight = work.shapes[1]
        constants["w"] = random.integers(-127, 128, weight, dtype=np.int8)
        constants["scales"] = np.full(weight[-1], 0.01, np.float32)
    else:
        constants["w"] = random.standard_normal(work.shapes[1], dtype=np.float32)
    model = _one_node(work.op_type, feeds, constants, attributes)
    if work.rounded:
        assert attention.rewrite(model) == 1, "an attention that is rounded in a graph is not by itself"
    session = open_graph(ir.to_proto(model).SerializeToString(), threads)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        session.run(None, feeds)
        best = min(best, time.perf_counter() - start)
    return work.operations / best


def _one_node(
    op_type: str, feeds: Mapping[str, Array], constants: Mapping[str, Array], attributes: dict[str, Any]
) -> ir.Model:
    inputs = [
        ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT))
        for name, array in feeds.items()
    ]
    weights = [
        ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            const_value=ir.Tensor(array, name=name),
        )
        for name, array in constants.items()
    ]
    domain = MICROSOFT if op_type in ("DynamicQuantizeMatMul", "MultiHeadAttention") else ""
    output = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node(op_type, [*inputs, *weights], attributes, domain=domain, outputs=[output])
    versions = {"": 20, MICROSOFT: 1}
    graph = ir.Graph(inputs, [output], nodes=[node], initializers=weights, opset_imports=versions, name="one")
    return ir.Model(graph, ir_version=10)


def first_pass(bundle: Bundle, height: int, width: int) -> dict[str, Array]:
    """What the transformer is given in the first pass of a picture."""
    recorder = Recorder()
    pipe = open_pipeline(bundle)
    pipe.observer = recorder
    for _ in pipe.stream(bundle.manifest.defaults.get("prompt", "a red fox"), height=height, width=width, seed=0):
        if any(call.component == "transformer" for call in recorder.calls):
            break
    pipe.close()
    return dict(next(call.inputs for call in reversed(recorder.calls) if call.component == "transformer"))


def measure(folder: Path, height: int, width: int, threads: int, passes: int, seconds: float) -> dict[str, Any]:
    """Everything that is reported."""
    bundle = Bundle.open(folder)
    inputs = first_pass(bundle, height, width)
    path, exact = bundle.component_path("transformer"), bundle.manifest.components["transformer"].float_attention
    session = open_graph(str(path), threads)
    taken = []
    for _ in range(passes + 1):
        start = time.perf_counter()
        session.run(None, inputs)
        taken.append(time.perf_counter() - start)
    del session
    # ONNX Runtime takes rounded attentions apart, and tells of their parts alone.
    counted = path if exact is None else bundle.path / exact
    rounded = exact is not None
    found = Counter(
        replace(work, rounded=rounded and work.kind == ATTENTION) for work in work_of(counted, inputs, threads)
    )
    rates = {work: rate(work, threads, seconds) for work in _largest(found)}
    best = {kind: max(r for work, r in rates.items() if work.kind == kind) for kind in {w.kind for w in rates}}
    totals: Counter[str] = Counter()
    for each, count in found.items():
        totals[each.kind] += count * each.operations
    bound = sum(totals[kind] / best[kind] for kind in best)
    float_rates = dict(best)
    for kind in (INT8, ATTENTION):
        same = [_in_floats(work) for work in rates if work.kind == kind and work != _in_floats(work)]
        if same:
            float_rates[kind] = max(rate(work, threads, seconds) for work in same)
    median = statistics.median(taken[1:])
    return {
        "pass_seconds": taken[1:],
        "median": median,
        "bound": bound,
        "fraction": bound / median,
        "float_rates": float_rates,
        "float_bound": sum(totals[kind] / float_rates[kind] for kind in float_rates),
        "operations": dict(totals),
        "best_rates": best,
        "rates": [{"op": w.op_type, "shapes": w.shapes, "count": found[w], "rate": r} for w, r in rates.items()],
    }


def _in_floats(work: Work) -> Work:
    """The same of float32 numbers."""
    return Work("MatMul", work.shapes[:2]) if work.kind == INT8 else replace(work, rounded=False)


def _largest(found: Mapping[Work, int]) -> Sequence[Work]:
    """Of each kind, what takes most operations, up to six."""
    ordered = sorted(found, key=lambda work: -found[work] * work.operations)
    chosen: list[Work] = []
    for kind in (INT8, FLOAT, ATTENTION):
        # The rate of a convolution is that of the product it is.
        of_kind = [work for work in ordered if work.kind == kind and work.op_type not in ("Conv", "Gemm")]
        chosen += of_kind[:6]
    return chosen


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="folder or name")
    parser.add_argument("--size", default="1024x1024", metavar="WxH")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each kind of product by itself")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    width, height = read_picture_size(args.size)
    figures = measure(resolve(args.bundle), height, width, args.threads, args.passes, args.seconds)
    for kind, operations in figures["operations"].items():
        best = figures["best_rates"].get(kind)
        told = f" at {best / 1e9:.0f} GFLOP/s: {operations / best:.2f} s" if best else ""
        print(f"{kind}: {operations / 1e9:.0f} GFLOP{told}")
    print(f"bound {figures['bound']:.2f} s, a pass {figures['median']:.2f} s: {100 * figures['fraction']:.0f} %")
    floats, times = figures["float_bound"], figures["float_bound"] / figures["bound"]
    rates = ", ".join(f"{kind} at {rate / 1e9:.0f} GFLOP/s" for kind, rate in figures["float_rates"].items())
    print(f"in float32 ({rates}) bound {floats:.2f} s: {times:.2f}x")
    write_report(args.json, "pochade step bound", {"size": args.size, "threads": args.threads} | dict(figures))


if __name__ == "__main__":
    main()
