"""Attention on 8-bit numbers: near the exact one however it is spread, and left alone where it is another kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import NodeProto, helper

from pochade.bundle import Bundle
from pochade.errors import DeviceUnavailableError
from pochade.gpu_graph import save_gpu_graph
from pochade.quant import attention
from pochade.quant.bundle import quantize_bundle
from pochade.quant.fidelity import open_pipeline
from pochade.quant.scheme import SCHEMES
from pochade.runtime import opening
from tests.quant.graphs import needs_vnni, port, run, save

HEADS, WIDTH = 2, 64
TENSOR: list[str | int] = [1, "tokens", WIDTH]
ATTENTION = "MultiHeadAttention"


def attend(*inputs: str, **attributes: Any) -> NodeProto:
    return helper.make_node(ATTENTION, inputs, ["y"], domain="com.microsoft", num_heads=HEADS, **attributes)


def round_graph(path: Path, node: NodeProto) -> tuple[Path, Path, int]:
    """A graph of one attention as it was, with its attention rounded, and how many were."""
    operands = [port(name, TENSOR) for name in dict.fromkeys(filter(None, node.input))]
    exact = save(path / "exact.onnx", [node], operands, [port("y", TENSOR)], {})
    model = ir.load(exact)
    count = attention.rewrite(model)
    rounded = path / "rounded.onnx"
    ir.save(model, rounded)
    return exact, rounded, count


@needs_vnni
@pytest.mark.parametrize("sharpness", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("attributes", [{}, {"scale": 0.3}])
def test_spread_and_sharp_attention_stay_right(sharpness: float, attributes: dict[str, float], tmp_path: Path) -> None:
    exact, rounded, count = round_graph(tmp_path, attend("q", "k", "v", **attributes))
    assert count == 1
    rng = np.random.default_rng(0)
    # More than 512 tokens, so that an even share is less than half of a 255th.
    q, k, v = rng.standard_normal((3, 1, 700, WIDTH)).astype(np.float32)
    inputs = {"q": q * np.float32(sharpness), "k": k, "v": v}
    expected, found = run(exact, **inputs), run(rounded, **inputs)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 0 < error < 0.05
    assert ATTENTION not in [node.op_type for node in ir.load(rounded).graph]
    # Graphs for cards have the attention that it was.
    made = save_gpu_graph(rounded, "float32")
    assert made is not None
    assert [node.op_type for node in ir.load(tmp_path / made.file).graph] == [ATTENTION]
    np.testing.assert_allclose(run(tmp_path / made.file, **inputs), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "node",
    [
        attend("q", "k", "v", "bias"),
        attend("q", "k", "v", "", "", "attention_bias"),
        attend("packed"),
        attend("q", "k", "v", unidirectional=1),
    ],
)
def test_other_kinds_are_left_alone(node: NodeProto, tmp_path: Path) -> None:
    *_, count = round_graph(tmp_path, node)
    assert count == 0


@needs_vnni
def test_a_bundle_says_so_and_processors_that_overflow_refuse_it(
    small_bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = quantize_bundle(
        small_bundles["monetico-tiny"], tmp_path / "made", replace(SCHEMES["int8"], int8_attention=True)
    )
    components = made.manifest.components
    transformer, text = components["transformer"].quantization, components["text_encoder"].quantization
    assert transformer is not None and text is not None
    assert transformer["int8_attentions"] > 0
    # It has a mask.
    assert text["int8_attentions"] == 0
    scorecard = made.manifest.scorecard
    assert scorecard is not None
    assert scorecard["components"]["transformer"]["snr_db"] > 30
    monkeypatch.setattr(opening, "saturates", lambda: True)
    with pytest.raises(DeviceUnavailableError, match="needs a processor with VNNI"):
        open_pipeline(Bundle.open(tmp_path / "made"))("a cat", num_inference_steps=1)
