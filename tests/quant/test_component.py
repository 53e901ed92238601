"""Whole components: subgraphs, files, the report, and memory."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from pochade.errors import InputRefusedError, UsageError
from pochade.quant import streamed
from pochade.quant.component import ALIGNMENT, INLINE_BYTES, StoredWeight, quantize_component
from pochade.quant.rtn import unpack_blocks
from pochade.quant.scheme import CHANNELS, FLOAT, HALF, SCHEMES, Keep, Scheme, Use, blocks
from tests.quant.graphs import initializers, operators, port, relative_error, run, save, save_linear

RNG = np.random.default_rng(6)


def normal(*shape: int) -> NDArray[np.floating]:
    return RNG.standard_normal(shape).astype(np.float32)


def save_head_in_loop(path: Path, head: NDArray[np.floating], bias: NDArray[np.floating]) -> Path:
    """y[i] = x[i] @ head + bias, one row per iteration; head and bias belong to the main graph."""
    nodes = [
        helper.make_node("Gather", ["x", "i"], ["row"]),
        helper.make_node("Unsqueeze", ["row", "first"], ["wide"]),
        helper.make_node("MatMul", ["wide", "mlm_layer.conv2.weight.T"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["logits"]),
        helper.make_node("Identity", ["go"], ["go_on"]),
    ]
    body = helper.make_graph(
        nodes,
        "body",
        [port("i", [], TensorProto.INT64), port("go", [], TensorProto.BOOL)],
        [port("go_on", [], TensorProto.BOOL), port("logits", None)],
    )
    loop = helper.make_node("Loop", ["count", ""], ["y"], body=body)
    weights = {"mlm_layer.conv2.weight.T": head, "bias": bias, "count": np.array(3), "first": np.array([0])}
    return save(path, [loop], [port("x", [3, len(head)])], [port("y", None)], weights)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_head_inside_a_loop(tmp_path: Path, scheme: Scheme) -> None:
    head, bias, x = normal(64, 96), normal(96), normal(3, 64)
    source = save_head_in_loop(tmp_path / "sampler.onnx", head, bias)
    target = tmp_path / "out.onnx"
    report = quantize_component(source, target, "sampler", scheme)
    assert [(weight.name, weight.storage) for weight in report.weights] == [
        ("mlm_layer.conv2.weight.T", scheme.sensitive)
    ]
    (loop,) = ir.load(target).graph
    inner = [node.op_type for node in loop.attributes["body"].as_graph() if node.op_type != "Constant"]
    product = "MatMulNBits" if scheme.name == "int4" else "DynamicQuantizeMatMul"
    assert inner == ["Gather", "Unsqueeze", product, "Identity"]
    # Eight bits for weights and for activations, each off by some 5e-3.
    assert relative_error(run(target, x=x), (x @ head + bias)[:, None]) < 0.015


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_an_installation_by_hard_links_opens(tmp_path: Path, scheme: Scheme) -> None:
    """As uv makes it; ONNX Runtime reads no subgraph's weights from a file that has two names."""
    head, x = normal(64, 96), normal(3, 64)
    target = tmp_path / "out.onnx"
    quantize_component(save_head_in_loop(tmp_path / "sampler.onnx", head, normal(96)), target, "sampler", scheme)
    for file in tmp_path.glob("out.onnx*"):
        (tmp_path / f"other-{file.name}").hardlink_to(file)
    assert run(target, x=x).shape == (3, 1, 96)


def test_a_bias_added_once_after_a_loop_is_not_moved_into_it(tmp_path: Path) -> None:
    body = helper.make_graph(
        [helper.make_node("Add", ["product", "bias"], ["z"]), helper.make_node("Identity", ["go"], ["go_on"])],
        "body",
        [port("i", [], TensorProto.INT64), port("go", [], TensorProto.BOOL)],
        [port("go_on", [], TensorProto.BOOL), port("z", None)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Loop", ["count", ""], ["y"], body=body),
    ]
    weights = {"w": normal(64, 64), "bias": normal(64), "count": np.array(2)}
    source = save(tmp_path / "m.onnx", nodes, [port("x", ["n", 64])], [port("y", None)], weights)
    quantize_component(source, tmp_path / "out.onnx", "transformer", SCHEMES["int4"])
    assert operators(tmp_path / "out.onnx") == ["MatMulNBits", "Loop"]


def test_a_shared_weight_is_stored_once(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["z"]), helper.make_node("MatMul", ["z", "w"], ["y"])]
    source = save(tmp_path / "m.onnx", nodes, [port("x", ["n", 64])], [port("y", None)], {"w": normal(64, 64)})
    report = quantize_component(source, tmp_path / "out.onnx", "transformer", SCHEMES["int4"])
    assert report.counts == {"blocks int4/128": 1}
    assert set(initializers(tmp_path / "out.onnx")) == {"w.int4", "w.scales"}


def save_mixture(path: Path) -> Path:
    """A graph with one weight of every use, a tiny, a narrow and an exact one."""
    nodes = [
        helper.make_node("Gather", ["token_embedding.weight", "ids"], ["a"]),
        helper.make_node("MatMul", ["a", "blocks.0.to_q.weight"], ["b"]),
        helper.make_node("MatMul", ["b", "project_from_hidden.weight"], ["c"]),
        helper.make_node("MatMul", ["c", "tiny.weight"], ["d"]),
        helper.make_node("MatMul", ["d", "narrow.weight"], ["y"]),
        helper.make_node("Conv", ["image", "conv.weight"], ["z"]),
        helper.make_node("Gather", ["text_model.embeddings.position_embedding.weight", "ids"], ["codes"]),
    ]
    weights = {
        "token_embedding.weight": normal(100, 64),
        "blocks.0.to_q.weight": normal(64, 128),
        "project_from_hidden.weight": normal(128, 64),
        "tiny.weight": normal(64, 8),
        "narrow.weight": normal(8, 600),
        "conv.weight": normal(32, 16, 3, 3),
        "text_model.embeddings.position_embedding.weight": normal(100, 64),
    }
    inputs = [port("ids", ["n"], TensorProto.INT64), port("image", [1, 16, "h", "w"])]
    return save(path, nodes, inputs, [port(name, None) for name in ("y", "z", "codes")], weights)


def test_the_report_tells_what_became_of_each_weight(tmp_path: Path) -> None:
    source, target = save_mixture(tmp_path / "m.onnx"), tmp_path / "out" / "m.onnx"
    target.parent.mkdir()
    scheme = SCHEMES["int4"].keeping([Keep(r"^part/blocks\.0\.", 16)])
    calls: list[tuple[int, int]] = []
    report = quantize_component(source, target, "part", scheme, lambda done, total: calls.append((done, total)))
    assert {weight.name: weight.storage for weight in report.weights} == {
        "token_embedding.weight": blocks(8),
        "blocks.0.to_q.weight": HALF,
        "project_from_hidden.weight": blocks(8),
        "tiny.weight": FLOAT,
        "narrow.weight": FLOAT,
        "conv.weight": CHANNELS,
        "text_model.embeddings.position_embedding.weight": FLOAT,
    }
    assert report.weights[0] == StoredWeight("token_embedding.weight", (100, 64), Use.EMBEDDING, blocks(8))
    assert report.counts == {"blocks int8/128": 2, "half float16": 1, "float32": 3, "channels int8": 1}
    assert report.parameters == 100 * 64 * 2 + 64 * 128 * 2 + 64 * 8 + 8 * 600 + 32 * 16 * 9
    assert report.bytes_before == sum(path.stat().st_size for path in tmp_path.glob("m.onnx*"))
    assert report.bytes_after == sum(path.stat().st_size for path in target.parent.iterdir())
    assert sorted(path.name for path in target.parent.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert calls == [(done, len(calls)) for done in range(len(calls))]
    assert calls


def test_large_tensors_are_aligned_and_small_ones_inline(tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    quantize_component(save_mixture(tmp_path / "m.onnx"), target, "part", SCHEMES["int4"])
    tensors = [value.const_value for value in ir.load(target).graph.initializers.values()]
    for tensor in tensors:
        assert tensor is not None
        assert isinstance(tensor, ir.ExternalTensor) == (tensor.nbytes > INLINE_BYTES)
        assert not isinstance(tensor, ir.ExternalTensor) or (tensor.offset or 0) % ALIGNMENT == 0


def test_writing_over_the_source_is_refused(tmp_path: Path) -> None:
    source = save_mixture(tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="another output"):
        quantize_component(source, tmp_path / "." / "m.onnx", "part", SCHEMES["int4"])


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("name", ["blocks.0.to_q.weight", "token_embedding.weight", "conv.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, scheme: Scheme, name: str) -> None:
    model = ir.load(save_mixture(tmp_path / "m.onnx"))
    value = model.graph.initializers[name]
    assert value.const_value is not None
    broken = value.const_value.numpy().copy()
    broken.flat[5] = np.nan
    value.const_value = ir.tensor(broken, name=name)
    ir.save(model, tmp_path / "broken.onnx")
    with pytest.raises(InputRefusedError, match=name):
        quantize_component(tmp_path / "broken.onnx", tmp_path / "out.onnx", "part", scheme)
    assert not list(tmp_path.glob("*out.onnx*"))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_slabs_do_not_change_the_result(tmp_path: Path, scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_mixture(tmp_path / "m.onnx")
    quantize_component(source, tmp_path / "whole.onnx", "part", scheme)
    monkeypatch.setattr(streamed, "SLAB", 300)
    quantize_component(source, tmp_path / "parts.onnx", "part", scheme)
    assert (tmp_path / "whole.onnx.data").read_bytes() == (tmp_path / "parts.onnx.data").read_bytes()


def test_memory_stays_below_one_large_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(1024, 4096)
    source = save_linear(tmp_path / "m.onnx", weight)
    monkeypatch.setattr(streamed, "SLAB", 1 << 16)
    tracemalloc.start()
    quantize_component(source, tmp_path / "out.onnx", "transformer", replace(SCHEMES["int4"], rounding="rtn"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < weight.nbytes / 4
    held = initializers(tmp_path / "out.onnx")
    kept = unpack_blocks(held["w.weight.int4"].astype(np.uint8), held["w.weight.scales"].astype(np.float32), 4, 1024)
    assert relative_error(kept.T, weight) < 0.13


def test_a_quantized_graph_passes_through(tmp_path: Path) -> None:
    source, once, twice = save_mixture(tmp_path / "m.onnx"), tmp_path / "once.onnx", tmp_path / "twice.onnx"
    quantize_component(source, once, "part", SCHEMES["int4"])
    report = quantize_component(once, twice, "part", SCHEMES["int4"])
    assert report.counts == {"float32": 3}
    assert operators(once) == operators(twice)


def save_widened(path: Path, weight: NDArray[np.floating]) -> Path:
    """y = x @ weight, the weight stored as float16 and widened by a Cast."""
    nodes = [
        helper.make_node("Cast", ["w"], ["w.float32"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "w.float32"], ["y"]),
    ]
    ports = [port("x", ["n", len(weight)])], [port("y", None)]
    return save(path, nodes, *ports, {"w": weight.astype(np.float16)})


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_weights_stored_as_float16_are_float32_weights(tmp_path: Path, scheme: Scheme) -> None:
    weight, x = normal(64, 128), normal(5, 64)
    source, target = save_widened(tmp_path / "m.onnx", weight), tmp_path / "out.onnx"
    report = quantize_component(source, target, "transformer", scheme)
    assert report.counts == {str(scheme.linear): 1}
    assert operators(target) in (["MatMulNBits"], ["DynamicQuantizeMatMul"])
    assert initializers(target)["w.scales"].dtype == np.float32
    assert relative_error(run(target, x=x), x @ weight) < (0.13 if scheme.name == "int4" else 0.02)


@pytest.mark.parametrize("bits", [16, 32])
def test_weights_stored_as_float16_are_never_stored_wider(tmp_path: Path, bits: int) -> None:
    source, target = save_widened(tmp_path / "m.onnx", normal(64, 128)), tmp_path / "out.onnx"
    report = quantize_component(source, target, "transformer", SCHEMES["int4"].keeping([Keep(".", bits)]))
    assert report.counts == {"float16": 1}
    assert operators(target) == ["Cast", "MatMul"]


def test_a_component_without_large_tensors_has_no_data_file(tmp_path: Path) -> None:
    quantize_component(save_linear(tmp_path / "m.onnx", normal(8, 8)), tmp_path / "out.onnx", "part", SCHEMES["int4"])
    assert [path.name for path in tmp_path.glob("out*")] == ["out.onnx"]
