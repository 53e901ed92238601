"""The transformer of HunyuanDiT against the reference library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pochade.export.modules.hunyuan_dit import HunyuanConfig, HunyuanDiT
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
