"""Linear layers of several inputs side by side, parted by them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from pochade.export.passes.part_inputs import PartInputsPass
from pochade.lora_graph import find_sites, save_lora_graph
from tests.quant.graphs import operators, port, run, save

RNG = np.random.default_rng(3)
WIDTHS = (4, 6, 8)


def graph(tmp_path: Path, bias: bool, widths: tuple[int, ...] = WIDTHS) -> tuple[Path, dict[str, np.ndarray]]:
    """`y = 2 * (concat(a, b, c) W + bias)`."""
    weights = {"layer.weight.T": RNG.standard_normal((sum(widths), 5)).astype(np.float32)}
    nodes = [
        helper.make_node("Concat", ["a", "b", "c"], ["joined"], axis=-1),
        helper.make_node("MatMul", ["joined", "layer.weight.T"], ["product"]),
    ]
    if bias:
        weights["layer.bias"] = RNG.standard_normal(5).astype(np.float32)
        nodes.append(helper.make_node("Add", ["product", "layer.bias"], ["biased"]))
    nodes.append(helper.make_node("Add", [nodes[-1].output[0]] * 2, ["y"]))
    inputs = [port(name, [1, "n", width]) for name, width in zip("abc", widths, strict=True)]
    path = save(tmp_path / "layer.onnx", nodes, inputs, [port("y", [1, "n", 5])], weights)
    feeds = {name: RNG.standard_normal((1, 3, n)).astype(np.float32) for name, n in zip("abc", widths, strict=True)}
    return path, feeds


@pytest.mark.parametrize("bias", [True, False])
def test_the_sum_of_parts_is_the_layer(tmp_path: Path, bias: bool) -> None:
    path, feeds = graph(tmp_path, bias)
    expected = run(path, **feeds)
    model = ir.load(path)
    assert PartInputsPass()(model).modified
    ir.save(model, tmp_path / "parted.onnx")
    found = operators(tmp_path / "parted.onnx")
    assert found.count("MatMul") == 3 and found.count("Add") == 3 + bias and "Concat" not in found
    assert np.allclose(run(tmp_path / "parted.onnx", **feeds), expected, atol=1e-5)
    rows = {value.name: value.const_value.shape[0] for value in model.graph.initializers.values() if value.const_value}
    assert [rows.get(f"layer.weight.T.inputs_from_{first}") for first in (0, 4, 10)] == list(WIDTHS)
    assert not PartInputsPass()(model).modified


@pytest.mark.parametrize("bias", [True, False])
def test_a_change_of_low_rank_reaches_all_parts(tmp_path: Path, bias: bool) -> None:
    path, feeds = graph(tmp_path, bias)
    weight = next(iter(ir.load(path).graph.initializers.values())).const_value
    assert weight is not None
    expected = run(path, **feeds)
    model = ir.load(path)
    PartInputsPass()(model)
    ir.save(model, tmp_path / "parted.onnx")
    (site,) = find_sites(ir.load(tmp_path / "parted.onnx"))
    assert (site.layer.inputs, site.layer.outputs, site.sources) == (18, {"layer": 5}, ("a", "b", "c"))
    assert site.layer.norms["layer"] == pytest.approx(np.linalg.norm(weight.numpy()), rel=1e-5)
    made = save_lora_graph(tmp_path / "parted.onnx", [site])
    assert made is not None
    down, up = (RNG.standard_normal(shape).astype(np.float32) for shape in ((18, 2), (2, 5)))
    given = {"layer.lora_A": down, "layer.lora_B": up}
    joined = np.concatenate(list(feeds.values()), axis=-1)
    assert np.allclose(run(tmp_path / made.file, **feeds, **given), expected + 2 * joined @ down @ up, atol=1e-4)
    assert np.allclose(run(tmp_path / made.file, **feeds), expected, atol=1e-5)


def test_what_others_read_is_left(tmp_path: Path) -> None:
    path, _ = graph(tmp_path, True)
    model = ir.load(path)
    joined = next(node for node in model.graph if node.op_type == "Concat")
    model.graph.append(ir.node("Identity", [joined.outputs[0]], name="another"))
    assert not PartInputsPass()(model).modified


def test_a_few_inputs_are_no_part(tmp_path: Path) -> None:
    path, _ = graph(tmp_path, True, (40, 2, 8))
    assert not PartInputsPass()(ir.load(path)).modified
