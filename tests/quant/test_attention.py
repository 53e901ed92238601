"""Attention on 8-bit numbers: near the exact one however it is spread, and left alone where it is another kind."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, helper

from pochade.bundle import Bundle
from pochade.errors import DeviceUnavailableError
from pochade.gpu_graph import ROUNDED_ATTENTION, save_gpu_graph
from pochade.manifest import MANIFEST_NAME
from pochade.quant import attention
from pochade.quant.bundle import quantize_bundle
from pochade.quant.fidelity import open_pipeline
from pochade.quant.scheme import SCHEMES
from pochade.runtime import opening
from pochade.runtime.pipeline import Pipeline
from tests.quant.graphs import needs_vnni, port, run, save

WIDTH = 96
TENSOR: list[str | int] = [1, "tokens", WIDTH]
ATTENTION = "MultiHeadAttention"


def attend(*inputs: str, heads: int = 2, **attributes: Any) -> NodeProto:
    return helper.make_node(ATTENTION, inputs, ["y"], domain="com.microsoft", num_heads=heads, **attributes)


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
@pytest.mark.parametrize("attributes", [{}, {"scale": 0.3}, {"heads": 1}, {"heads": 8}, {"heads": 6}])
def test_spread_and_sharp_attention_stay_right(sharpness: float, attributes: dict[str, Any], tmp_path: Path) -> None:
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


@pytest.fixture(scope="module")
def rounded(small_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle by the scheme as it is."""
    return quantize_bundle(small_bundles["monetico-tiny"], tmp_path_factory.mktemp("rounded") / "int8", SCHEMES["int8"])


def attentions(path: Path) -> tuple[int, int]:
    """How many attentions of a graph are rounded, and how many are not."""
    nodes = [node.op_type for node in ir.load(path).graph]
    return sum(name.startswith(ROUNDED_ATTENTION) for name in nodes), nodes.count(ATTENTION)


@needs_vnni
def test_a_family_with_pictures_to_judge_by_is_rounded(rounded: Bundle) -> None:
    components = rounded.manifest.components
    transformer, text = components["transformer"], components["text_encoder"]
    assert transformer.quantization is not None and text.quantization is not None
    count = transformer.quantization["int8_attentions"]
    assert count > 0
    # It has a mask.
    assert text.quantization["int8_attentions"] == 0
    assert text.float_attention is None
    scorecard = rounded.manifest.scorecard
    assert scorecard is not None
    assert scorecard["components"]["transformer"]["snr_db"] > 30
    for graphs in (transformer, transformer.lora):
        assert graphs is not None and graphs.float_attention is not None
        assert attentions(rounded.path / graphs.file) == (count, 0)
        assert attentions(rounded.path / graphs.float_attention) == (0, count)


def test_others_are_rounded_by_request_alone() -> None:
    scheme = SCHEMES["int8"]
    assert [scheme.for_family(name).int8_attention for name in ("meissonic", "hunyuandit")] == [True, False]
    for wish in (True, False):
        assert replace(scheme, int8_attention=wish).for_family("meissonic").int8_attention is wish
        assert replace(scheme, int8_attention=wish).for_family("hunyuandit").int8_attention is wish


def paint(pipe: Pipeline) -> NDArray[np.uint8]:
    """The numbers of a picture."""
    return np.asarray(pipe("a cat", num_inference_steps=2, seed=3).images[0])


@needs_vnni
def test_processors_that_overflow_attend_in_float32(
    rounded: Bundle, small_bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    open_session = opening._open

    def watched(path: Path, *given: Any) -> Any:
        opened.append(path.name)
        return open_session(path, *given)

    exact = quantize_bundle(
        small_bundles["monetico-tiny"], tmp_path / "exact", replace(SCHEMES["int8"], int8_attention=False)
    )
    with open_pipeline(exact) as pipe:
        expected = paint(pipe)
    monkeypatch.setattr(opening, "_open", watched)
    painted = {}
    for overflows, graph in ((False, "transformer.onnx"), (True, "transformer.float_attention.onnx")):
        monkeypatch.setattr(opening, "saturates", lambda overflows=overflows: overflows)
        opened.clear()
        with open_pipeline(rounded) as pipe:
            painted[overflows] = paint(pipe)
        assert [name for name in opened if name.startswith("transformer")] == [graph]
    assert exact.manifest.components["transformer"].float_attention is None
    np.testing.assert_array_equal(painted[True], expected)


@needs_vnni
def test_bundles_without_that_graph_are_refused_there(
    rounded: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = shutil.copytree(rounded.path, tmp_path / "made")
    manifest = json.loads((made / MANIFEST_NAME).read_text("utf-8"))
    transformer = manifest["components"]["transformer"]
    gone = {transformer.pop("float_attention"), transformer["lora"].pop("float_attention")}
    manifest["files"] = [entry for entry in manifest["files"] if entry["path"] not in gone]
    for name in gone:
        (made / name).unlink()
    (made / MANIFEST_NAME).write_text(json.dumps(manifest), "utf-8")
    monkeypatch.setattr(opening, "saturates", lambda: True)
    with (
        open_pipeline(Bundle.open(made)) as pipe,
        pytest.raises(DeviceUnavailableError, match="quantize it again for a graph"),
    ):
        pipe("a cat", num_inference_steps=1)
