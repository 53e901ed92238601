"""What a pass multiplies, read from a run of the starter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from pochade.benchmarks import step_bound
from pochade.benchmarks.step_bound import ATTENTION, INT8, Work
from pochade.bundle import Bundle
from pochade.quant.bundle import quantize_bundle
from pochade.quant.scheme import SCHEMES
from pochade.runtime.locate import resolve
from tests.quant.graphs import needs_vnni


def test_operations_are_two_for_each_product_of_numbers() -> None:
    assert Work("DynamicQuantizeMatMul", ((1, 10, 3), (3, 7))).operations == 2 * 10 * 3 * 7
    assert Work("Conv", ((1, 3, 8, 8), (5, 3, 1, 1))).operations == 2 * 64 * 3 * 5
    # Scores of every token for every other in every head, and as much again for what they mix.
    heads, width, queries, keys = 2, 4, 6, 5
    given = ((1, queries, heads * width), (1, keys, heads * width), (1, keys, heads * width))
    assert Work("MultiHeadAttention", given, heads).operations == 2 * heads * (2 * queries * keys * width)


def test_a_pass_is_never_faster_than_its_bound_allows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "bound.json"
    step_bound.main(["starter", "--size", "64x64", "--passes", "1", "--seconds", "0.05", "--json", str(target)])
    report = json.loads(target.read_text("utf-8"))
    assert f"{100 * report['fraction']:.0f} %" in capsys.readouterr().out
    assert report["bound"] > 0 and report["fraction"] == pytest.approx(report["bound"] / report["median"])
    operations, rates, floats = report["operations"], report["best_rates"], report["float_rates"]
    assert report["bound"] == pytest.approx(sum(operations[kind] / rate for kind, rate in rates.items()))
    assert report["float_bound"] == pytest.approx(sum(operations[kind] / rate for kind, rate in floats.items()))
    # The starter attends in float32.
    assert floats[INT8] != rates[INT8] and floats[ATTENTION] == rates[ATTENTION]
    nodes = ir.load(Bundle.open(resolve("starter")).component_path("transformer")).graph.all_nodes()
    products = sum(node.op_type == "DynamicQuantizeMatMul" for node in nodes)
    counted = [row for row in report["rates"] if row["op"] == "DynamicQuantizeMatMul"]
    assert 0 < sum(row["count"] for row in counted) <= products
    total = sum(row["count"] * Work(row["op"], tuple(map(tuple, row["shapes"]))).operations for row in counted)
    assert total <= report["operations"][INT8]
    best = max(row["rate"] for row in counted)
    assert report["best_rates"][INT8] == best and report["best_rates"][ATTENTION] > 0


@needs_vnni
def test_attention_of_8_bits_is_counted_like_that_of_floats(small_bundles: dict[str, Path], tmp_path: Path) -> None:
    counted, rates = {}, {}
    for products in (8, 32):
        scheme = replace(SCHEMES["int8"], int8_attention=products == 8)
        made = quantize_bundle(small_bundles["monetico-tiny"], tmp_path / str(products), scheme)
        report = step_bound.measure(made.path, 64, 64, 1, 1, 0.05)
        counted[products] = report["operations"]
        rates[products] = report["best_rates"][ATTENTION], report["float_rates"][ATTENTION]
    assert counted[8] == counted[32]
    assert rates[8][0] != rates[8][1] and rates[32][0] == rates[32][1]
