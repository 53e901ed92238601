"""BERT and the T5 encoder as components: from their published folders to plans of `text_encoder`, `text_encoder_2`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

from pochade.errors import InputRefusedError
from pochade.export.checkpoint import TensorFolder, Tensors, empty, parse_config
from pochade.export.component import ComponentPlan, WeightSource
from pochade.export.modules.bert import BertConfig, BertEncoder
from pochade.export.modules.t5_encoder import FixedLengthT5Encoder, T5Config, T5Encoder, position_bias

_WORDS = "embeddings.word_embeddings.weight"
_BERT_PREFIXES = ("", "bert.")
_SHARED = "shared.weight"
_TIED = "encoder.embed_tokens.weight"
_POSITIONS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


@dataclass(frozen=True)
class BertPart:
    """A BERT folder whose weights have been compared with the module."""

    config: BertConfig
    weights: Tensors

    @classmethod
    def open(cls, folder: Path, tokens: int) -> BertPart:
        """BERT of a folder with `config.json` and safetensors or `pytorch_model.bin`.

        Keys may begin with `bert.`, as in files of larger models; a pooler, prediction heads and the image tower of a
        two-tower model are passed over.

        Args:
            folder: as published.
            tokens: length of prompts.

        Raises:
            InputRefusedError: every fault of the config, or of the weights.
        """
        config = parse_config(BertConfig, folder / "config.json")
        if config.max_position_embeddings < tokens:
            reason = f"max_position_embeddings is {config.max_position_embeddings}, prompts have {tokens} tokens"
            raise InputRefusedError(str(folder / "config.json"), [reason])
        files = TensorFolder(folder, pickles=True)
        prefix = next((p for p in _BERT_PREFIXES if p + _WORDS in files.keys()), "")  # noqa: SIM118
        weights = files.below(prefix).only(("embeddings.", "encoder."))
        # Written by old library versions: numbers from 0 up.
        weights.check(empty(BertEncoder, config), ("embeddings.position_ids", "embeddings.token_type_ids"))
        return cls(config, weights)

    def plan(self, dtype: torch.dtype, tokens: int) -> ComponentPlan:
        """Component `text_encoder`, which computes in `dtype` and answers in float32."""
        module = empty(BertEncoder, self.config, dtype)
        output = {"text_states": ("batch", tokens, self.config.hidden_size)}
        return _plan("text_encoder", module, tokens, output, _stored(module, self.weights))


@dataclass(frozen=True)
class T5Part:
    """A T5 folder whose encoder weights have been compared with the module."""

    config: T5Config
    weights: Tensors

    @classmethod
    def open(cls, folder: Path) -> T5Part:
        """Encoder of a T5 folder with `config.json` and safetensors or `pytorch_model.bin`, whole or in shards.

        The token embedding may be called by either name that it has in published files; a decoder is passed over.

        Args:
            folder: as published.

        Raises:
            InputRefusedError: every fault of the config, or of the weights.
        """
        config = parse_config(T5Config, folder / "config.json")
        files = TensorFolder(folder, pickles=True)
        names = {key: key for key in files.keys() if key.startswith("encoder.") and key != _TIED}  # noqa: SIM118
        table = next((key for key in (_SHARED, _TIED) if key in files.keys()), None)  # noqa: SIM118
        names |= {} if table is None else {_SHARED: table}
        weights = files.renamed(names)
        weights.check(empty(T5Encoder, config))
        return cls(config, weights)

    def plan(self, tokens: int) -> ComponentPlan:
        """Component `text_encoder_2`, which computes in float32 whatever its weights are stored in."""
        with torch.device("meta"):
            module = FixedLengthT5Encoder(self.config, tokens)
        module = module.to_empty(device="cpu").eval()
        config, weights = self.config, self.weights
        folded = {"position_bias": lambda: position_bias(weights[_POSITIONS].float(), tokens, config)}
        output = {"text_states_2": ("batch", tokens, config.d_model)}
        return _plan("text_encoder_2", module, tokens, output, _stored(module, weights) | folded)


def _plan(
    name: str,
    module: nn.Module,
    tokens: int,
    output: Mapping[str, tuple[str | int, ...]],
    weights: dict[str, WeightSource],
) -> ComponentPlan:
    inputs = ("input_ids", "attention_mask")
    batch = Dim("batch", max=1024)
    axes: dict[str, tuple[str | int, ...]] = dict.fromkeys(inputs, ("batch", tokens))
    return ComponentPlan(
        name=name,
        module=module,
        inputs={port: torch.ones(2, tokens, dtype=torch.int64) for port in inputs},
        dynamic={port: {0: batch} for port in inputs},
        axes=axes | dict(output),
        outputs=tuple(output),
        weights=weights,
    )


def _stored(module: nn.Module, source: Tensors) -> dict[str, WeightSource]:
    """A source for each parameter of `module` that the checkpoint holds under the same name."""
    names: Iterable[str] = (name for name, _ in module.named_parameters())
    return {name: partial(source.__getitem__, name) for name in names if name in source.keys()}  # noqa: SIM118
