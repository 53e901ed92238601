"""HunyuanDiT through quantization, against its own dequantized weights in PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pochade.quant.component import quantize_component
from pochade.quant.rtn import unpack_blocks
from pochade.quant.scheme import DYNAMIC, FLOAT, SCHEMES, Scheme, Use, blocks
from tests import hunyuan
from tests.quant.graphs import needs_vnni

COMPONENTS = ("condition", "transformer")
HEIGHT, WIDTH = 8, 12


def exact_products(name: str) -> Scheme:
    """The scheme, rounding weights to nearest and computing products of them in float32.

    Rounded activations would add an error of their own to the one of weights, which is what is held here.
    """
    scheme = SCHEMES[name]

    def exact(storage: Any) -> Any:
        return replace(storage, accuracy_level=1)

    return replace(scheme, rounding="rtn", linear=exact(scheme.linear), sensitive=exact(scheme.sensitive))


def quantized(graphs: Path, folder: Path, scheme: Scheme) -> Path:
    for name in COMPONENTS:
        quantize_component(graphs / f"{name}.onnx", folder / f"{name}.onnx", name, scheme)
    return folder


def nodes(path: Path) -> list[onnx.NodeProto]:
    return list(onnx.load(path, load_external_data=False).graph.node)


def dequantized(path: Path) -> dict[str, Tensor]:
    """Weights of linear layers as the graph holds them, by parameter name; products joined at export are cut."""
    weights: dict[str, Tensor] = {}
    for node in ir.load(path).graph:
        if node.op_type != "MatMulNBits":
            continue
        codes, scales = (value.const_value for value in node.inputs[1:3] if value is not None)
        assert codes is not None and scales is not None and codes.name is not None
        bits, width = node.attributes["bits"].as_int(), node.attributes["K"].as_int()
        matrix: NDArray[np.float32] = unpack_blocks(codes.numpy(), scales.numpy(), bits, width)
        names = codes.name.rpartition(".T.")[0].replace(".T+", "+").split("+")
        weights |= dict(zip(names, torch.from_numpy(matrix).chunk(len(names)), strict=True))
    return weights


@pytest.mark.parametrize("version", hunyuan.VERSIONS)
def test_int4_computes_what_its_weights_say(version: str, hunyuan_graphs: dict[str, Path], tmp_path: Path) -> None:
    folder = quantized(hunyuan_graphs[version], tmp_path, exact_products("int4"))
    plans = hunyuan.plans(hunyuan.transformer(version))
    modules = {}
    for name in COMPONENTS:
        modules[name] = hunyuan.filled(plans[name])
        weights = dequantized(folder / f"{name}.onnx")
        assert len(weights) > 10
        assert not modules[name].load_state_dict(weights, strict=False).unexpected_keys
    told = hunyuan.condition_inputs(version)
    expected = modules["condition"](*told.values())
    found = hunyuan.run(folder / "condition.onnx", told)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    inputs = hunyuan.step_inputs(expected[0], expected[1], 1, HEIGHT, WIDTH)
    prediction = hunyuan.run(folder / "transformer.onnx", inputs)[0]
    torch.testing.assert_close(prediction, modules["transformer"](*inputs.values()), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("scheme", "int8_attention", "least"),
    [("int8", False, 34.0), ("int4", False, 19.0), pytest.param("int8", True, 33.0, marks=needs_vnni)],
)
def test_quantized_step_stays_close(
    scheme: str, int8_attention: bool, least: float, hunyuan_graphs: dict[str, Path], tmp_path: Path
) -> None:
    """In dB, on random weights rounded to nearest: sane, not good."""
    graphs = hunyuan_graphs["v1.2"]
    folder = quantized(graphs, tmp_path, replace(SCHEMES[scheme], rounding="rtn", int8_attention=int8_attention))
    exact_kind, rounded_kind = "MultiHeadAttention", "RoundedAttention"
    kept = [node.op_type for node in nodes(graphs / "transformer.onnx") if node.op_type == exact_kind]
    attentions = [node.op_type for node in nodes(folder / "transformer.onnx") if "Attention" in node.op_type]
    kind = rounded_kind if int8_attention else exact_kind
    assert kept and len(attentions) == len(kept) and all(each.startswith(kind) for each in attentions)
    results = []
    for source in (graphs, folder):
        condition = hunyuan.run(source / "condition.onnx", hunyuan.condition_inputs("v1.2"))
        results.append(
            hunyuan.run(source / "transformer.onnx", hunyuan.step_inputs(condition[0], condition[1], 0, HEIGHT, WIDTH))[
                0
            ]
        )
    exact, found = results
    assert 10 * torch.log10(exact.square().sum() / (exact - found).square().sum()) > least
    # No linear layer of the blocks was passed over; the two outermost are not rounded.
    left = [node.input[1] for node in nodes(folder / "transformer.onnx") if node.op_type in ("MatMul", "Gemm")]
    assert sorted(left) == ["patch_in.weight.T", "patch_out.weight.T"]
    # Too small here to be rounded.
    left = [node.input[1] for node in nodes(folder / "condition.onnx") if node.op_type in ("MatMul", "Gemm")]
    assert left == ["time_extra_emb.pooler.c_proj.weight.T"]


def test_rules() -> None:
    int8, int4 = SCHEMES["int8"], SCHEMES["int4"]

    def form(scheme: Scheme, name: str) -> Any:
        return scheme.storage(Use.LINEAR, name)

    assert form(int4, "transformer/blocks.30.ff.net.2.weight.T") == blocks(4)
    assert form(int4, "transformer/blocks.30.skip_linear.weight.T") == blocks(8)
    assert form(int4, "transformer/patch_in.weight.T") == form(int8, "transformer/patch_out.weight.T") == FLOAT
    for name in ("norm_out.linear", "time_extra_emb.timestep_embedder.linear_1", "extra_in", "blocks.3.norm1.linear"):
        assert form(int4, f"condition/{name}.weight.T") == blocks(8)
        assert form(int8, f"condition/{name}.weight.T") == DYNAMIC
    for name in ("text_embedder.linear_1", "time_extra_emb.pooler.k_proj"):
        assert form(int8, f"condition/{name}.weight.T") == blocks(8)
