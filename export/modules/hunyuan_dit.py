"""HunyuanDiT: a diffusion transformer with long skips that reads two text encoders at once.

Published as `HunyuanDiT2DModel` in diffusers and as `HunYuanDiT` by Tencent; arXiv 2405.08748. Parameter names are
the diffusers keys. Versions up to 1.1 also take a style and the size of the picture.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone gives it
from torch import Tensor, nn

from pochade.export.modules.masked_transformer import SINUSOID_DIM, FeedForward, sinusoid
from pochade.export.modules.ops import add_broadcast, attention, layer_norm, rotate

EPS = 1e-6
META_SIZES = 6
POOLER_HEADS = 8
"""Of the attention that pools the T5 states; a constant of the published code, in no config."""
Rope = tuple[Tensor, Tensor]
"""Cosines and sines, each (cells, head_dim / 2) float32."""


@dataclass(frozen=True)
class HunyuanConfig:
    """The values of `transformer/config.json` that change the network."""

    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    patch_size: int
    num_layers: int
    mlp_ratio: float
    cross_attention_dim: int
    cross_attention_dim_t5: int
    pooled_projection_dim: int
    text_len: int
    text_len_t5: int
    learn_sigma: bool = True
    use_style_cond_and_image_meta_size: bool = True
    """Whether style and size are conditions: so it is up to version 1.1, whose configs do not say it."""

    @property
    def dim(self) -> int:
        """Width of the hidden stream."""
        return self.attention_head_dim * self.num_attention_heads

    @property
    def hidden(self) -> int:
        """Width inside the MLP; the published ratio gives it only once it is cut to a whole number."""
        return int(self.dim * self.mlp_ratio)

    @property
    def text_tokens(self) -> int:
        """Tokens of both text encoders together."""
        return self.text_len + self.text_len_t5

    @property
    def num_skips(self) -> int:
        """Blocks whose output is read again by the second half; the two in the middle have no partner."""
        return self.num_layers // 2 - 1

    @property
    def modulation_rows(self) -> int:
        """Vectors of width `dim` that the loop takes from the condition, per sample and step."""
        return self.num_layers + 2

    @property
    def extra_dim(self) -> int:
        """Width of what is embedded beside the time."""
        sized = META_SIZES * SINUSOID_DIM + self.dim if self.use_style_cond_and_image_meta_size else 0
        return self.pooled_projection_dim + sized

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Config from the published JSON.

        Raises:
            KeyError: a value is missing.
            ValueError: a network of another kind.
        """
        optional = {"learn_sigma", "use_style_cond_and_image_meta_size"}
        names = [name for name in cls.__dataclass_fields__ if name in values or name not in optional]
        config = cls(**{name: values[name] for name in names})
        if values.get("hidden_size", config.dim) != config.dim:
            raise ValueError(f"hidden_size {values['hidden_size']} differs from the width {config.dim} of all heads")
        if values.get("activation_fn", "gelu-approximate") != "gelu-approximate":
            raise ValueError(f"activation_fn {values['activation_fn']!r} is not gelu-approximate")
        if values.get("norm_type", "layer_norm") != "layer_norm":
            raise ValueError(f"norm_type {values['norm_type']!r} is not layer_norm")
        if config.num_layers % 2 or config.num_layers < 2:
            raise ValueError(f"num_layers {config.num_layers} is no even number: every skip needs two blocks")
        if config.attention_head_dim % 4:
            raise ValueError(f"attention_head_dim {config.attention_head_dim} is no multiple of 4: two rotary axes")
        if config.cross_attention_dim_t5 % POOLER_HEADS:
            raise ValueError(f"cross_attention_dim_t5 {config.cross_attention_dim_t5} is no multiple of {POOLER_HEADS}")
        return config


class Mlp2(nn.Module):
    """linear_2(silu(linear_1(x))), as the published embedders name it."""

    def __init__(self, dim_in: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, hidden)
        self.linear_2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim_in) -> (..., dim)."""
        return self.linear_2(F.silu(self.linear_1(x)))


class LayerNorm(nn.Module):
    """Layer norm with gain and bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim); evaluated in float32 by PyTorch and ONNX Runtime alike."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, EPS)


class HeadNorm(LayerNorm):
    """Layer norm of queries or keys, left in float32: `EPS` is below the smallest normal float16."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim) float32."""
        return F.layer_norm(x.float(), self.weight.shape, self.weight.float(), self.bias.float(), EPS)


class ShiftedNorm(nn.Module):
    """Layer norm plus a shift that `linear` makes of time and prompt; published as `AdaLayerNormShift`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.norm = LayerNorm(dim)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        """(batch, cells, dim) and the shift, (batch, 1, dim)."""
        return self.norm(x) + shift


class OutNorm(nn.Module):
    """Projection to scale and shift of the last norm, in this order."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)


class Attention(nn.Module):
    """Attention with normalized queries and keys; rotated are all that come from the picture."""

    def __init__(self, config: HunyuanConfig, context_dim: int) -> None:
        super().__init__()
        dim, head = config.dim, config.attention_head_dim
        self.heads = config.num_attention_heads
        self.to_q, self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(context_dim, dim), nn.Linear(context_dim, dim)
        self.norm_q, self.norm_k = HeadNorm(head), HeadNorm(head)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def _per_head(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x.unflatten(-1, (self.heads, -1))).flatten(-2)

    def forward(self, x: Tensor, rope: Rope, context: Tensor | None = None) -> Tensor:
        """(batch, cells, dim) -> the same; keys and values come from `context`, which is not rotated, if given."""
        source = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(source), self.to_v(source)
        q, k = rotate(self._per_head(self.norm_q, q), *rope, self.heads), self._per_head(self.norm_k, k)
        if context is None:
            k = rotate(k, *rope, self.heads)
        return self.to_out[0](attention(q.to(v.dtype), k.to(v.dtype), v, self.heads))


class Block(nn.Module):
    """Self-attention, attention to the text, MLP; in the second half behind a long skip."""

    def __init__(self, config: HunyuanConfig, skip: bool) -> None:
        super().__init__()
        dim = config.dim
        self.norm1 = ShiftedNorm(dim)
        self.attn1 = Attention(config, dim)
        self.norm2 = LayerNorm(dim)
        self.attn2 = Attention(config, config.cross_attention_dim)
        self.norm3 = LayerNorm(dim)
        self.ff = FeedForward(dim, config.hidden)
        if skip:
            self.skip_norm = LayerNorm(2 * dim)
            self.skip_linear = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, context: Tensor, shift: Tensor, rope: Rope, skip: Tensor | None = None) -> Tensor:
        """(batch, cells, dim) -> the same; `shift` is (batch, 1, dim), `skip` the output of the partner block."""
        if skip is not None:
            x = self.skip_linear(self.skip_norm(torch.cat((x, skip), dim=-1)))
        x = x + self.attn1(self.norm1(x, shift), rope)
        x = x + self.attn2(self.norm2(x), rope, context)
        return x + self.ff(self.norm3(x))


class Pooler(nn.Module):
    """Attention of the mean T5 state to all of them, padding included."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        dim = config.cross_attention_dim_t5
        self.positional_embedding = nn.Parameter(torch.empty(config.text_len_t5 + 1, dim))
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.c_proj = nn.Linear(dim, config.pooled_projection_dim)

    def forward(self, states: Tensor) -> Tensor:
        """(batch, text_len_t5, width) -> (batch, 1, pooled_projection_dim)."""
        x = torch.cat((states.mean(dim=1, keepdim=True), states), dim=1) + self.positional_embedding
        # Kept three-dimensional: a linear layer on a matrix is a Gemm in ONNX, which 4-bit products do not replace.
        return self.c_proj(attention(self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x), POOLER_HEADS))


class PatchEmbed(nn.Module):
    """Convolution of patches that do not overlap."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.dim, config.patch_size, stride=config.patch_size)


class TimeExtraEmbed(nn.Module):
    """Embedders of the time, and of what is told beside it: pooled text and, up to version 1.1, sizes and a style."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.timestep_embedder = Mlp2(SINUSOID_DIM, dim, dim)
        self.pooler = Pooler(config)
        self.extra_embedder = Mlp2(config.extra_dim, 4 * dim, dim)
        if config.use_style_cond_and_image_meta_size:
            self.style_embedder = nn.Embedding(1, dim)

    def extra(self, states_t5: Tensor, image_meta_size: Tensor | None) -> Tensor:
        """The part that does not change with the time, (batch, 1, dim).

        Args:
            states_t5: (batch, text_len_t5, cross_attention_dim_t5).
            image_meta_size: original width and height, width and height wanted, left and top of the crop, in
                pixels, (batch, 6); None from version 1.2 on.
        """
        told = [self.pooler(states_t5)]
        if image_meta_size is not None:
            # The only style that was ever trained is number 0.
            style = self.style_embedder.weight.expand(states_t5.shape[0], -1)
            told += [sinusoid(image_meta_size).flatten(1)[:, None], style[:, None]]
        return self.extra_embedder(torch.cat(told, dim=-1))


class HunyuanNetwork(nn.Module):
    """What the transformer and its ControlNets have in common; subclasses add the blocks."""

    blocks: nn.ModuleList

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        self.config = config
        self.text_embedder = Mlp2(
            config.cross_attention_dim_t5, 4 * config.cross_attention_dim_t5, config.cross_attention_dim
        )
        self.text_embedding_padding = nn.Parameter(torch.empty(config.text_tokens, config.cross_attention_dim))
        self.pos_embed = PatchEmbed(config)
        self.time_extra_emb = TimeExtraEmbed(config)

    def modulators(self) -> list[Any]:
        """Layers whose outputs, side by side, are one step of the modulation."""
        # A ModuleList does not tell what it holds.
        blocks: Iterable[Any] = self.blocks
        return [block.norm1.linear for block in blocks]

    def context(self, states: Tensor, mask: Tensor, states_t5: Tensor, mask_t5: Tensor) -> Tensor:
        """Text tokens of both encoders, (batch, text_len + text_len_t5, cross_attention_dim).

        Masked out tokens become trained padding, which attention sees like any other token (spec 5.2).
        """
        joined = torch.cat((states, self.text_embedder(states_t5)), dim=1)
        is_text = torch.cat((mask, mask_t5), dim=1).bool()[:, :, None]
        return torch.where(is_text, joined, self.text_embedding_padding)

    def modulation(self, timesteps: Tensor, extra: Tensor) -> Tensor:
        """Shift of every block, of a transformer then scale and shift of the last norm, (steps, batch, rows, dim).

        Args:
            timesteps: 0 to 999, (steps).
            extra: as `TimeExtraEmbed.extra` gives it, (batch, 1, dim).
        """
        time = self.time_extra_emb.timestep_embedder(sinusoid(timesteps)[:, None])  # steps, 1, dim
        h = F.silu(time + extra[:, 0])
        return torch.cat([layer(h) for layer in self.modulators()], dim=-1).unflatten(-1, (-1, self.config.dim))

    def stem(self, patches: Tensor) -> Tensor:
        """Tokens (batch, cells, dim) of flat patches as `cut` gives them."""
        return F.linear(patches, self.pos_embed.proj.weight.flatten(1), self.pos_embed.proj.bias)

    def cut(self, latent: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, cells, channels * patch * patch), cells row by row."""
        patch = self.config.patch_size
        cells = latent.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # batch, channels, rows, p, columns, p
        return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class HunyuanDiT(HunyuanNetwork):
    """Prediction of v for latents; every method takes and gives what the published class computes."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__(config)
        half = config.num_layers // 2
        self.blocks = nn.ModuleList(Block(config, skip=i > half) for i in range(config.num_layers))
        self.norm_out = OutNorm(config.dim)
        channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.proj_out = nn.Linear(config.dim, config.patch_size**2 * channels)

    def modulators(self) -> list[Any]:
        """See `HunyuanNetwork`."""
        return [*super().modulators(), self.norm_out.linear]

    def join(self, patches: Tensor, height: int, width: int) -> Tensor:
        """(batch, cells, patch * patch * channels) -> (batch, channels, height, width)."""
        patch = self.config.patch_size
        cells = patches.unflatten(2, (patch, patch, -1)).unflatten(1, (height // patch, width // patch))
        return cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def hidden(self, x: Tensor, context: Tensor, rows: Tensor, rope: Rope, controls: Tensor | None = None) -> Tensor:
        """Tokens (batch, cells, dim) after all blocks and the last norm.

        Args:
            x: tokens as `stem` gives them.
            context: (batch, text tokens, cross_attention_dim).
            rows: one step of the modulation, (batch, num_layers + 2, dim).
            rope: tables of the grid of cells.
            controls: what a ControlNet adds to the skips, float32 (num_skips, batch, cells, dim).
        """
        row = tuple(rows[:, i : i + 1] for i in range(self.config.modulation_rows))
        skips: list[Tensor] = []
        half = self.config.num_layers // 2
        for i, block in enumerate(self.blocks):
            skip = skips.pop() if i > half else None
            if skip is not None and controls is not None:
                skip = add_broadcast(skip, controls[len(skips)].to(skip.dtype))
            x = block(x, context, row[i], rope, skip)
            if i < self.config.num_skips:
                skips.append(x)
        return layer_norm(x, EPS) * (1 + row[-2]) + row[-1]

    def forward(
        self,
        latent: Tensor,
        timesteps: Tensor,
        states: Tensor,
        mask: Tensor,
        states_t5: Tensor,
        mask_t5: Tensor,
        rope: Rope,
        image_meta_size: Tensor | None = None,
    ) -> Tensor:
        """All output channels, (batch, 2 * channels, height, width), of one timestep (1)."""
        context = self.context(states, mask, states_t5, mask_t5)
        rows = self.modulation(timesteps, self.time_extra_emb.extra(states_t5, image_meta_size))[0]
        x = self.hidden(self.stem(self.cut(latent)), context, rows, rope)
        return self.join(self.proj_out(x), *latent.shape[-2:])
