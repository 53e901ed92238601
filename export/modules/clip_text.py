"""CLIP text tower with projection (Radford et al. 2021, arXiv 2103.00020); parameter names are the published keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone gives it
from torch import Tensor, nn


@dataclass(frozen=True)
class ClipTextConfig:
    """The values of `text_encoder/config.json` that change the network."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    projection_dim: int
    max_position_embeddings: int
    vocab_size: int
    layer_norm_eps: float
    hidden_act: str

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ClipTextConfig:
        """Config from the published JSON.

        Raises:
            KeyError: a value is missing.
            ValueError: an activation that no released tower uses.
        """
        config = cls(**{name: values[name] for name in cls.__dataclass_fields__})
        if config.hidden_act not in ("gelu", "quick_gelu"):
            raise ValueError(f"hidden_act {config.hidden_act!r} is neither 'gelu' nor 'quick_gelu'")
        return config


class SelfAttention(nn.Module):
    """Causal self-attention; padding is not masked (spec 5.2)."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) -> the same."""
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        # 77 tokens: materializing the scores costs nothing, so the portable form is kept.
        tokens = x.shape[1]
        future = torch.full((tokens, tokens), float("-inf"), dtype=x.dtype).triu(1)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + future
        return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two-layer MLP."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.quick = config.hidden_act == "quick_gelu"

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) -> the same."""
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = Mlp(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) -> the same."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    """Token plus position embedding."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, tokens) int64 -> (batch, tokens, dim)."""
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class TextModel(nn.Module):
    """Embeddings, layers and final norm, as the published keys nest them."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)


class ClipTextEncoder(nn.Module):
    """Text states and pooled vector that condition the transformer."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Input of the last layer (batch, tokens, hidden) and projected end-token vector (batch, projection_dim).

        The states get no final layer norm (spec 5.3). The end token is the first largest id of a row, which is
        what the released eos_token_id 2 stands for.
        """
        x = self.text_model.embeddings(input_ids)
        *layers, last = self.text_model.encoder.layers
        for layer in layers:
            x = layer(x)
        final = self.text_model.final_layer_norm(last(x))
        end = input_ids.argmax(dim=-1)
        pooled = final.gather(1, end[:, None, None].expand(-1, 1, final.shape[-1])).squeeze(1)
        return x, self.text_projection(pooled)
