"""Codec layers kept in float16: near the float32 picture at any number of strips, and beyond float16's range."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from pochade.bundle import Bundle
from pochade.quant import half_layers
from pochade.quant.bundle import quantize_bundle
from pochade.quant.fidelity import open_pipeline
from pochade.quant.scheme import SCHEMES
from tests.quant.graphs import relative_error, session

ROWS, COLUMNS = 6, 4


def scanned(model: ir.Model) -> list[ir.Value]:
    """Pictures that Scans give."""
    values = (value for node in model.graph.all_nodes() if node.op_type == "Scan" for value in node.outputs)
    return [value for value in values if value.shape is not None and len(value.shape) == 4]


def narrowed(source: Path, target: Path, bias: float = 0.0) -> tuple[Path, Path]:
    """A decoder whose first layer got something on top, and the same with layers in float16."""
    model = ir.load(source)
    value = model.graph.initializers["decoder.conv_in.bias"]
    assert value.const_value is not None
    value.const_value = ir.Tensor(value.const_value.numpy() + np.float32(bias), name=value.name)
    ir.save(model, target / "exact.onnx", external_data="exact.onnx.data")
    model = ir.load(target / "exact.onnx")
    assert half_layers.rewrite(model) == len(scanned(model)) - 1
    ir.save(model, target / "half.onnx", external_data="half.onnx.data")
    return target / "exact.onnx", target / "half.onnx"


def pictures(path: Path) -> list[NDArray[np.float32]]:
    """One grid, decoded in one strip and in several."""
    opened = session(path)
    tokens = np.random.default_rng(0).integers(0, 32, (1, ROWS, COLUMNS))
    ways = [(count, small) for small in (False, True) for count in (1, 3, ROWS)]
    feeds = ({"tokens": tokens, "strips": np.array([count]), "recompute": np.array(small)} for count, small in ways)
    return [opened.run(None, feed)[0] for feed in feeds]


# Layers of 100 000 leave float16's range, which ends at 65 504.
@pytest.mark.parametrize("bias", [0.0, 1e5])
def test_pictures_stay(decoder: Path, tmp_path: Path, bias: float) -> None:
    exact, half = (pictures(path) for path in narrowed(decoder, tmp_path, bias))
    for expected, found in zip(exact, half, strict=True):
        assert 0 < relative_error(found, expected) < 0.004
    # Rounding is that of the numbers, whatever strip they are in: there are no seams.
    for other in half[1:]:
        assert relative_error(other, half[0]) < 1e-3


def test_all_layers_but_the_picture_are_half(decoder: Path, tmp_path: Path) -> None:
    _, path = narrowed(decoder, tmp_path)
    *layers, picture = scanned(ir.load(path))
    assert len(layers) > 10
    assert {value.dtype for value in layers} == {ir.DataType.FLOAT16}
    assert picture.dtype is ir.DataType.FLOAT


def test_graphs_without_strips_are_left_alone(bundles: dict[str, Path]) -> None:
    for name in ("transformer", "sampler", "text_encoder"):
        model = ir.load(bundles["monetico-tiny"] / f"{name}.onnx")
        before = [node.op_type for node in model.graph.all_nodes()]
        assert half_layers.rewrite(model) == 0
        assert [node.op_type for node in model.graph.all_nodes()] == before


def test_schemes_do_it_unless_told_not_to(small_bundles: dict[str, Path], tmp_path: Path) -> None:
    made = quantize_bundle(small_bundles["monetico-tiny"], tmp_path / "half", SCHEMES["int8"])
    wide = replace(SCHEMES["int8"], half_layers=False)
    kept = quantize_bundle(small_bundles["monetico-tiny"], tmp_path / "wide", wide)
    for bundle, narrow in ((made, True), (kept, False)):
        counts = {name: (c.quantization or {}).get("half_layers", 0) for name, c in bundle.manifest.components.items()}
        assert (counts.pop("vq_decoder") > 0, counts.pop("vq_encoder") > 0) == (narrow, narrow)
        assert set(counts.values()) == {0}
        with open_pipeline(Bundle.open(bundle.path)) as pipe:
            assert pipe("a fox", width=64, height=64, num_inference_steps=1, seed=1).images[0].size == (64, 64)
