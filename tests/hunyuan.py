"""Tiny HunyuanDiT networks of the reference library, for parity."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.hunyuan_transformer_2d import HunyuanDiT2DModel
from torch import Tensor

TEXT_LEN, TEXT_LEN_T5 = 77, 256

TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 88,
    "hidden_size": 176,
    "in_channels": 4,
    "patch_size": 2,
    "num_layers": 6,
    "mlp_ratio": 4.3637,
    "cross_attention_dim": 32,
    "cross_attention_dim_t5": 64,
    "pooled_projection_dim": 24,
    "sample_size": 128,
    "learn_sigma": True,
    "text_len": TEXT_LEN,
    "text_len_t5": TEXT_LEN_T5,
}
"""The published config with other numbers."""

VERSIONS = ("v1.1", "v1.2")
"""With and without style and size conditions."""


def transformer(version: str, seed: int = 0) -> HunyuanDiT2DModel:
    """Reference network with random weights, norms and biases included."""
    torch.manual_seed(seed)
    model = HunyuanDiT2DModel(**TRANSFORMER, use_style_cond_and_image_meta_size=version == "v1.1")
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.copy_(float("norm" in name and name.endswith("weight")) + 0.1 * torch.randn(value.shape))
    return model.eval().requires_grad_(False)


def text_inputs(batch: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """States and masks of both text encoders, as the pipeline hands them to the network."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([[5], [77], [11], [1]])[:batch]
    return {
        "text_states": torch.randn(batch, TEXT_LEN, TRANSFORMER["cross_attention_dim"], generator=generator),
        "text_mask": (torch.arange(TEXT_LEN) < lengths).long(),
        "text_states_2": torch.randn(batch, TEXT_LEN_T5, TRANSFORMER["cross_attention_dim_t5"], generator=generator),
        "text_mask_2": (torch.arange(TEXT_LEN_T5) < 3 * lengths).long(),
    }


def meta_sizes(batch: int = 2) -> Tensor:
    """Sizes as the published pipeline tells them, (batch, 6)."""
    return torch.tensor([[1024.0, 1024.0, 1280.0, 768.0, 0.0, 0.0]]).repeat(batch, 1)
