"""The transformer of HunyuanDiT against the reference library."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from pochade.export.modules.hunyuan_dit import HunyuanConfig, HunyuanDiT
from tests import hunyuan

GRIDS = [(8, 8), (12, 20), (10, 6)]
"""Latent height and width; the tables are those of training, given to both."""
TOLERANCE = 2e-5
"""Of numbers around 1, after six blocks in float32: sums in another order."""


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module", params=hunyuan.VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def reference(version: str) -> Any:
    return hunyuan.transformer(version)


@pytest.fixture
def graphs(version: str, hunyuan_graphs: dict[str, Path]) -> Path:
    return hunyuan_graphs[version]


def reference_step(reference: Any, latent: Tensor, timestep: float, controls: list[Tensor] | None = None) -> Tensor:
    """All output channels of the reference with our tables."""
    text = hunyuan.text_inputs()
    rope = tuple(table.repeat_interleave(2, dim=-1) for table in hunyuan.tables(*latent.shape[-2:]))
    output: Tensor = reference(
        latent,
        torch.full((len(latent),), timestep),
        encoder_hidden_states=text["text_states"],
        text_embedding_mask=text["text_mask"],
        encoder_hidden_states_t5=text["text_states_2"],
        text_embedding_mask_t5=text["text_mask_2"],
        image_meta_size=hunyuan.meta_sizes(),
        style=torch.zeros(len(latent), dtype=torch.int64),
        image_rotary_emb=rope,
        controlnet_block_samples=controls,
        return_dict=False,
    )[0]
    return output


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_network_agrees_with_the_reference(reference: Any, version: str, height: int, width: int) -> None:
    module = HunyuanDiT(HunyuanConfig.from_dict(dict(reference.config))).requires_grad_(False)
    module.load_state_dict(reference.state_dict())
    latent = torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(2))
    sizes = hunyuan.meta_sizes() if version == "v1.1" else None
    text = hunyuan.text_inputs().values()
    found = module(latent, torch.tensor([751.0]), *text, hunyuan.tables(height, width), sizes)
    close(found, reference_step(reference, latent, 751.0))


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_components_agree_with_the_reference(
    reference: Any, graphs: Path, version: str, height: int, width: int, step: int
) -> None:
    """The split in two, in eager PyTorch and in ONNX Runtime; only the four channels that samplers use."""
    told, plans = hunyuan.condition_inputs(version), hunyuan.plans(reference)
    conditions = [hunyuan.filled(plans["condition"])(*told.values()), hunyuan.run(graphs / "condition.onnx", told)]
    for context, modulation in conditions:
        inputs = hunyuan.step_inputs(context, modulation, step, height, width)
        expected = reference_step(reference, inputs["latent"], float(told["timesteps"][step]))[:, :4]
        close(hunyuan.filled(plans["transformer"])(*inputs.values()), expected)
        close(hunyuan.run(graphs / "transformer.onnx", inputs)[0], expected)


def test_controls_are_added_to_the_skips(reference: Any, graphs: Path, version: str) -> None:
    """Without any they are zero, as the tests above have them."""
    config, told, plans = (
        HunyuanConfig.from_dict(dict(reference.config)),
        hunyuan.condition_inputs(version),
        hunyuan.plans(reference),
    )
    context, modulation = hunyuan.filled(plans["condition"])(*told.values())
    inputs = hunyuan.step_inputs(context, modulation, 1, 12, 20)
    controls = torch.randn(config.num_skips, 2, 6 * 10, config.dim, generator=torch.Generator().manual_seed(4))
    expected = reference_step(reference, inputs["latent"], float(told["timesteps"][1]), list(controls.unbind()))[:, :4]
    close(hunyuan.filled(plans["transformer"])(*inputs.values(), controls), expected)
    close(hunyuan.run(graphs / "transformer.onnx", inputs | {"controls": controls})[0], expected)


def test_controls_may_be_left_out(graphs: Path) -> None:
    """They are a graph input that is an initializer too, and no axis of it is taken for one of another tensor."""
    model = ir.load(graphs / "transformer.onnx")
    controls = model.graph.inputs[-1]
    assert controls.name == "controls" and controls.is_initializer() and controls.const_value is not None
    assert controls.const_value.shape == (2, 1, 1, 1) and not controls.const_value.numpy().any()
    others = [str(axis) for value in model.graph.inputs[:-1] for axis in value.shape or ()]
    assert controls.shape is not None and not {str(axis) for axis in controls.shape[1:]} & set(others)
    added = [use.node.outputs[0].shape for use in controls.uses()]
    assert len(added) == 2 and not {str(axis) for shape in added for axis in shape or ()} & set(others)


def linear_weights(path: Path) -> tuple[list[str], Counter[str]]:
    """Names of the weights of linear layers, joined ones joined by +, and the number of nodes of each kind."""
    model = ir.load(path)
    names = [
        str(node.inputs[1].name)
        for node in model.graph
        if node.op_type == "MatMul" and node.inputs[1] is not None and node.inputs[1].is_initializer()
    ]
    return names, Counter(node.op_type for node in model.graph.all_nodes())


def test_every_linear_layer_is_a_matmul(reference: Any, graphs: Path) -> None:
    """So that quantization finds all of them: a Gemm or a weight behind a node would be passed over."""
    layers = {name for name, module in reference.named_modules() if isinstance(module, torch.nn.Linear)}
    found = set()
    for component in ("condition", "transformer"):
        names, kinds = linear_weights(graphs / f"{component}.onnx")
        assert not kinds["Gemm"] and not kinds["Conv"]
        found |= {name.rpartition(".weight")[0] for name in names}
    folded = {"time_extra_emb.extra_embedder.linear_1": "extra_in", "proj_out": "patch_out"}
    assert found == {folded.get(name, name) for name in layers} | {"patch_in"}


def test_every_linear_layer_of_a_block_is_a_product(graphs: Path) -> None:
    names, kinds = linear_weights(graphs / "transformer.onnx")
    layers, skips = hunyuan.TRANSFORMER["num_layers"], hunyuan.TRANSFORMER["num_layers"] // 2 - 1
    # Query, key, value and out of both attentions, and two of the MLP.
    assert len(names) == 10 * layers + skips + 2
    assert {"blocks.0.attn1.to_q.weight.T", "blocks.5.attn2.to_v.weight.T"} <= set(names)
    assert kinds["MultiHeadAttention"] == 2 * layers and kinds["RotaryEmbedding"] == 3 * layers
    assert not kinds["Softmax"] and not kinds["Einsum"]
    # Three of a block, four norms of heads, the skips' and the last one.
    assert kinds["LayerNormalization"] == 7 * layers + skips + 1
