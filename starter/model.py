"""The networks of the starter: their configs in the published form, and their first weights."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from pochade.export.modules.clip_text import ClipTextConfig, ClipTextEncoder
from pochade.export.modules.masked_transformer import MaskedTransformer, Modulation, TransformerConfig
from pochade.starter.codes import CODEBOOK, factors, unseen_codes
from pochade.starter.shapes import SIDE

VOCAB = CODEBOOK + 64
"""Rows of the token table. The released models keep the same ratio: 8256 for 8192 codes."""

MASK = VOCAB - 1
"""Token id of a masked cell."""

TEXT_LENGTH = 28
"""Tokens of a padded prompt."""

MICRO_CONDS = (SIDE, SIDE, 0, 0, 6)
"""Width, height, crop top, crop left and aesthetic score of every picture."""


def transformer_config(dim: int = 256, layers: int = 2, single_layers: int = 3) -> dict[str, Any]:
    """Content of transformer/config.json."""
    return {
        "_class_name": "Transformer2DModel",
        "_diffusers_version": "0.30.2",
        "attention_head_dim": 64,
        "axes_dims_rope": [8, 28, 28],
        "codebook_size": CODEBOOK,
        "downsample": True,
        "guidance_embeds": False,
        "in_channels": 64,
        "joint_attention_dim": dim,
        "num_attention_heads": dim // 64,
        "num_layers": layers,
        "num_single_layers": single_layers,
        "patch_size": 1,
        "pooled_projection_dim": dim,
        "upsample": True,
        "vocab_size": VOCAB,
    }


def text_config(vocab: int, dim: int = 256, layers: int = 2) -> dict[str, Any]:
    """Content of text_encoder/config.json for a tokenizer of `vocab` entries."""
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_size": dim,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4 * dim,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": TEXT_LENGTH,
        "model_type": "clip_text_model",
        "num_attention_heads": dim // 64,
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "projection_dim": dim,
        "torch_dtype": "float32",
        "transformers_version": "4.44.2",
        "vocab_size": vocab,
    }


class SharedRows(nn.Module):
    """Adds to each code's row of a table what it shares with others: its colours and its patch.

    What is learned of an edge in one colour so holds in all, also in pairs of colour and shape that
    training never shows. A sum of tables, so it folds into the one table of the published layout.
    """

    def __init__(self, dim: int, std: float) -> None:
        super().__init__()
        numbers, sizes = factors()
        self.numbers: Tensor
        self.register_buffer("numbers", torch.from_numpy(numbers), persistent=False)
        self.tables = nn.ParameterList(nn.Parameter(torch.randn(size, dim) * std) for size in sizes)

    def forward(self, weight: Tensor) -> Tensor:
        """The table with the shared parts added; rows after the codes stay as they are."""
        rows = [table[numbers] for table, numbers in zip(self.tables, self.numbers.T, strict=True)]
        shared = torch.stack(rows).sum(0)
        padded = nn.functional.pad(shared, (0, 0, 0, len(weight) - len(shared)))
        return weight + padded.view_as(weight)


class Painter(nn.Module):
    """Text encoder and transformer, trained together."""

    def __init__(self, vocab: int, dim: int = 256, layers: int = 2, single_layers: int = 3) -> None:
        super().__init__()
        self.sizes = {"dim": dim, "layers": layers, "single_layers": single_layers}
        self.text = ClipTextEncoder(ClipTextConfig.from_dict(text_config(vocab, dim)))
        config = TransformerConfig.from_dict(transformer_config(dim, layers, single_layers))
        self.transformer = MaskedTransformer(config)
        _initialise(self)
        # The two tables with a row for every code.
        register_parametrization(self.transformer.embed.embeddings, "weight", SharedRows(dim, 0.4))
        register_parametrization(self.transformer.mlm_layer.conv2, "weight", SharedRows(dim, 0.02))

    def published(self) -> dict[str, Tensor]:
        """The weights under the names of the published layout, with the shared rows folded in.

        What a code that training never showed has of its own is only what it is not: the head saw it as a wrong answer
        to everything. In place of that it gets the mean of what codes with the same patch have of their own.
        """
        folded = copy.deepcopy(self)
        unseen, (numbers, _) = unseen_codes(), factors()
        for module in (folded.transformer.embed.embeddings, folded.transformer.mlm_layer.conv2):
            # Registered by register_parametrization, which types do not follow.
            parametrized: Any = module
            own = parametrized.parametrizations.weight.original.data
            for code in unseen:
                alike = np.setdiff1d(np.flatnonzero(numbers[:, 2] == numbers[code, 2]), unseen)
                own[code] = own[alike].mean(0)
            remove_parametrizations(module, "weight")
        return folded.state_dict()

    def cell_features(self, tokens: Tensor, ids: Tensor, steps: Tensor) -> Tensor:
        """What the last linear layer sees of every cell, (batch, cells, dim).

        Args:
            tokens: token grid, int64 (batch, height, width).
            ids: padded prompts, int64 (batch, TEXT_LENGTH).
            steps: step number, (1) or (batch).
        """
        net = self.transformer
        states, pooled = self.text(ids)
        micro = torch.tensor([MICRO_CONDS], dtype=torch.float32).expand(len(tokens), -1)
        height, width = tokens.shape[1] // 2, tokens.shape[2] // 2
        image, text = net.stem(net.embed(tokens)), net.context(states)
        modulation = net.modulation(net.condition(pooled, micro, steps))
        image = net.blocks(image, text, modulation, net.rope(text.shape[1], height, width))
        return net.features(image, height, width)

    def logits(self, features: Tensor) -> Tensor:
        """Logits over the code book, (..., CODEBOOK), from cell features (..., dim)."""
        return nn.functional.linear(features, self.transformer.mlm_layer.conv2.weight.flatten(1))

    def forward(self, tokens: Tensor, ids: Tensor, steps: Tensor) -> Tensor:
        """Logits of every cell, (batch, cells, CODEBOOK)."""
        return self.logits(self.cell_features(tokens, ids, steps))


def _initialise(painter: Painter) -> None:
    """Set the first weights where PyTorch's own start does not train well."""
    net = painter.transformer
    with torch.no_grad():
        for linear in (m.linear for m in net.modules() if isinstance(m, Modulation)):
            linear.weight.zero_()
            # Chunks of three are shift, scale and gate; half-open gates let all blocks learn at once.
            bias = linear.bias.zero_().view(-1, 3, net.config.dim)
            bias[:, 2] = 0.5
        net.embed.embeddings.weight.normal_(std=0.2)
        # CLIP's 0.02 would vanish in the residual stream and leave the picture unconditioned.
        painter.text.text_model.embeddings.token_embedding.weight.normal_(std=0.5)
        painter.text.text_model.embeddings.position_embedding.weight.normal_(std=0.2)
        # The released pipeline passes the step number, which says little: start from ignoring it.
        net.time_text_embed.timestep_embedder.linear_2.weight.zero_()


def sizes_of(state: dict[str, Tensor]) -> dict[str, int]:
    """The sizes that a Painter with this state was made with."""

    def blocks(name: str) -> int:
        prefix = f"transformer.{name}."
        return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in state if key.startswith(prefix))

    return {
        "dim": state["transformer.project_to_hidden.weight"].shape[0],
        "layers": blocks("transformer_blocks"),
        "single_layers": blocks("single_transformer_blocks"),
    }
