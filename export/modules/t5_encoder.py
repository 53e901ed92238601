"""Encoder of T5 1.1 and mT5 (Raffel et al. 2020, arXiv 1910.10683; Shazeer 2020, arXiv 2002.05202).

Parameter names are the published keys. Activations are float32 always: those of mT5 leave the range of float16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pochade.export.modules.ops import biased_attention, gelu_tanh, mask_bias, rms_norm


@dataclass(frozen=True)
class T5Config:
    """The values of a T5 `config.json` that change the encoder."""

    d_model: int
    d_ff: int
    d_kv: int
    num_layers: int
    num_heads: int
    vocab_size: int
    relative_attention_num_buckets: int
    layer_norm_epsilon: float
    relative_attention_max_distance: int = 128

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> T5Config:
        """Config from the published JSON.

        Raises:
            KeyError: a value is missing.
            ValueError: the first T5, with its other MLP, or a variant that was never released.
        """
        optional = {"relative_attention_max_distance"}
        names = [name for name in cls.__dataclass_fields__ if name in values or name not in optional]
        config = cls(**{name: values[name] for name in names})
        if values["feed_forward_proj"] != "gated-gelu":
            raise ValueError(f"feed_forward_proj is {values['feed_forward_proj']!r}, only 'gated-gelu' is supported")
        buckets = config.relative_attention_num_buckets
        if buckets < 4 or buckets % 4:
            raise ValueError(f"relative_attention_num_buckets is {buckets}; it must be a multiple of 4")
        if config.relative_attention_max_distance <= buckets // 4:
            raise ValueError(f"relative_attention_max_distance is below {buckets // 4 + 1}, where buckets grow")
        return config


def relative_buckets(tokens: int, buckets: int, max_distance: int) -> Tensor:
    """Bucket (tokens, tokens) int64 of the distance from each query to each key.

    Half of the buckets is for keys that come later. In each half, the first half is for a distance each; the others
    grow in geometric steps up to `max_distance`, and the last takes all beyond (Raffel et al. 2020, section 2.1).
    """
    places = torch.arange(tokens)
    offset = places[None, :] - places[:, None]
    half = buckets // 2
    exact = half // 2
    distance = offset.abs()
    # In float32 as released: distances that are an exact power fall on either side of a step otherwise.
    growth = (distance.clamp(min=1).float() / exact).log() / math.log(max_distance / exact) * (half - exact)
    coarse = (exact + growth.long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, coarse) + half * (offset > 0)


class RmsNorm(nn.Module):
    """RMS norm with a gain."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps = config.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) -> the same."""
        return rms_norm(x, self.weight, self.eps)


class SelfAttention(nn.Module):
    """Attention whose scores are not divided by the square root of their width."""

    def __init__(self, config: T5Config, positions: bool) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.q, self.k, self.v = (nn.Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if positions:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(batch, tokens, dim) and what is added to scores -> (batch, tokens, dim)."""
        return self.o(biased_attention(self.q(x), self.k(x), self.v(x), self.heads, bias, scale=1.0))


class GatedMlp(nn.Module):
    """GEGLU with the tanh form of GELU."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(config.d_model, config.d_ff, bias=False) for _ in range(2))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) -> the same."""
        return self.wo(gelu_tanh(self.wi_0(x)) * self.wi_1(x))


class AttentionLayer(nn.Module):
    """Pre-norm attention with its residual connection."""

    def __init__(self, config: T5Config, positions: bool) -> None:
        super().__init__()
        self.SelfAttention = SelfAttention(config, positions)
        self.layer_norm = RmsNorm(config)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(batch, tokens, dim) and what is added to scores -> (batch, tokens, dim)."""
        return x + self.SelfAttention(self.layer_norm(x), bias)


class MlpLayer(nn.Module):
    """Pre-norm MLP with its residual connection."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = GatedMlp(config)
        self.layer_norm = RmsNorm(config)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) -> the same."""
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nn.Module):
    """Attention and MLP; the first block holds the position biases of all."""

    def __init__(self, config: T5Config, positions: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(config, positions), MlpLayer(config)])


class Stack(nn.Module):
    """Blocks and final norm."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.block = nn.ModuleList(Block(config, i == 0) for i in range(config.num_layers))
        self.final_layer_norm = RmsNorm(config)


class T5Encoder(nn.Module):
    """States after the final norm."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """States (batch, tokens, d_model) float32 of ids and mask, both (batch, tokens) int64; 0 masks a token."""
        first: Any = self.encoder.block[0]
        table = first.layer[0].SelfAttention.relative_attention_bias.weight
        return self.encode(input_ids, attention_mask, position_bias(table, input_ids.shape[1], self.config))

    def encode(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """As `forward`, with the position bias (1, heads, tokens, tokens) given."""
        x = self.shared(input_ids)
        bias = positions + mask_bias(attention_mask, x.dtype)
        for block in self.encoder.block:
            attend, mlp = block.layer  # type: ignore[misc]
            x = mlp(attend(x, bias))
        return self.encoder.final_layer_norm(x)


def position_bias(table: Tensor, tokens: int, config: T5Config) -> Tensor:
    """What is added to scores for the distance alone, (1, heads, tokens, tokens), of a table (buckets, heads)."""
    places = relative_buckets(tokens, config.relative_attention_num_buckets, config.relative_attention_max_distance)
    return table[places].permute(2, 0, 1)[None]


class FixedLengthT5Encoder(T5Encoder):
    """The encoder for prompts of one length, whose position bias is a weight instead of a lookup."""

    def __init__(self, config: T5Config, tokens: int) -> None:
        super().__init__(config)
        self.position_bias = nn.Parameter(torch.empty(1, config.num_heads, tokens, tokens))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """As `T5Encoder`, for `tokens` tokens."""
        return self.encode(input_ids, attention_mask, self.position_bias)
