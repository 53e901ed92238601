"""Checkpoints of random weights: they open as published ones do, and their weights can be computed with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pochade.benchmarks.random_checkpoint import CONFIGS, write_checkpoint
from pochade.benchmarks.random_hunyuandit import VERSIONS, write_controlnet, write_hunyuandit
from pochade.benchmarks.random_weights import save_random, spread
from pochade.export.checkpoint import TensorFolder
from pochade.export.families.hunyuandit import HunyuanDiT
from pochade.export.families.hunyuandit_controlnet import HunyuanControlNet
from pochade.export.families.meissonic import Meissonic
from pochade.export.recipes import choose, read_recipes
from tests import hunyuan

SMALL: dict[str, dict[str, Any]] = {
    "transformer": hunyuan.TRANSFORMER,
    "text_encoder": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        # Beyond what the list of characters has.
        "vocab_size": 42500,
    },
    "text_encoder_2": {"d_model": 64, "d_ff": 64, "d_kv": 16, "num_layers": 1, "num_heads": 4, "vocab_size": 42012},
    "vae": {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1},
}


@pytest.mark.parametrize("version", VERSIONS)
def test_hunyuandit_opens_as_published(tmp_path: Path, version: str) -> None:
    folder = tmp_path / "checkpoint"
    write_hunyuandit(folder, version, "fp16", 2, torch.Generator().manual_seed(0), SMALL, pieces=42000)
    assert choose(read_recipes(), folder, None).name == ("hunyuandit-v1.2" if version == "v1.2" else "hunyuandit-v1.0")
    model = HunyuanDiT.open(folder)
    assert model.layout.config.use_style_cond_and_image_meta_size == (version == "v1.1")
    assert model.layout.schedule["beta_end"] == (0.018 if version == "v1.2" else 0.03)
    encoded = model.tokenizer().encode("一 red fox")
    assert encoded.tokens[:5] == ["[CLS]", "一", "re", "##d", "fo"]
    assert (encoded.ids[0], len(encoded.ids)) == (101, 77)
    pieces = model.more_tokenizers()["text_encoder_2"].encode("a fox")
    assert pieces.tokens[:3] == ["▁a", "▁fox", "</s>"]
    assert len(pieces.ids) == 256


@pytest.mark.parametrize("version", VERSIONS)
def test_controlnet_opens_as_published(tmp_path: Path, version: str) -> None:
    folder = tmp_path / "Depth"
    write_controlnet(folder, version, "fp16", 1, torch.Generator().manual_seed(0), hunyuan.TRANSFORMER)
    assert choose(read_recipes(), folder, None).name == f"hunyuandit-{version}-controlnet-depth"
    config = HunyuanControlNet.open(folder).layout.config
    assert (config.num_skips, config.use_style_cond_and_image_meta_size) == (2, version == "v1.1")


def test_a_random_network_answers_with_finite_numbers(tmp_path: Path) -> None:
    write_hunyuandit(tmp_path, "v1.2", "fp32", 1, torch.Generator().manual_seed(0), SMALL, pieces=42000)
    reference = hunyuan.transformer("v1.2")
    weights = TensorFolder(tmp_path / "transformer")
    reference.load_state_dict({key: weights[key] for key in weights.keys()})  # noqa: SIM118
    model = HunyuanDiT.open(tmp_path)
    plan = next(p for p in model.plans(torch.float32) if p.name == "condition")
    context, modulation = hunyuan.filled(plan)(**hunyuan.condition_inputs("v1.2"))
    for numbers in (context, modulation):
        assert torch.isfinite(numbers).all()
        assert 0.01 < numbers.std() < 10


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_files_hold_what_the_module_has(tmp_path: Path, dtype: str, shards: int) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 7, bias=False))
    save_random(tmp_path, "model", module, dtype, shards, torch.Generator().manual_seed(0))
    found = TensorFolder(tmp_path)
    found.check(module)
    assert {found[key].dtype for key in found.keys()} == {  # noqa: SIM118
        {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    }
    assert len(list(tmp_path.glob("*.safetensors"))) == shards


def test_numbers_are_drawn_in_pieces_and_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Linear(64, 100, bias=False)
    monkeypatch.setattr("pochade.benchmarks.random_weights.CHUNK", 999)
    for name in ("one", "two"):
        save_random(tmp_path / name, "model", module, "fp32", 1, torch.Generator().manual_seed(3))
    one, two = (TensorFolder(tmp_path / name)["weight"] for name in ("one", "two"))
    assert torch.equal(one, two)
    assert torch.isclose(one.std(), torch.tensor(1 / 8), rtol=0.05)


def test_spreads_by_what_a_weight_is_for() -> None:
    assert spread("blocks.0.skip_norm.weight", (8,)) == (1.0, 0.02)
    assert spread("embeddings.LayerNorm.weight", (8,)) == (1.0, 0.02)
    assert spread("blocks.0.norm1.linear.bias", (8,)) == (0.0, 0.02)
    assert spread("shared.weight", (8, 4)) == (0.0, 1.0)
    assert spread("conv.weight", (8, 4, 2, 2)) == (0.0, 0.25)
    assert spread("encoder.block.0.layer.0.SelfAttention.q.weight", (8, 4)) == (0.0, 1 / 16)


def test_meissonic_opens_as_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, dict[str, Any]] = {
        "transformer/config.json": {
            "attention_head_dim": 32,
            "axes_dims_rope": [8, 12, 12],
            "joint_attention_dim": 64,
            "num_attention_heads": 2,
            "num_layers": 1,
            "num_single_layers": 1,
            "pooled_projection_dim": 64,
        },
        "vqvae/config.json": {"block_out_channels": [32] * 5, "layers_per_block": 1},
        "text_encoder/config.json": {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "projection_dim": 64,
        },
    }
    small = {name: values | changes.get(name, {}) for name, values in CONFIGS.items()}
    monkeypatch.setattr("pochade.benchmarks.random_checkpoint.CONFIGS", small)
    write_checkpoint(tmp_path / "checkpoint", "meissonic", "fp16", shards=2)
    model = Meissonic.open(tmp_path / "checkpoint")
    assert model.transformer.num_layers == 1
