"""Graphs for graphics cards, run on the CPU: the same numbers from the same data files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

import pochade
from pochade.bundle import Bundle, Component
from pochade.component import GpuGraph
from pochade.export.write import export_checkpoint
from pochade.gpu_graph import save_gpu_graph
from pochade.quant.bundle import quantize_bundle
from pochade.quant.component import quantize_component
from pochade.quant.scheme import SCHEMES
from pochade.runtime.locate import resolve
from tests.golden import GOLDEN
from tests.quant.graphs import operators, port, relative_error, run, save, save_linear

Array = NDArray[Any]
RNG = np.random.default_rng(11)


def normal(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


def quantized(tmp_path: Path, weight: Array, scheme: str) -> Path:
    source = save_linear(tmp_path / "source" / "layer.onnx", weight)
    (tmp_path / "made").mkdir()
    rounded = replace(SCHEMES[scheme], rounding="rtn")
    quantize_component(source, tmp_path / "made" / "layer.onnx", "transformer", rounded)
    return tmp_path / "made" / "layer.onnx"


def run_plain(path: Path, inputs: Mapping[str, Array]) -> Array:
    """First output in a session without options, as on a card."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, dict(inputs))[0])


def test_blocks_of_128_are_read_as_blocks_of_32(tmp_path: Path) -> None:
    path = quantized(tmp_path, normal(256, 64), "int4")
    made = save_gpu_graph(path, "float32")
    assert made is not None and made.file == "layer.gpu.onnx"
    target = path.with_name(made.file)
    (product,) = (node for node in onnx.load(target, load_external_data=False).graph.node if "NBits" in node.op_type)
    attributes = {attribute.name: attribute.i for attribute in product.attribute}
    assert attributes == {"K": 256, "N": 64, "bits": 4, "block_size": 32}
    x = normal(9, 256)
    # The CPU's graph also rounds activations to 8 bits.
    assert relative_error(run_plain(target, {"x": x}), run(path, x=x)) < 0.01
    assert made.weights == 256 * 64 // 2 + 64 * 8 * 4  # bytes of the codes, and a float32 scale for every block of 32


def test_weights_of_8_bits_are_expanded(tmp_path: Path) -> None:
    weight = normal(128, 64)
    path = quantized(tmp_path, weight, "int8")
    made = save_gpu_graph(path, "float16")
    assert made is not None
    target = path.with_name(made.file)
    assert "DynamicQuantizeMatMul" in operators(path) and "DynamicQuantizeMatMul" not in operators(target)
    x = normal(9, 128)
    y = run_plain(target, {"x": x})
    assert y.dtype == np.float32
    assert relative_error(y, x @ weight) < 0.01


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4"])
def test_nothing_is_stored_twice(bundles: dict[str, Path], tmp_path: Path, scheme: str) -> None:
    made = bundles["monetico-tiny"]
    if scheme != "fp32":
        quantize_bundle(made, tmp_path / "made", replace(SCHEMES[scheme], rounding="rtn"))
        made = tmp_path / "made"
    manifest = Bundle.open(made).manifest
    graphs = {name: component.gpu for name, component in manifest.components.items()}
    halves = {name for name, graph in graphs.items() if graph is not None and graph.dtype == "float16"}
    assert halves == {"text_encoder", "transformer"}
    assert not any(made.glob("*.gpu.onnx.data"))
    for component in manifest.components.values():
        for path in component.graphs[1:]:
            tensors = onnx.load(made / path, load_external_data=False).graph.initializer
            assert all(len(tensor.raw_data) <= 1024 for tensor in tensors), path


def test_a_graph_that_is_as_good_on_a_card_has_no_second_one(tmp_path: Path) -> None:
    assert save_gpu_graph(save_linear(tmp_path / "layer.onnx", normal(128, 64)), "float32") is None


def test_8_bit_activations_stay_on_the_cpu(tmp_path: Path) -> None:
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    ports = [port("x", ["n", 128], TensorProto.UINT8)], [port("y", None, TensorProto.INT32)]
    codes = RNG.integers(-9, 9, (128, 64)).astype(np.int8)
    assert save_gpu_graph(save(tmp_path / "layer.onnx", [node], *ports, {"w": codes}), "float16") is None


def test_a_mask_of_minus_infinity_does_not_become_nan(tmp_path: Path) -> None:
    """The lowest float32 is minus infinity in float16, and 0 times that is not a number."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["scores"]),
        helper.make_node("Gemm", ["x", "w", "lowest"], ["y"]),
        helper.make_node("Identity", ["scores"], ["kept"]),
    ]
    weights = {"w": normal(128, 8), "lowest": np.full(8, np.finfo(np.float32).min)}
    path = save(tmp_path / "m.onnx", nodes, [port("x", ["n", 128])], [port("y", None), port("kept", None)], weights)
    made = save_gpu_graph(path, "float16")
    assert made is not None
    y = run_plain(path.with_name(made.file), {"x": normal(3, 128)})
    assert np.isfinite(y).all() and (y < -60_000).all()


def test_sums_and_norms_stay_in_float32(tmp_path: Path) -> None:
    """x + x W leaves float16's range, and is right all the same."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Mul", ["product", "gate"], ["gated"]),
        helper.make_node("Add", ["x", "gated"], ["y"]),
    ]
    weights = {"w": np.eye(64, dtype=np.float32), "gate": np.full(1, 1e5, np.float32)}
    path = save(tmp_path / "m.onnx", nodes, [port("x", ["n", 64])], [port("y", None)], weights)
    made = save_gpu_graph(path, "float16")
    assert made is not None
    x = normal(3, 64)
    assert relative_error(run_plain(path.with_name(made.file), {"x": x}), x * 100_001) < 1e-3


@pytest.mark.parametrize("scheme", ["fp16", "int4"])
def test_a_bundle_in_float16_is_taken_as_it_is(tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "fp16"
    export_checkpoint(GOLDEN / "monetico-tiny", made, recipe="monetico", dtype="fp16")
    if scheme == "int4":
        quantize_bundle(made, tmp_path / "int4", replace(SCHEMES["int4"], rounding="rtn"))
        made = tmp_path / "int4"
    size = {"width": 64, "height": 64, "num_inference_steps": 3}
    ours = paint(made, **size).tokens[0]
    as_on_a_card(monkeypatch)
    assert (paint(made, **size).tokens[0] == ours).mean() >= 0.99


def as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pipelines on the CPU open the graphs of cards."""
    graph_file = Component.graph_file
    monkeypatch.setattr(Component, "graph_file", lambda self, adapted, on_gpu: graph_file(self, adapted, True))
    # The option that makes 8-bit products exact has nothing to do here, and breaks expanded weights.
    monkeypatch.setattr("pochade.runtime.opening.saturates", lambda: False)


def paint(model: Path | str, **arguments: Any) -> pochade.Result:
    with pochade.load(model, device="cpu", threads=1) as pipe:
        return pipe("a large red star", seed=4, **arguments)


def test_the_same_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tokens 99 in a hundred, though the CPU rounds activations to 8 bits and a card computes in float16."""
    ours = paint("starter").tokens[0]
    as_on_a_card(monkeypatch)
    theirs = paint("starter").tokens[0]
    assert (ours == theirs).mean() >= 0.99


@pytest.mark.parametrize("version", ["v1.2"])
def test_hunyuandit(
    hunyuan_bundles: dict[str, tuple[Path, Path]], version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = hunyuan_bundles[version][1]
    size = {"width": 64, "height": 64, "num_inference_steps": 3}
    ours = np.asarray(paint(bundle, **size).images[0], np.float32)
    as_on_a_card(monkeypatch)
    theirs = np.asarray(paint(bundle, **size).images[0], np.float32)
    assert np.abs(ours - theirs).mean() < 1.0


def test_a_card_is_offered_its_own_graph() -> None:
    bundle = Bundle.open(resolve("starter"))
    assert bundle.component_path("transformer").name == "transformer.onnx"
    assert bundle.component_path("transformer", on_gpu=True).name == "transformer.gpu.onnx"
    assert bundle.component_path("vq_decoder", on_gpu=True).name == "vq_decoder.onnx"


def test_an_adapter_reaches_the_graph_of_a_card(bundles: dict[str, Path]) -> None:
    bundle = Bundle.open(bundles["monetico-tiny"])
    lora = bundle.manifest.components["transformer"].lora
    assert lora is not None and isinstance(lora.gpu, GpuGraph)
    assert bundle.component_path("transformer", adapted=True, on_gpu=True).name == lora.gpu.file
    inputs = {port.name for port in onnx.load(bundle.path / lora.gpu.file, load_external_data=False).graph.input}
    assert {f"{layer.name}.lora_A" for layer in lora.layers} <= inputs


def test_a_missing_graph_is_told(tmp_path: Path) -> None:
    shutil.copytree(resolve("starter"), tmp_path / "starter")
    (tmp_path / "starter" / "transformer.gpu.onnx").unlink()
    with pytest.raises(pochade.errors.BundleInvalidError, match=r"transformer\.gpu\.onnx' is missing"):
        Bundle.open(tmp_path / "starter")
