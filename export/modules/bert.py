"""BERT (Devlin et al. 2019, arXiv 1810.04805) without its pooler; parameter names are the published keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F  # noqa: N812 - the name everyone gives it
from torch import Tensor, nn

from pochade.export.modules.ops import biased_attention, mask_bias


@dataclass(frozen=True)
class BertConfig:
    """The values of a BERT `config.json` that change the network."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int
    vocab_size: int
    layer_norm_eps: float

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BertConfig:
        """Config from the published JSON.

        Raises:
            KeyError: a value is missing.
            ValueError: a variant that no released text encoder uses.
        """
        config = cls(**{name: values[name] for name in cls.__dataclass_fields__})
        known = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
        for name, value in known.items():
            if values.get(name, value) != value:
                raise ValueError(f"{name} is {values[name]!r}, only {value!r} is supported")
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(f"{config.num_attention_heads} heads do not divide hidden_size {config.hidden_size}")
        return config


class Embeddings(nn.Module):
    """Token, position and segment embedding; a prompt is one segment."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, dim)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, dim)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, dim)
        self.LayerNorm = nn.LayerNorm(dim, config.layer_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, tokens) int64 -> (batch, tokens, dim)."""
        places = self.position_embeddings.weight[: input_ids.shape[1]] + self.token_type_embeddings.weight[0]
        return self.LayerNorm(self.word_embeddings(input_ids) + places)


class SelfAttention(nn.Module):
    """Attention before its output layer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.heads = config.num_attention_heads
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(batch, tokens, dim) and what is added to scores -> (batch, tokens, dim)."""
        return biased_attention(self.query(x), self.key(x), self.value(x), self.heads, bias)


class Output(nn.Module):
    """Linear layer, residual connection and norm that end each half of a layer."""

    def __init__(self, width: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """(batch, tokens, width) and the residual (batch, tokens, dim) -> (batch, tokens, dim)."""
        return self.LayerNorm(x + self.dense(h))


class Attention(nn.Module):
    """First half of a layer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Output(config.hidden_size, config)


class Intermediate(nn.Module):
    """Widening layer of the MLP."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)


class Layer(nn.Module):
    """Post-norm transformer layer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Output(config.intermediate_size, config)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(batch, tokens, dim) and what is added to scores -> (batch, tokens, dim)."""
        x = self.attention.output(self.attention.self(x, bias), x)
        return self.output(F.gelu(self.intermediate.dense(x)), x)


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class BertEncoder(nn.Module):
    """States of the last layer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """States (batch, tokens, hidden) float32 of ids and mask, both (batch, tokens) int64; 0 masks a token."""
        x = self.embeddings(input_ids)
        bias = mask_bias(attention_mask, x.dtype)
        for layer in self.encoder.layer:
            x = layer(x, bias)
        return x.float()
