"""The transformer of HunyuanDiT against the reference library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from pochade.export.checkpoint import Tensors
from pochade.export.component import ComponentPlan
from pochade.export.hunyuan_components import condition_plan, transformer_plan
from pochade.export.modules.hunyuan_dit import HunyuanConfig, HunyuanDiT
from pochade.export.trace import build, save
from pochade.runtime.hunyuan_grid import rotary_tables
from tests import hunyuan

GRIDS = [(8, 8), (12, 20), (10, 6)]
"""Latent height and width; the tables are those of training, given to both."""
TOLERANCE = 2e-5
"""Of numbers around 1, after six blocks in float32: sums in another order."""


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def ours(version: str) -> tuple[Any, HunyuanDiT]:
    """Reference network and ours with its weights."""
    reference = hunyuan.transformer(version)
    module = HunyuanDiT(HunyuanConfig.from_dict(dict(reference.config)))
    module.load_state_dict(reference.state_dict())
    return reference, module.eval().requires_grad_(False)


def tables(height: int, width: int) -> tuple[Tensor, Tensor]:
    cos, sin = rotary_tables(height // 2, width // 2, 88)
    return torch.from_numpy(cos), torch.from_numpy(sin)


def reference_step(reference: Any, latent: Tensor, timestep: float, text: dict[str, Tensor], sizes: Tensor) -> Tensor:
    """All output channels of the reference with our tables."""
    rope = tuple(table.repeat_interleave(2, dim=-1) for table in tables(*latent.shape[-2:]))
    return reference(
        latent,
        torch.full((len(latent),), timestep),
        encoder_hidden_states=text["text_states"],
        text_embedding_mask=text["text_mask"],
        encoder_hidden_states_t5=text["text_states_2"],
        text_embedding_mask_t5=text["text_mask_2"],
        image_meta_size=sizes,
        style=torch.zeros(len(latent), dtype=torch.int64),
        image_rotary_emb=rope,
        return_dict=False,
    )[0]


@pytest.mark.parametrize("version", hunyuan.VERSIONS)
@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_network_agrees_with_the_reference(version: str, height: int, width: int) -> None:
    reference, module = ours(version)
    text, sizes = hunyuan.text_inputs(), hunyuan.meta_sizes()
    latent = torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(2))
    told = sizes if version == "v1.1" else None
    found = module(latent, torch.tensor([751.0]), *text.values(), tables(height, width), told)
    close(found, reference_step(reference, latent, 751.0, text, sizes))


class Stored(Tensors):
    """Tensors in memory."""

    where = Path("memory")

    def __init__(self, state: dict[str, Tensor]) -> None:
        self._state = state

    def keys(self) -> Collection[str]:
        return self._state.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._state[key].shape)

    def __getitem__(self, key: str) -> Tensor:
        return self._state[key]


def filled(plan: ComponentPlan) -> Any:
    """The plan's module with its weights."""
    state = {name: source().to(plan.module.state_dict()[name].dtype) for name, source in plan.weights.items()}
    plan.module.load_state_dict(state, strict=False)
    return plan.module.requires_grad_(False)


@pytest.fixture(scope="module", params=hunyuan.VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def reference(version: str) -> Any:
    return hunyuan.transformer(version)


@pytest.fixture(scope="module")
def plans(reference: Any) -> dict[str, ComponentPlan]:
    config, weights = HunyuanConfig.from_dict(dict(reference.config)), Stored(reference.state_dict())
    return {p.name: p for p in (condition_plan(config, weights), transformer_plan(config, weights, torch.float32))}


@pytest.fixture(scope="module")
def sessions(plans: dict[str, ComponentPlan], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("graphs")
    for name, plan in plans.items():
        save(build(plan), folder / f"{name}.onnx")
    return {name: ort.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"]) for name in plans}


def condition_inputs(version: str) -> dict[str, Tensor]:
    sizes = {"image_meta_size": hunyuan.meta_sizes()} if version == "v1.1" else {}
    return hunyuan.text_inputs() | {"timesteps": torch.tensor([951.0, 751.0, 1.0])} | sizes


def run(session: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    outputs = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return [torch.from_numpy(output) for output in outputs]


@pytest.mark.parametrize(("height", "width"), GRIDS)
@pytest.mark.parametrize("step", [0, 1, 2])
def test_components_agree_with_the_reference(
    reference: Any,
    plans: dict[str, ComponentPlan],
    sessions: dict[str, Any],
    version: str,
    height: int,
    width: int,
    step: int,
) -> None:
    """The split in two, in eager PyTorch and in ONNX Runtime; only the four channels that samplers use."""
    told = condition_inputs(version)
    latent = torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(2))
    timestep = float(told["timesteps"][step])
    expected = reference_step(reference, latent, timestep, hunyuan.text_inputs(), hunyuan.meta_sizes())[:, :4]
    eager = [filled(plans["condition"])(*told.values()), run(sessions["condition"], told)]
    for context, modulation in eager:
        cos, sin = tables(height, width)
        inputs = {"latent": latent, "context": context, "modulation": modulation, "step": torch.tensor([step])}
        inputs |= {"rope_cos": cos, "rope_sin": sin}
        close(filled(plans["transformer"])(*inputs.values()), expected)
        close(run(sessions["transformer"], inputs)[0], expected)


def linear_weights(plan: ComponentPlan) -> tuple[list[str], Counter[str]]:
    """Names of the weights of linear layers, joined ones joined by +, and the number of nodes of each kind."""
    model = build(plan)
    names = [
        node.inputs[1].name
        for node in model.graph
        if node.op_type == "MatMul" and node.inputs[1] is not None and node.inputs[1].is_initializer()
    ]
    return [str(name) for name in names], Counter(node.op_type for node in model.graph.all_nodes())


def test_every_linear_layer_is_a_matmul(reference: Any, plans: dict[str, ComponentPlan]) -> None:
    """So that quantization finds all of them: a Gemm or a weight behind a node would be passed over."""
    layers = {name for name, module in reference.named_modules() if isinstance(module, torch.nn.Linear)}
    found = set()
    for plan in plans.values():
        names, kinds = linear_weights(plan)
        assert not kinds["Gemm"] and not kinds["Conv"]
        found |= {part.rpartition(".weight")[0] for name in names for part in name.split("+")}
    folded = {"time_extra_emb.extra_embedder.linear_1": "extra_in", "proj_out": "patch_out"}
    assert found == {folded.get(name, name) for name in layers} | {"patch_in"}


def test_products_that_share_an_input_are_one(plans: dict[str, ComponentPlan]) -> None:
    names, kinds = linear_weights(plans["transformer"])
    layers, skips = hunyuan.TRANSFORMER["num_layers"], hunyuan.TRANSFORMER["num_layers"] // 2 - 1
    # Query, key and value; out; query; key and value of the text; out; and two of the MLP.
    assert len(names) == 7 * layers + skips + 2
    assert "blocks.0.attn1.to_q.weight.T+blocks.0.attn1.to_k.weight.T+blocks.0.attn1.to_v.weight.T" in names
    assert "blocks.5.attn2.to_k.weight.T+blocks.5.attn2.to_v.weight.T" in names
    assert kinds["MultiHeadAttention"] == 2 * layers and kinds["RotaryEmbedding"] == 3 * layers
    assert not kinds["Softmax"] and not kinds["Einsum"]
    # Three of a block, four norms of heads, the skips' and the last one.
    assert kinds["LayerNormalization"] == 7 * layers + skips + 1
