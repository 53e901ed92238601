"""Transformer of Meissonic and Monetico: double- and single-stream blocks over a grid of masked image tokens.

Published as `Transformer2DModel` in viiika/Meissonic; arXiv 2410.08261. Parameter names are the published keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone gives it
from torch import Tensor, nn

from pochade.export.modules.ops import attention, gelu_tanh, layer_norm, rms_norm, rotate

EPS = 1e-6
SINUSOID_DIM = 256
MICRO_CONDS = 5
ROPE_THETA = 10000.0
MAX_GRID = 512
"""Longest side of the token grid that has rotary angles: 16 384 pixels with factor 16 and 2x2 down-sampling."""


@dataclass(frozen=True)
class TransformerConfig:
    """The values of `transformer/config.json` that change the network."""

    num_layers: int
    num_single_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    pooled_projection_dim: int
    axes_dims_rope: tuple[int, int, int]
    codebook_size: int
    vocab_size: int
    downsample: bool
    upsample: bool

    @property
    def dim(self) -> int:
        """Width of the hidden stream."""
        return self.attention_head_dim * self.num_attention_heads

    @property
    def patch(self) -> int:
        """Latent cells per side that share one token inside the blocks."""
        return 2 if self.downsample else 1

    @property
    def modulation_rows(self) -> int:
        """Vectors of width `dim` that the blocks take from the condition, per sample and step."""
        return 12 * self.num_layers + 3 * self.num_single_layers

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TransformerConfig:
        """Config from the published JSON.

        Raises:
            KeyError: a value is missing.
            ValueError: a combination that no released pipeline can run.
        """
        fields = {name: values[name] for name in cls.__dataclass_fields__}
        config = cls(**fields | {"axes_dims_rope": tuple(fields["axes_dims_rope"])})
        if values.get("guidance_embeds"):
            raise ValueError("guidance_embeds is true, but no released pipeline passes a guidance value")
        if config.pooled_projection_dim != config.dim:
            width = config.pooled_projection_dim
            raise ValueError(f"pooled_projection_dim {width} differs from the width {config.dim}")
        if sum(config.axes_dims_rope) != config.attention_head_dim:
            raise ValueError(f"axes_dims_rope {config.axes_dims_rope} do not add up to {config.attention_head_dim}")
        if config.downsample != config.upsample:
            raise ValueError("downsample and upsample differ")
        return config


# A constant on purpose: arguments reach 63 000, so another runtime's rounding of exp would move the features by 3e-3.
# In float64 and rounded once: float32 results of exp are not those of other processors, PyTorch's among them.
FREQUENCIES = (
    (-math.log(10000.0) * torch.arange(SINUSOID_DIM // 2, dtype=torch.float32) / (SINUSOID_DIM // 2))
    .double()
    .exp()
    .float()
)


def sinusoid(values: Tensor) -> Tensor:
    """Sinusoidal features of each number: (...) -> (..., 256) float32, cosines first, divisor 128 (spec 4.1).

    Always float32: half precision would round whole periods away.
    """
    angles = values.float()[..., None] * FREQUENCIES
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rotary_tables(width: int, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of id * theta^(-2j/width) on one axis, (length, width / 2), float64 rounded once to float32."""
    frequencies = ROPE_THETA ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), frequencies)
    return angles.cos().float(), angles.sin().float()


class RmsNorm(nn.Module):
    """RMS normalization over the last axis with a gain."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return rms_norm(x, self.weight, EPS)


class Mlp2(nn.Module):
    """linear_2(silu(linear_1(x))), as the published embedders name it."""

    def __init__(self, dim_in: int, dim: int, bias: bool) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim, bias=bias)
        self.linear_2 = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim_in) -> (..., dim)."""
        return self.linear_2(F.silu(self.linear_1(x)))


class GeluProj(nn.Module):
    """Tanh GELU of a projection; a module of its own only because the published key is `net.0.proj`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., hidden)."""
        return gelu_tanh(self.proj(x))


class FeedForward(nn.Module):
    """Two-layer MLP."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        # The published Sequential has a dropout at index 1.
        self.net = nn.Sequential(GeluProj(dim, hidden), nn.Identity(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.net(x)


class Attention(nn.Module):
    """Attention with RMS-normalized, rotated queries and keys; with a second (text) stream when `joint`."""

    def __init__(self, config: TransformerConfig, joint: bool) -> None:
        super().__init__()
        dim, head = config.dim, config.attention_head_dim
        self.heads = config.num_attention_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = RmsNorm(head), RmsNorm(head)
        if joint:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
            self.norm_added_q, self.norm_added_k = RmsNorm(head), RmsNorm(head)
            self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
            self.to_add_out = nn.Linear(dim, dim)

    def _per_head(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x.unflatten(-1, (self.heads, -1))).flatten(-2)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], text: Tensor | None = None) -> Tensor:
        """(batch, tokens, dim) -> the same, heads joined; with `text`, text tokens come first."""
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        q, k = self._per_head(self.norm_q, q), self._per_head(self.norm_k, k)
        if text is not None:
            tq, tk, tv = self.add_q_proj(text), self.add_k_proj(text), self.add_v_proj(text)
            tq, tk = self._per_head(self.norm_added_q, tq), self._per_head(self.norm_added_k, tk)
            q, k, v = (torch.cat(pair, dim=1) for pair in ((tq, q), (tk, k), (tv, v)))
        return attention(rotate(q, *rope, self.heads), rotate(k, *rope, self.heads), v, self.heads)


class Modulation(nn.Module):
    """Projection of the condition vector to a block's shifts, scales and gates."""

    def __init__(self, dim: int, chunks: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, chunks * dim)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return layer_norm(x, EPS) * (1 + scale) + shift


def _clamp_half(x: Tensor) -> Tensor:
    """The reference clamps the residual streams in float16 only (spec 4.7, 4.8)."""
    return x.clamp(-65504.0, 65504.0) if x.dtype == torch.float16 else x


class DoubleBlock(nn.Module):
    """Image and text streams with weights of their own and one joint attention."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm1, self.norm1_context = Modulation(dim, 6), Modulation(dim, 6)
        self.attn = Attention(config, joint=True)
        self.ff, self.ff_context = FeedForward(dim, 4 * dim), FeedForward(dim, 4 * dim)

    def forward(
        self, x: Tensor, y: Tensor, rows: tuple[Tensor, ...], rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Image (batch, tokens, dim) and text (batch, text tokens, dim) through the block.

        `rows` are 12 tensors (batch, 1, dim): shift, scale, gate of attention and of the MLP, image then text.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = rows[:6]
        t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2 = rows[6:]
        text_len = y.shape[1]
        joined = self.attn(_modulated(x, shift1, scale1), rope, _modulated(y, t_shift1, t_scale1))
        x = x + gate1 * self.attn.to_out[0](joined[:, text_len:])
        y = y + t_gate1 * self.attn.to_add_out(joined[:, :text_len])
        x = x + gate2 * self.ff(_modulated(x, shift2, scale2))
        y = y + t_gate2 * self.ff_context(_modulated(y, t_shift2, t_scale2))
        return x, _clamp_half(y)


class SingleBlock(nn.Module):
    """One stream; attention and MLP side by side."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm = Modulation(dim, 3)
        self.attn = Attention(config, joint=False)
        self.proj_mlp = nn.Linear(dim, 4 * dim)
        self.proj_out = nn.Linear(5 * dim, dim)

    def forward(self, z: Tensor, rows: tuple[Tensor, ...], rope: tuple[Tensor, Tensor]) -> Tensor:
        """(batch, text + image tokens, dim) -> the same; `rows` are shift, scale and gate."""
        shift, scale, gate = rows
        a = _modulated(z, shift, scale)
        joined = torch.cat((self.attn(a, rope), gelu_tanh(self.proj_mlp(a))), dim=-1)
        return _clamp_half(z + gate * self.proj_out(joined))


class TokenEmbed(nn.Module):
    """Code ids to the hidden stream: table, RMS norm, 1x1 convolution."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layer_norm = RmsNorm(config.dim)
        self.conv = nn.Conv2d(config.dim, config.dim, 1, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) int64 -> (..., dim). A 1x1 convolution is a linear layer on the last axis."""
        return F.linear(self.layer_norm(self.embeddings(tokens)), self.conv.weight.flatten(1))


class Resample(nn.Module):
    """RMS norm and a 2x2 stride-2 convolution without bias, plain or transposed by who uses its weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RmsNorm(dim)
        self.conv = nn.Conv2d(dim, dim, 2, stride=2, bias=False)


class CondEmbed(nn.Module):
    """The published `time_text_embed`: embedder of the step number plus embedder of the pooled condition."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.timestep_embedder = Mlp2(SINUSOID_DIM, config.dim, bias=True)
        self.text_embedder = Mlp2(config.pooled_projection_dim, config.dim, bias=True)


class MlmHead(nn.Module):
    """conv1, RMS norm and conv2 (all 1x1, no bias) to logits over the code book."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(config.dim, config.dim, 1, bias=False)
        self.layer_norm = RmsNorm(config.dim)
        self.conv2 = nn.Conv2d(config.dim, config.codebook_size, 1, bias=False)


class MaskedTransformer(nn.Module):
    """Logits over the code book for every cell of a partly masked token grid."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.embed = TokenEmbed(config)
        self.cond_embed = Mlp2(config.pooled_projection_dim + MICRO_CONDS * SINUSOID_DIM, dim, bias=False)
        self.context_embedder = nn.Linear(config.joint_attention_dim, dim)
        self.encoder_proj_layer_norm = RmsNorm(dim)
        if config.downsample:
            self.down_block = nn.ModuleDict({"downsample": Resample(dim)})
        self.project_to_hidden_norm = RmsNorm(dim)
        self.project_to_hidden = nn.Linear(dim, dim, bias=False)
        self.time_text_embed = CondEmbed(config)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.num_single_layers))
        self.project_from_hidden_norm = RmsNorm(dim)
        self.project_from_hidden = nn.Linear(dim, dim, bias=False)
        if config.upsample:
            self.up_block = nn.ModuleDict({"upsample": Resample(dim)})
        self.mlm_layer = MlmHead(config)
        # Plain attributes, not buffers: float32 in every model dtype, and real where the weights are not.
        _, rows, columns = config.axes_dims_rope
        self.row_tables, self.column_tables = rotary_tables(rows, MAX_GRID), rotary_tables(columns, MAX_GRID)

    def condition(self, pooled: Tensor, micro_conds: Tensor, timestep: Tensor) -> Tensor:
        """Condition vector `temb`, (batch, dim).

        Args:
            pooled: projected text vector, (batch, pooled_projection_dim).
            micro_conds: width, height, crop top, crop left, aesthetic score, (batch, 5).
            timestep: step number T-1-i, (1) or (batch). Not a mask ratio; multiplied by 1000 here (spec 4.2).
        """
        micro = sinusoid(micro_conds).flatten(1).to(pooled.dtype)
        c = self.cond_embed(torch.cat((pooled, micro), dim=-1))
        t = sinusoid(timestep.float() * 1000).to(pooled.dtype)
        return self.time_text_embed.timestep_embedder(t) + self.time_text_embed.text_embedder(c)

    def modulation(self, temb: Tensor) -> Tensor:
        """Shifts, scales and gates of all blocks in order, (batch, modulation_rows, dim)."""
        h = F.silu(temb)
        # A ModuleList does not tell what it holds.
        double: Iterable[Any] = self.transformer_blocks
        single: Iterable[Any] = self.single_transformer_blocks
        layers = [m for b in double for m in (b.norm1.linear, b.norm1_context.linear)]
        layers += [b.norm.linear for b in single]
        return torch.cat([layer(h) for layer in layers], dim=-1).unflatten(-1, (-1, self.config.dim))

    def context(self, text_states: Tensor) -> Tensor:
        """Text stream at the first block, (batch, text tokens, dim)."""
        return self.encoder_proj_layer_norm(self.context_embedder(text_states))

    def stem(self, cells: Tensor) -> Tensor:
        """Embedded cells (batch, height, width, dim) to the image stream (batch, tokens, dim), row-major."""
        if self.config.downsample:
            down: Any = self.down_block["downsample"]
            cells = self.merge_cells(down.norm(cells), down.conv.weight.permute(0, 2, 3, 1).flatten(1))
        return self.project_to_hidden(self.project_to_hidden_norm(cells.flatten(1, 2)))

    @staticmethod
    def merge_cells(cells: Tensor, kernel: Tensor) -> Tensor:
        """2x2 stride-2 convolution as one linear layer: (b, 2h, 2w, dim) -> (b, h, w, dim).

        `kernel` is (dim, 4 * dim) with columns ordered row, column, channel.
        """
        rows = cells.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # b, h, 2, w, 2, dim
        return F.linear(rows.permute(0, 1, 3, 2, 4, 5).flatten(3), kernel)

    @staticmethod
    def split_cells(cells: Tensor, kernel: Tensor) -> Tensor:
        """2x2 stride-2 transposed convolution as one linear layer: (b, h, w, dim) -> (b, 2h, 2w, dim).

        `kernel` is (4 * dim, dim) with rows ordered row, column, channel.
        """
        patches = F.linear(cells, kernel).unflatten(-1, (2, 2, -1))  # b, h, w, 2, 2, dim
        return patches.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)

    def rope(self, text_len: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines for text then image tokens, each (text_len + height * width, head_dim / 2) float32.

        Axis 0 is always position 0 and text sits at (0, 0, 0): those angles are zero (spec 4.5).
        """
        still = self.config.axes_dims_rope[0] // 2
        tables = []
        for row_table, column_table, at_zero in zip(self.row_tables, self.column_tables, (1.0, 0.0), strict=True):
            row = row_table[:height, None].expand(-1, width, -1)
            column = column_table[None, :width].expand(height, -1, -1)
            turning = torch.cat((row, column), dim=-1).flatten(0, 1)
            # Text rows and the channels of axis 0 do not turn: cosine 1, sine 0.
            tables.append(F.pad(turning, (still, 0, text_len, 0), value=at_zero))
        return tables[0], tables[1]

    def blocks(self, x: Tensor, y: Tensor, modulation: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Image stream after all blocks, (batch, tokens, dim)."""
        rows = tuple(modulation[:, i : i + 1] for i in range(self.config.modulation_rows))
        for i, block in enumerate(self.transformer_blocks):
            x, y = block(x, y, rows[12 * i : 12 * (i + 1)], rope)
        z = torch.cat((y, x), dim=1)
        first = 12 * self.config.num_layers
        for i, block in enumerate(self.single_transformer_blocks):
            z = block(z, rows[first + 3 * i : first + 3 * (i + 1)], rope)
        return z[:, y.shape[1] :]

    def features(self, x: Tensor, height: int, width: int) -> Tensor:
        """What the last linear layer sees of every cell, (batch, cells, dim), from tokens on a height x width grid."""
        x = self.project_from_hidden(self.project_from_hidden_norm(x)).unflatten(1, (height, width))
        if self.config.upsample:
            up: Any = self.up_block["upsample"]
            x = self.split_cells(up.norm(x), up.conv.weight.permute(2, 3, 1, 0).flatten(0, 2))
        x = F.linear(x, self.mlm_layer.conv1.weight.flatten(1))
        return self.mlm_layer.layer_norm(x).flatten(1, 2)

    def forward(
        self, tokens: Tensor, text_states: Tensor, pooled: Tensor, micro_conds: Tensor, timestep: Tensor
    ) -> Tensor:
        """Logits (batch, codebook, height, width) of a token grid (batch, height, width) int64."""
        height, width = tokens.shape[1] // self.config.patch, tokens.shape[2] // self.config.patch
        x, y = self.stem(self.embed(tokens)), self.context(text_states)
        modulation = self.modulation(self.condition(pooled, micro_conds, timestep))
        x = self.blocks(x, y, modulation, self.rope(y.shape[1], height, width))
        logits = F.linear(self.features(x, height, width), self.mlm_layer.conv2.weight.flatten(1))
        return logits.unflatten(1, tokens.shape[1:]).permute(0, 3, 1, 2)
