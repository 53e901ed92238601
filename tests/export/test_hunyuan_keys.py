"""Both layouts of HunyuanDiT's weights, and what a network computes from Tencent's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone gives it
from torch import Tensor

from pochade.errors import InputRefusedError
from pochade.export.checkpoint import TensorFile
from pochade.export.hunyuan_keys import OriginalTensors, is_original, to_original
from pochade.export.modules.hunyuan_dit import HunyuanConfig, HunyuanDiT
from pochade.runtime.hunyuan_grid import rotary_tables
from tests import hunyuan

HEADS = hunyuan.TRANSFORMER["num_attention_heads"]


def module_for(version: str) -> HunyuanDiT:
    config = hunyuan.TRANSFORMER | {"use_style_cond_and_image_meta_size": version == "v1.1"}
    return HunyuanDiT(HunyuanConfig.from_dict(config)).eval().requires_grad_(False)


def save(state: dict[str, Tensor], path: Path) -> TensorFile:
    torch.save(state, path)
    return TensorFile(path)


@pytest.mark.parametrize("version", hunyuan.VERSIONS)
def test_there_and_back(version: str, tmp_path: Path) -> None:
    state = hunyuan.transformer(version).state_dict()
    original = to_original(state)
    assert is_original(original.keys()) and not is_original(state.keys())
    tensors = OriginalTensors(save(original, tmp_path / "pytorch_model_ema.pt"))
    tensors.check(module_for(version))
    assert all(torch.equal(tensors[key], value) for key, value in state.items())


def test_controlnets_have_the_same_names_and_two_more(tmp_path: Path) -> None:
    names = [f"{name}.{kind}" for name in ("input_block", "controlnet_blocks.2") for kind in ("weight", "bias")]
    state = {name: torch.randn(4) for name in [*names, "blocks.0.norm3.weight", "text_embedder.linear_1.weight"]}
    original = to_original(state)
    assert {"before_proj.bias", "after_proj_list.2.weight", "blocks.0.norm2.weight"} < original.keys()
    tensors = OriginalTensors(save(original, tmp_path / "control.pt"))
    assert all(torch.equal(tensors[key], value) for key, value in state.items())


def test_foreign_tensors_are_named(tmp_path: Path) -> None:
    state = hunyuan.transformer("v1.2").state_dict()
    with pytest.raises(ValueError, match="no name in the original layout for surprise"):
        to_original(state | {"surprise": torch.zeros(1)})
    original = to_original(state)
    original["blocks.7.surprise.weight"] = torch.zeros(1)
    original["blocks.0.attn1.Wqkv.weight"] = torch.zeros(100, 176)
    del original["blocks.1.attn2.kv_proj.bias"]
    with pytest.raises(InputRefusedError) as caught:
        OriginalTensors(save(original, tmp_path / "a.pt")).check(module_for("v1.2"))
    wrong = [f"tensor blocks.0.attn1.to_{p}.weight has shape [100, 176], expected [176, 176]" for p in "kqv"]
    missing = [f"missing tensor blocks.1.attn2.to_{p}.bias" for p in "kv"]
    assert list(caught.value.faults) == sorted([*missing, *wrong, "unexpected tensor blocks.7.surprise.weight"])


class TencentNetwork:
    """What Tencent's network computes from its own names, for one timestep; written from the specification alone."""

    def __init__(self, state: dict[str, Tensor], layers: int, cos: Tensor, sin: Tensor) -> None:
        self.state, self.layers = state, layers
        self.cos, self.sin = (t.repeat_interleave(2, dim=-1)[:, None] for t in (cos, sin))

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def mlp(self, x: Tensor, name: str) -> Tensor:
        return self.linear(F.silu(self.linear(x, f"{name}.0")), f"{name}.2")

    def turn(self, x: Tensor) -> Tensor:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * self.cos + turned * self.sin

    def attend(self, q: Tensor, k: Tensor, v: Tensor, name: str, turn_keys: bool) -> Tensor:
        """(batch, tokens, heads, head) each."""
        q, k = self.turn(self.norm(q, f"{name}.q_norm")), self.norm(k, f"{name}.k_norm")
        k = self.turn(k) if turn_keys else k
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        return self.linear(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2), f"{name}.out_proj")

    def block(self, x: Tensor, text: Tensor, time: Tensor, i: int, skip: Tensor | None) -> Tensor:
        name = f"blocks.{i}"
        if skip is not None:
            joined = self.norm(torch.cat((x, skip), dim=-1), f"{name}.skip_norm")
            x = self.linear(joined, f"{name}.skip_linear")
        shift = self.linear(F.silu(time), f"{name}.default_modulation.1")
        shifted = self.norm(x, f"{name}.norm1") + shift[:, None]
        q, k, v = self.linear(shifted, f"{name}.attn1.Wqkv").unflatten(-1, (3, HEADS, -1)).unbind(2)
        x = x + self.attend(q, k, v, f"{name}.attn1", turn_keys=True)
        q = self.linear(self.norm(x, f"{name}.norm3"), f"{name}.attn2.q_proj").unflatten(-1, (HEADS, -1))
        k, v = self.linear(text, f"{name}.attn2.kv_proj").unflatten(-1, (2, HEADS, -1)).unbind(2)
        x = x + self.attend(q, k, v, f"{name}.attn2", turn_keys=False)
        hidden = F.gelu(self.linear(self.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"), approximate="tanh")
        return x + self.linear(hidden, f"{name}.mlp.fc2")

    def __call__(self, latent: Tensor, timestep: float, text: dict[str, Tensor]) -> Tensor:
        state, states = self.state, text["text_states_2"]
        joined = torch.cat((text["text_states"], self.mlp(states, "mlp_t5")), dim=1)
        mask = torch.cat((text["text_mask"], text["text_mask_2"]), dim=1).bool()
        context = torch.where(mask[..., None], joined, state["text_embedding_padding"])
        pooled = torch.cat((states.mean(1, keepdim=True), states), dim=1) + state["pooler.positional_embedding"]
        q, k, v = (self.linear(pooled, f"pooler.{p}_proj").unflatten(-1, (8, -1)) for p in "qkv")
        scores = torch.einsum("bhd,bkhd->bhk", q[:, 0], k) / q.shape[-1] ** 0.5
        pooled = self.linear(torch.einsum("bhk,bkhd->bhd", scores.softmax(-1), v).flatten(1), "pooler.c_proj")
        angles = timestep * torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 128)
        time = self.mlp(torch.cat((angles.cos(), angles.sin())), "t_embedder.mlp") + self.mlp(pooled, "extra_embedder")
        x = F.conv2d(latent, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=2)
        rows, columns = x.shape[2:]
        x, skips = x.flatten(2).transpose(1, 2), list[Tensor]()
        for i in range(self.layers):
            x = self.block(x, context, time, i, skips.pop() if i > self.layers // 2 else None)
            if i < self.layers // 2 - 1:
                skips.append(x)
        shift, scale = self.linear(F.silu(time), "final_layer.adaLN_modulation.1").chunk(2, dim=-1)
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        x = self.linear(x, "final_layer.linear").reshape(len(x), rows, columns, 2, 2, 8)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), 8, 2 * rows, 2 * columns)


def test_networks_of_both_layouts_compute_the_same(tmp_path: Path) -> None:
    original = to_original(hunyuan.transformer("v1.2").state_dict())
    module = module_for("v1.2")
    OriginalTensors(save(original, tmp_path / "a.pt")).load_into(module)
    cos, sin = (torch.from_numpy(t) for t in rotary_tables(4, 6, 88))
    latent, text = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(3)), hunyuan.text_inputs()
    network = TencentNetwork(original, hunyuan.TRANSFORMER["num_layers"], cos, sin)
    found = module(latent, torch.tensor([421.0]), *text.values(), (cos, sin))
    torch.testing.assert_close(found, network(latent, 421.0, text), rtol=0, atol=2e-5)
