"""Tiny random text encoders in their published layouts, made with transformers, which also says what they answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BertConfig, BertModel, MT5Config, MT5ForConditionalGeneration, T5EncoderModel

BERT_TOKENS, T5_TOKENS = 77, 256

EAGER: dict[str, Any] = {"attn_implementation": "eager"}
BERT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "hidden_act": "gelu",
}
T5: dict[str, Any] = {
    "d_model": 64,
    "d_ff": 160,
    # Not d_model / num_heads, as in mT5-small.
    "d_kv": 12,
    "num_layers": 3,
    "num_heads": 6,
    "vocab_size": 400,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}


def bert(seed: int = 0) -> Any:
    """With weights large enough for attention to prefer some tokens."""
    torch.manual_seed(seed)
    model: Any = BertModel(BertConfig(**BERT, **EAGER))
    return _spread(model.eval())


def mt5(seed: int = 0) -> Any:
    """Whole model, decoder and head included."""
    torch.manual_seed(seed)
    config = MT5Config(**T5, num_decoder_layers=1, **EAGER)
    model: Any = MT5ForConditionalGeneration(config)
    return _spread(model.eval())


def t5_encoder(whole: Any) -> Any:
    """The class that diffusers loads, with the weights of a whole model."""
    model: Any = T5EncoderModel(whole.config)
    state = {k: v for k, v in whole.state_dict().items() if k.startswith(("shared.", "encoder."))}
    model.load_state_dict(state)
    return model.eval()


def _spread(model: Any) -> Any:
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 2:
                fan_in = 1 if "embed" in name or "shared" in name or "relative" in name else value.shape[1]
                value.copy_(torch.randn(value.shape) * fan_in**-0.5)
            else:
                value.add_(0.1 * torch.randn(value.shape))
    return model


def prompts(vocabulary: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and masks (4, tokens) of an empty, two middling and a full prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (4, tokens), generator=generator)
    mask = (torch.arange(tokens)[None] < torch.tensor([1, 9, tokens // 2, tokens])[:, None]).long()
    return ids * mask, mask


def save_published(folder: Path) -> tuple[Path, Path]:
    """Both encoders as diffusers writes them, the second in shards; their folders."""
    bert().save_pretrained(folder / "text_encoder")
    t5_encoder(mt5()).save_pretrained(folder / "text_encoder_2", max_shard_size="150KB")
    return folder / "text_encoder", folder / "text_encoder_2"


def run(path: Path, ids: Tensor, mask: Tensor) -> NDArray[np.float32]:
    """What a text component answers in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    output: NDArray[np.float32] = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
    return output
