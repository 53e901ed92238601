"""HunyuanDiT's published folder at published size with random weights (part of `random_checkpoint`)."""

from __future__ import annotations

import itertools
import json
import string
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from pochade.benchmarks.random_weights import save_random
from pochade.export.checkpoint import empty
from pochade.export.modules.bert import BertConfig, BertEncoder
from pochade.export.modules.hunyuan_controlnet import ControlNet, ControlNetConfig
from pochade.export.modules.hunyuan_dit import HunyuanConfig, HunyuanDiT
from pochade.export.modules.t5_encoder import T5Config, T5Encoder
from pochade.export.modules.vae import AutoencoderKL, VaeConfig
from pochade.export.sentencepiece_tokenizer import BYTE, CONTROL, NORMAL, SPACE, UNIGRAM, UNKNOWN_KIND

VERSIONS = ("v1.1", "v1.2")
BETA_END = {"v1.1": 0.03, "v1.2": 0.018}
SIZES_KEY = "use_style_cond_and_image_meta_size"
"""Of the transformer's config; up to version 1.1 it is not there."""

_LEVELS = 4
CONFIGS: dict[str, dict[str, Any]] = {
    "transformer": {
        "_class_name": "HunyuanDiT2DModel",
        "activation_fn": "gelu-approximate",
        "attention_head_dim": 88,
        "cross_attention_dim": 1024,
        "cross_attention_dim_t5": 2048,
        "hidden_size": 1408,
        "in_channels": 4,
        "learn_sigma": True,
        "mlp_ratio": 4.3637,
        "norm_type": "layer_norm",
        "num_attention_heads": 16,
        "num_layers": 40,
        "patch_size": 2,
        "pooled_projection_dim": 1024,
        "sample_size": 128,
        "text_len": 77,
        "text_len_t5": 256,
        SIZES_KEY: False,
    },
    "text_encoder": {
        "architectures": ["BertModel"],
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "bert",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "type_vocab_size": 2,
        "vocab_size": 47020,
    },
    "text_encoder_2": {
        "architectures": ["T5EncoderModel"],
        "d_ff": 5120,
        "d_kv": 64,
        "d_model": 2048,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "num_heads": 32,
        "num_layers": 24,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "vocab_size": 250112,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * _LEVELS,
        "force_upcast": False,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 512,
        "scaling_factor": 0.13025,
        "up_block_types": ["UpDecoderBlock2D"] * _LEVELS,
    },
}
"""`config.json` of each part with weights."""

SCHEDULER: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "thresholding": False,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "variance_type": "fixed_small",
}
"""The published file, without `beta_end`, which the version decides."""
MODEL_INDEX = {
    "_class_name": "HunyuanDiTPipeline",
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "BertModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "BertTokenizer"],
    "tokenizer_2": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "HunyuanDiT2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

PIECES = 250_100
"""Of mT5's tokenizer; its table of embeddings has twelve rows more."""
SPECIAL_WORDS = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
"""Where a Chinese BERT vocabulary has them; numbers between are unused."""
IDEOGRAPHS = [chr(code) for code in range(0x4E00, 0x9FA6)]


def write_controlnet(
    folder: Path,
    version: str,
    dtype: str,
    shards: int,
    generator: torch.Generator,
    changes: Mapping[str, Any] | None = None,
) -> None:
    """A ControlNet of the model, in diffusers' folder; arguments are those of `write_hunyuandit`."""
    of_model = CONFIGS["transformer"] | dict(changes or {})
    values = {name: value for name, value in of_model.items() if name not in ("learn_sigma", "norm_type", "num_layers")}
    values |= {
        "_class_name": "HunyuanDiT2DControlNetModel",
        "conditioning_channels": 3,
        "transformer_num_layers": of_model["num_layers"],
    }
    sized = version == "v1.1"
    config = ControlNetConfig.from_dict(values | {SIZES_KEY: sized})
    if sized:
        del values[SIZES_KEY]
    save_random(folder, "diffusion_pytorch_model", empty(ControlNet, config), dtype, shards, generator)
    (folder / "config.json").write_text(json.dumps(values))


def write_hunyuandit(
    folder: Path,
    version: str,
    dtype: str,
    shards: int,
    generator: torch.Generator,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    pieces: int = PIECES,
) -> None:
    """Write a checkpoint as diffusers publishes it.

    Args:
        folder: to be made.
        version: one of VERSIONS.
        dtype: of the stored tensors.
        shards: files per part.
        generator: of the weights.
        changes: other values for some parts of CONFIGS, for networks of another size.
        pieces: of the second tokenizer.
    """
    configs = {part: {**values, **(changes or {}).get(part, {})} for part, values in CONFIGS.items()}
    if version == "v1.1":
        del configs["transformer"][SIZES_KEY]
    bert = {"do_lower_case": True, "model_max_length": 77, "tokenizer_class": "BertTokenizer"}
    t5 = {"extra_ids": 0, "model_max_length": 256, "tokenizer_class": "T5Tokenizer"}
    files = {f"{part}/config.json": values for part, values in configs.items()} | {
        "scheduler/scheduler_config.json": SCHEDULER | {"beta_end": BETA_END[version]},
        "model_index.json": MODEL_INDEX,
        "tokenizer/tokenizer_config.json": bert,
        "tokenizer_2/tokenizer_config.json": t5,
    }
    for name, values in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(values, indent=2), encoding="utf-8")
    words = itertools.islice(_words(), configs["text_encoder"]["vocab_size"])
    (folder / "tokenizer" / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    (folder / "tokenizer_2" / "spiece.model").write_bytes(_sentencepiece(pieces))
    modules = {
        "transformer": ("diffusion_pytorch_model", empty(HunyuanDiT, HunyuanConfig.from_dict(configs["transformer"]))),
        "vae": ("diffusion_pytorch_model", empty(AutoencoderKL, VaeConfig.from_dict(configs["vae"]))),
        "text_encoder": ("model", empty(BertEncoder, BertConfig.from_dict(configs["text_encoder"]))),
        "text_encoder_2": ("model", empty(T5Encoder, T5Config.from_dict(configs["text_encoder_2"]))),
    }
    for part, (stem, module) in modules.items():
        save_random(folder / part, stem, module, dtype, shards, generator)


def _words() -> Iterator[str]:
    """A vocabulary in the order of a Chinese BERT: unused numbers, characters, and pieces of words."""
    yield from (SPECIAL_WORDS.get(i, f"[unused{i}]") for i in range(max(SPECIAL_WORDS) + 1))
    singles = [*string.punctuation, *string.digits, *string.ascii_lowercase, *IDEOGRAPHS]
    yield from singles
    yield from (f"##{single}" for single in singles)
    for length in itertools.count(2):
        yield from map("".join, itertools.product(string.ascii_lowercase, repeat=length))


def _pieces() -> Iterator[tuple[str, int]]:
    """Text and kind of every piece in the order of mT5's model."""
    yield from (("<pad>", CONTROL), ("</s>", CONTROL), ("<unk>", UNKNOWN_KIND))
    yield from ((f"<0x{byte:02X}>", BYTE) for byte in range(256))
    yield SPACE, NORMAL
    for text in (*string.printable[:94], *IDEOGRAPHS):
        yield text, NORMAL
    for length in (1, 2, 3):
        for text in map("".join, itertools.product(string.ascii_lowercase, repeat=length)):
            yield SPACE + text, NORMAL
    yield from (("".join(pair), NORMAL) for pair in itertools.product(IDEOGRAPHS, repeat=2))


def _sentencepiece(count: int) -> bytes:
    """A `ModelProto` of a unigram model; field numbers are those of sentencepiece_model.proto."""
    model = bytearray()
    for i, (text, kind) in enumerate(itertools.islice(_pieces(), count)):
        # A logarithm in fixed 32 bits (wire type 5): less for every piece, and so that one piece is likelier than two.
        score = bytes([2 << 3 | 5]) + struct.pack("<f", -10 - i / count if kind == NORMAL else 0.0)
        model += _field(1, _field(1, text.encode()) + score + _field(3, kind))
    trainer = _field(3, UNIGRAM) + _field(4, count) + _field(35, 1)
    normalizer = _field(1, b"identity") + _field(3, 1) + _field(4, 1) + _field(5, 1)
    return bytes(model + _field(2, trainer) + _field(3, normalizer))


def _field(number: int, value: int | bytes) -> bytes:
    """One field of a protobuf message: a number, or something with a length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
