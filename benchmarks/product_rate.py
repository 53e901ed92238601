"""What a device multiplies at best, and how much of that a network's pass needs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pochade.benchmarks.step_bound import work_of
from pochade.bundle import Bundle
from pochade.machine import usable_cores
from pochade.runtime.ort import ort
from pochade.runtime.providers import Device

SIDE = 4096
"""Of the square matrices: wide enough to keep any card busy, and 32 MB each in float16."""


def product_rate(device: Device, side: int = SIDE, seconds: float = 2.0) -> float:
    """Operations a second of a product of two square matrices, the best of as many runs as fit in a time.

    In float16 on a card that has it, else in float32; two operations for each product of numbers.

    Args:
        device: to measure.
        side: of the matrices.
        seconds: to try for.
    """
    dtype = np.dtype(np.float16 if device.on_gpu and device.half else np.float32)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = device.open(_product(side, ir.DataType.from_numpy(dtype)), options)
    binding = session.io_binding()
    random = np.random.default_rng(0)
    for name in "ab":
        matrix = (random.random((side, side), dtype=np.float32) - 0.5).astype(dtype)
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(matrix, device.name, 0))
    binding.bind_output("y", device.name)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        binding.get_outputs()[0].numpy()  # not every card has finished when the run returns
        best = min(best, time.perf_counter() - start)
    return 2.0 * side**3 / best


def pass_operations(bundle: Bundle, component: str, inputs: Mapping[str, NDArray[Any]]) -> int:
    """Operations of all matrix products, convolutions and attentions of one run, counted on the CPU.

    Args:
        bundle: to look at.
        component: of it.
        inputs: of the run.
    """
    return sum(each.operations for each in work_of(bundle.component_path(component), inputs, usable_cores()))


def _product(side: int, dtype: ir.DataType) -> bytes:
    """A product of which one number is given."""
    a, b, y = (
        ir.Value(name=name, shape=ir.Shape((size, size)), type=ir.TensorType(dtype))
        for name, size in (("a", side), ("b", side), ("y", 1))
    )
    first, second = (
        ir.Value(name=f"ends{i}", const_value=ir.Tensor(np.full(2, i), name=f"ends{i}"), shape=ir.Shape((2,)))
        for i in range(2)
    )
    for ends in (first, second):
        ends.dtype = ir.DataType.INT64
    product = ir.node("MatMul", [a, b])
    corner = ir.node("Slice", [product.outputs[0], first, second], outputs=[y])
    nodes, versions = [product, corner], {"": 20}
    graph = ir.Graph([a, b], [y], nodes=nodes, initializers=[first, second], opset_imports=versions, name="product")
    model: bytes = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return model
