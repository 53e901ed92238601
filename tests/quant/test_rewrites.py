"""Every rewrite, run by ONNX Runtime against numpy on the dequantized weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from pochade.errors import UsageError
from pochade.quant import expand
from pochade.quant.component import quantize_component
from pochade.quant.rtn import unpack_blocks
from pochade.quant.scheme import CHANNELS, DYNAMIC, FLOAT, HALF, SCHEMES, Scheme, Storage, blocks
from tests.quant.graphs import initializers, operators, port, relative_error, run, save, save_linear, session

RNG = np.random.default_rng(4)

EXACT = 2e-6
"""Relative error of two float32 evaluations of the same numbers."""

LEVEL_4 = 1e-2
"""Accuracy level 4 rounds activations to int8 per block: 5e-3 measured on normal ones."""


def normal(*shape: int, dtype: type[np.floating] = np.float32) -> NDArray[np.floating]:
    return RNG.standard_normal(shape).astype(dtype)


def everything(storage: Storage) -> Scheme:
    """Linear layers and embeddings in this form, however small."""
    is_blocks = storage.block_size is not None
    return replace(
        SCHEMES["int4"],
        linear=storage,
        embedding=storage if is_blocks else FLOAT,
        sensitive_layers=(),
        min_elements=0,
    )


def quantize(source: Path, scheme: Scheme) -> Path:
    target = source.with_name(f"quantized-{source.name}")
    quantize_component(source, target, "component", scheme)
    return target


def kept_blocks(path: Path, name: str, bits: int, width: int) -> NDArray[np.float32]:
    """The weight a graph now holds in blocks, (rows, width) float32."""
    held = initializers(path)
    codes, scales = held[f"{name}.int{bits}"], held[f"{name}.scales"]
    blob = codes.reshape(*scales.shape, -1) if codes.size % scales.size == 0 else None
    assert blob is not None
    return unpack_blocks(blob.astype(np.uint8), scales.astype(np.float32), bits, width)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [16, 48, 128, 131])
def test_matmul_nbits(tmp_path: Path, bits: int, inputs: int) -> None:
    weight, x = normal(inputs, 24), normal(7, inputs)
    source = save_linear(tmp_path / "m.onnx", weight)
    target = quantize(source, everything(blocks(bits, 32)))
    assert operators(target) == ["MatMulNBits"]
    kept = kept_blocks(target, "w.weight", bits, inputs).T
    assert relative_error(kept, weight) < (0.12 if bits == 4 else 0.008)
    assert relative_error(run(target, x=x), x @ kept) < LEVEL_4
    exact = quantize(source, everything(replace(blocks(bits, 32), accuracy_level=1)))
    assert relative_error(run(exact, x=x), x @ kept) < EXACT


def test_matmul_nbits_on_batches_with_the_default_block(tmp_path: Path) -> None:
    weight, x = normal(48, 40), normal(2, 5, 48)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    source = save(tmp_path / "m.onnx", [node], [port("x", ["b", "n", 48])], [port("y", ["b", "n", 40])], {"w": weight})
    target = quantize(source, everything(blocks(4)))
    assert relative_error(run(target, x=x), x @ kept_blocks(target, "w", 4, 48).T) < LEVEL_4


@pytest.mark.parametrize("storage", [blocks(4), DYNAMIC], ids=str)
@pytest.mark.parametrize("bias_first", [False, True])
def test_a_bias_that_follows_is_fused(tmp_path: Path, storage: Storage, bias_first: bool) -> None:
    weight, bias, x = normal(64, 48), normal(48), normal(7, 64)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["bias", "product"] if bias_first else ["product", "bias"], ["y"]),
    ]
    source = save(tmp_path / "m.onnx", nodes, [port("x", ["n", 64])], [port("y", None)], {"w": weight, "bias": bias})
    target = quantize(source, everything(storage))
    assert operators(target) == ["MatMulNBits" if storage.block_size else "DynamicQuantizeMatMul"]
    loose = quantize(save_linear(tmp_path / "n.onnx", weight.astype(np.float32)), everything(storage))
    assert relative_error(run(target, x=x), run(loose, x=x) + bias) < EXACT


@pytest.mark.parametrize("shape", [(1, 48), (1,)])
def test_an_add_that_is_no_bias_stays(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weight, other = normal(64, 48), normal(*shape)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "other"], ["y"])]
    source = save(tmp_path / "m.onnx", nodes, [port("x", ["n", 64])], [port("y", None)], {"w": weight, "other": other})
    assert operators(quantize(source, everything(blocks(4)))) == ["MatMulNBits", "Add"]


def test_a_product_with_a_second_reader_keeps_its_bias_apart(tmp_path: Path) -> None:
    weights = {"w": normal(64, 48), "bias": normal(48)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "bias"], ["y"])]
    source = save(tmp_path / "m.onnx", nodes, [port("x", ["n", 64])], [port("y", None), port("p", None)], weights)
    target = quantize(source, everything(blocks(4)))
    assert operators(target) == ["MatMulNBits", "Add"]
    y, p = session(target).run(None, {"x": normal(3, 64)})
    np.testing.assert_allclose(np.asarray(y), np.asarray(p) + weights["bias"], rtol=1e-6)


@pytest.mark.parametrize("storage", [replace(blocks(4), accuracy_level=1), blocks(8), DYNAMIC], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_gemm(tmp_path: Path, storage: Storage, transposed: bool) -> None:
    weight, bias, x = normal(64, 48), normal(48), normal(7, 64)
    node = helper.make_node("Gemm", ["x", "w", "bias"], ["y"], transB=int(transposed))
    stored = np.ascontiguousarray(weight.T) if transposed else weight
    source = save(tmp_path / "m.onnx", [node], [port("x", ["n", 64])], [port("y", None)], {"w": stored, "bias": bias})
    plain = quantize(save_linear(tmp_path / "n.onnx", weight), everything(storage))
    target = quantize(source, everything(storage))
    assert operators(target) == operators(plain)
    assert relative_error(run(target, x=x), run(plain, x=x) + bias) < EXACT


@pytest.mark.parametrize("storage", [blocks(8), DYNAMIC], ids=str)
@pytest.mark.parametrize("op_type", ["MatMul", "Gemm"])
def test_a_bias_stored_as_float16_is_fused(tmp_path: Path, op_type: str, storage: Storage) -> None:
    weight, bias, x = normal(64, 48), normal(48, dtype=np.float16), normal(7, 64)
    widen = helper.make_node("Cast", ["bias"], ["bias.float32"], to=TensorProto.FLOAT)
    layer = [helper.make_node("Gemm", ["x", "w", "bias.float32"], ["y"])]
    if op_type == "MatMul":
        layer = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "bias.float32"], ["y"])]
    ports = [port("x", ["n", 64])], [port("y", None)]
    target = quantize(
        save(tmp_path / "m.onnx", [widen, *layer], *ports, {"w": weight, "bias": bias}), everything(storage)
    )
    assert operators(target) == ["Cast", "MatMulNBits" if storage.block_size else "DynamicQuantizeMatMul"]
    assert relative_error(run(target, x=x), x @ weight + bias) < 0.02


@pytest.mark.parametrize("inputs", [16, 48, 131])
def test_dynamic_int8(tmp_path: Path, inputs: int) -> None:
    weight, x = normal(inputs, 24), normal(9, inputs)
    target = quantize(save_linear(tmp_path / "m.onnx", weight), everything(DYNAMIC))
    assert operators(target) == ["DynamicQuantizeMatMul"]
    held = initializers(target)
    codes, scales = held["w.weight.int8"], held["w.weight.scales"]
    assert (codes.dtype, codes.shape, scales.shape) == (np.dtype(np.int8), weight.shape, (24,))
    kept = codes.astype(np.float32) * scales.astype(np.float32)
    assert relative_error(kept, weight) < 0.008
    # What the operator does to its input: uint8 over the range of the whole tensor, zero included.
    low, high = min(x.min(), 0), max(x.max(), 0)
    step = np.float32((high - low) / 255)
    zero_point = np.rint(-low / step)
    rounded = (np.clip(np.rint(x / step) + zero_point, 0, 255) - zero_point) * step
    assert relative_error(run(target, x=x), rounded @ kept) < 1e-5


def test_dynamic_int8_needs_float32_activations(tmp_path: Path) -> None:
    source = save_linear(tmp_path / "m.onnx", normal(64, 64, dtype=np.float16))
    with pytest.raises(UsageError, match="float32 bundle"):
        quantize(source, SCHEMES["int8"])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [48, 40, 130])
def test_gather(tmp_path: Path, bits: int, width: int) -> None:
    table, ids = normal(20, width), np.array([[3, 0, 19], [7, 7, -1]])
    node = helper.make_node("Gather", ["table", "ids"], ["y"])
    ports = [port("ids", ["b", "n"], TensorProto.INT64)], [port("y", ["b", "n", width])]
    source = save(tmp_path / "m.onnx", [node], *ports, {"table": table})
    target = quantize(source, everything(blocks(bits)))
    assert operators(target) == ["GatherBlockQuantized"]
    held = initializers(target)
    codes, scales = held[f"table.int{bits}"].astype(np.uint8), held["table.scales"].astype(np.float32)
    assert codes.shape == (20, width * bits // 8)
    padded = np.pad(codes, ((0, 0), (0, scales.shape[1] * 128 * bits // 8 - codes.shape[1])))
    kept = unpack_blocks(padded.reshape(20, scales.shape[1], -1), scales, bits, width)
    assert relative_error(kept, table) < (0.12 if bits == 4 else 0.008)
    np.testing.assert_array_equal(run(target, ids=ids), kept[ids])


def test_a_table_whose_rows_would_share_a_byte_stays_float(tmp_path: Path) -> None:
    node = helper.make_node("Gather", ["table", "ids"], ["y"])
    ports = [port("ids", ["n"], TensorProto.INT64)], [port("y", None)]
    source = save(tmp_path / "m.onnx", [node], *ports, {"table": normal(20, 33)})
    assert operators(quantize(source, everything(blocks(4)))) == ["Gather"]
    assert operators(quantize(source, everything(blocks(8)))) == ["GatherBlockQuantized"]


@pytest.mark.parametrize("bits", [4, 8])
def test_float16_activations(tmp_path: Path, bits: int) -> None:
    weights = {"table": normal(20, 64, dtype=np.float16), "w": normal(64, 48, dtype=np.float16)}
    nodes = [helper.make_node("Gather", ["table", "ids"], ["x"]), helper.make_node("MatMul", ["x", "w"], ["y"])]
    ports = [port("ids", ["n"], TensorProto.INT64)], [port("y", None, TensorProto.FLOAT16)]
    target = quantize(save(tmp_path / "m.onnx", nodes, *ports, weights), everything(blocks(bits, 32)))
    held = initializers(target)
    assert {held["w.scales"].dtype, held["table.scales"].dtype} == {np.dtype(np.float16)}
    table, w = (kept_blocks(target, name, bits, 64) for name in ("table", "w"))
    assert relative_error(run(target, ids=np.arange(20)), table @ w.T) < LEVEL_4


def save_conv(path: Path, op_type: str, weight: NDArray[np.floating]) -> Path:
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    channels = weight.shape[1] if op_type == "Conv" else weight.shape[0]
    nodes = [helper.make_node(op_type, ["x", "w"], ["z"], pads=[1] * 4), helper.make_node("Relu", ["z"], ["y"])]
    ports = [port("x", ["b", channels, "h", "w"], kind)], [port("y", None, kind)]
    return save(path, nodes, *ports, {"w": weight})


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("storage", [CHANNELS, HALF], ids=str)
def test_convolutions_expand_when_the_session_opens(
    tmp_path: Path, op_type: str, storage: Storage, dtype: type[np.floating]
) -> None:
    weight, x = normal(16, 8, 3, 3, dtype=dtype), normal(2, 8 if op_type == "Conv" else 16, 6, 5, dtype=dtype)
    source = save_conv(tmp_path / "m.onnx", op_type, weight)
    target = quantize(source, replace(SCHEMES["int4"], conv=storage, min_elements=0))
    error = relative_error(run(target, x=x), run(source, x=x))
    assert error < (0.02 if storage is CHANNELS else 1e-3)
    optimized = tmp_path / "optimized.onnx"
    session(target, optimized)
    graph = onnx.load(optimized).graph
    assert not {"Mul", "DequantizeLinear"} & {node.op_type for node in graph.node}
    constants = {tensor.name for tensor in graph.initializer}
    # Float16 activations are cast to what the CPU computes in; the weights must not be.
    assert not [node for node in graph.node if node.op_type == "Cast" and node.input[0] in constants]
    (conv,) = (node for node in graph.node if "Conv" in node.op_type)
    assert conv.input[1] in constants


@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose"])
def test_the_largest_convolutions_expand_on_every_run(
    tmp_path: Path, op_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = normal(16, 8, 3, 3), normal(2, 8 if op_type == "Conv" else 16, 6, 5)
    source = save_conv(tmp_path / "m.onnx", op_type, weight)
    at_once = quantize(source, replace(SCHEMES["int4"], conv=CHANNELS, min_elements=0))
    expected = run(at_once, x=x)
    monkeypatch.setattr(expand, "LATE_ELEMENTS", weight.size)
    late = quantize(source, replace(SCHEMES["int4"], conv=CHANNELS, min_elements=0))
    assert relative_error(run(late, x=x), expected) < EXACT
    optimized = tmp_path / "optimized.onnx"
    session(late, optimized)
    (node,) = (node for node in onnx.load(optimized).graph.node if node.op_type == "DequantizeLinear")
    held = initializers(late)
    assert held[node.input[0]].dtype == np.uint8
    assert sum(array.nbytes for array in held.values()) < weight.nbytes / 2


def test_any_weight_can_be_kept_in_float16(tmp_path: Path) -> None:
    weight, x = normal(64, 48), normal(7, 64)
    target = quantize(save_linear(tmp_path / "m.onnx", weight), everything(HALF))
    assert initializers(target)["w.weight.float16"].dtype == np.float16
    assert relative_error(run(target, x=x), x @ weight.astype(np.float16).astype(np.float32)) < EXACT
