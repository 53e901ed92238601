"""Checkpoints in the published layout and at published size, with random weights, to measure memory and time on.

    python -m pochade.benchmarks.random_checkpoint MODEL FOLDER [--dtype fp32|fp16|bf16] [--shards N]

MODEL is meissonic, monetico, hunyuandit-v1.1 or hunyuandit-v1.2, or a ControlNet of one of the latter two,
hunyuandit-v1.1-controlnet or hunyuandit-v1.2-controlnet. Weights are drawn as they are written. Speed and
memory do not depend on the values, as long as they stay finite; quality cannot be read off them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pochade.benchmarks.random_hunyuandit import VERSIONS, write_controlnet, write_hunyuandit
from pochade.benchmarks.random_weights import DTYPES, save_random
from pochade.export.checkpoint import empty
from pochade.export.modules.clip_text import ClipTextConfig, ClipTextEncoder
from pochade.export.modules.masked_transformer import MaskedTransformer, TransformerConfig
from pochade.export.modules.vq import VqConfig, VQModel

HUNYUANDIT = {f"hunyuandit-{version}": version for version in VERSIONS}
CONTROLNETS = {f"hunyuandit-{version}-controlnet": version for version in VERSIONS}
MODELS = ("meissonic", "monetico", *HUNYUANDIT, *CONTROLNETS)

_BLOCKS = 5
CONFIGS: dict[str, dict[str, Any]] = {
    "transformer/config.json": {
        "_class_name": "Transformer2DModel",
        "attention_head_dim": 128,
        "axes_dims_rope": [16, 56, 56],
        "codebook_size": 8192,
        "downsample": True,
        "guidance_embeds": False,
        "in_channels": 64,
        "joint_attention_dim": 1024,
        "num_attention_heads": 8,
        "num_layers": 14,
        "num_single_layers": 28,
        "patch_size": 1,
        "pooled_projection_dim": 1024,
        "upsample": True,
        "vocab_size": 8256,
    },
    "vqvae/config.json": {
        "_class_name": "VQModel",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 256, 512, 768],
        "down_block_types": ["DownEncoderBlock2D"] * _BLOCKS,
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": 64,
        "layers_per_block": 2,
        "lookup_from_codebook": True,
        "mid_block_add_attention": False,
        "norm_num_groups": 32,
        "norm_type": "group",
        "num_vq_embeddings": 8192,
        "out_channels": 3,
        "sample_size": 32,
        "scaling_factor": 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * _BLOCKS,
        "vq_embed_dim": None,
    },
    "text_encoder/config.json": {
        "architectures": ["CLIPTextModelWithProjection"],
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "pad_token_id": 1,
        "projection_dim": 1024,
        "vocab_size": 49408,
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "Scheduler",
        "mask_token_id": 8255,
        "masking_schedule": "cosine",
    },
    "model_index.json": {
        "_class_name": "Pipeline",
        "scheduler": ["scheduler", "Scheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "transformer": ["transformer", "Transformer2DModel"],
        "vqvae": ["diffusers", "VQModel"],
    },
    "tokenizer/tokenizer_config.json": {
        "bos_token": "<|startoftext|>",
        "do_lower_case": True,
        "eos_token": "<|endoftext|>",
        "model_max_length": 77,
        "pad_token": "!",
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": "<|endoftext|>",
    },
}


def write_checkpoint(folder: Path, model: str, dtype: str = "fp32", shards: int = 1, seed: int = 0) -> None:
    """Write a full-size checkpoint with random weights.

    Args:
        folder: to be made.
        model: one of MODELS.
        dtype: of the stored tensors.
        shards: files per part; more than one adds the index that published sharded checkpoints have.
        seed: of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    if model in HUNYUANDIT:
        write_hunyuandit(folder, HUNYUANDIT[model], dtype, shards, generator)
    elif model in CONTROLNETS:
        write_controlnet(folder, CONTROLNETS[model], dtype, shards, generator)
    else:
        _write_meissonic(folder, model == "meissonic", dtype, shards, generator)


def _write_meissonic(folder: Path, sampled: bool, dtype: str, shards: int, generator: torch.Generator) -> None:
    for name, values in CONFIGS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        changed = {"downsample": sampled, "upsample": sampled} if name.startswith("transformer") else {}
        path.write_text(json.dumps(values | changed, indent=2))
    parts: list[tuple[str, str, nn.Module]] = [
        (
            "transformer",
            "diffusion_pytorch_model",
            empty(MaskedTransformer, TransformerConfig.from_dict(_config(folder, "transformer"))),
        ),
        ("vqvae", "diffusion_pytorch_model", empty(VQModel, VqConfig.from_dict(_config(folder, "vqvae")))),
        ("text_encoder", "model", empty(ClipTextEncoder, ClipTextConfig.from_dict(_config(folder, "text_encoder")))),
    ]
    for part, stem, module in parts:
        save_random(folder / part, stem, module, dtype, shards, generator)
    _write_vocabulary(folder / "tokenizer")


def _config(folder: Path, part: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / part / "config.json").read_text())
    return values


def _write_vocabulary(folder: Path) -> None:
    """A vocabulary of CLIP's size and structure: 512 byte symbols, 48 894 merges, start and end."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    ends = [s + "</w>" for s in symbols]
    merges = [(a, b) for a in symbols for b in ends][: 49408 - 512 - 2]
    tokens = [*symbols, *ends, *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write a full-size checkpoint with random weights.")
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_checkpoint(arguments.folder, arguments.model, arguments.dtype, arguments.shards, arguments.seed)


if __name__ == "__main__":
    main()
