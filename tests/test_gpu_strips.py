"""Rows of neighbouring strips are cut before loops on a card: the same numbers, at positions no body is handed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from pochade.gpu_graph import save_gpu_graph
from pochade.gpu_strips import take_rows_before_loops
from pochade.graph_edit import subgraphs
from tests.quant.graphs import session

ROWS, COLUMNS = 6, 4


def bodies(path: Path) -> list[ir.Graph]:
    scans = (node for node in ir.load(path).graph.all_nodes() if node.op_type == "Scan")
    return [body for scan in scans for body in subgraphs(scan)]


def cuts_at_positions(path: Path) -> int:
    """Cuts in bodies that begin where the loop says."""
    return sum(node.op_type == "Slice" and node.inputs[1] in body.inputs for body in bodies(path) for node in body)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("strips", [1, 2, 3, ROWS])
def test_a_decoder_gives_the_same_picture(bundles: dict[str, Path], tmp_path: Path, strips: int, small: bool) -> None:
    path = bundles["monetico-tiny"] / "vq_decoder.onnx"
    model = ir.load(path)
    assert take_rows_before_loops(model) == cuts_at_positions(path) > 20
    ir.save(model, changed := tmp_path / "changed.onnx", external_data="changed.data")
    assert cuts_at_positions(changed) == 0
    tokens = np.random.default_rng(strips).integers(0, 32, (1, ROWS, COLUMNS))
    inputs = {"tokens": tokens, "strips": np.array([strips]), "recompute": np.array(small)}
    exact, found = (session(each).run(None, inputs)[0] for each in (path, changed))
    assert np.array_equal(found, exact) and found.std() > 0


def test_an_encoder_gives_the_same_tokens(bundles: dict[str, Path], tmp_path: Path) -> None:
    path = bundles["monetico-tiny"] / "vq_encoder.onnx"
    model = ir.load(path)
    assert take_rows_before_loops(model) > 10
    ir.save(model, changed := tmp_path / "changed.onnx", external_data="changed.data")
    factor = 16
    image = np.random.default_rng(0).uniform(-1, 1, (1, 3, ROWS * factor, COLUMNS * factor)).astype(np.float32)
    exact, found = (session(each).run(None, {"image": image, "strips": np.array([3])})[0] for each in (path, changed))
    assert np.array_equal(found, exact)


def test_no_position_is_left_in_bodies_of_a_float_bundle(bundles: dict[str, Path], tmp_path: Path) -> None:
    source = bundles["monetico-tiny"] / "vq_decoder.onnx"
    for file in source.parent.glob("vq_decoder.onnx*"):
        shutil.copy(file, tmp_path)
    made = save_gpu_graph(tmp_path / source.name, "float32")
    assert made is not None and made.file == "vq_decoder.gpu.onnx"
    for body in bodies(tmp_path / made.file):
        assert all(value.dtype is not ir.DataType.INT64 for value in body.inputs)
    # On the same weights, and no more of them.
    assert not list(tmp_path.glob("vq_decoder.gpu.onnx.*"))


def test_other_graphs_are_left_alone(bundles: dict[str, Path]) -> None:
    for name in ("transformer", "sampler", "text_encoder"):
        assert take_rows_before_loops(ir.load(bundles["monetico-tiny"] / f"{name}.onnx")) == 0
