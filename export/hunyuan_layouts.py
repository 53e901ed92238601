"""Where the parts of a HunyuanDiT checkpoint lie: as diffusers publishes it, and as Tencent does."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pochade.errors import InputRefusedError
from pochade.export.checkpoint import TensorFile, TensorFolder, Tensors, empty, parse_config, read_json
from pochade.export.hunyuan_keys import OriginalTensors, is_original
from pochade.export.modules.hunyuan_controlnet import ControlNet, ControlNetConfig
from pochade.export.modules.hunyuan_dit import HunyuanConfig

C = TypeVar("C", bound=HunyuanConfig)

STYLE_KEY = "time_extra_emb.style_embedder.weight"
"""Networks up to version 1.1 have it."""

PARTS = ("transformer", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae", "scheduler")
ORIGINAL_FOLDER = "t2i"
ORIGINAL_PARTS = ("model", "clip_text_encoder", "mt5", "tokenizer", "sdxl-vae-fp16-fix")
ORIGINAL_FILES = ("pytorch_model_ema.pt", "pytorch_model_module.pt", "pytorch_model_distill.pt")
"""The network, the averaged weights first; a distilled checkpoint has the last alone."""

SCHEDULE: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}
"""What the scheduler files of all versions have; Tencent's layout has no such file."""


@dataclass(frozen=True)
class Layout:
    """An opened checkpoint of either layout."""

    config: HunyuanConfig
    weights: Tensors
    """Of the transformer, under diffusers' keys."""
    schedule: Mapping[str, Any]
    text_encoder: Path
    text_encoder_2: Path
    tokenizer: Path
    spiece: Path
    """File of mT5's tokenizer."""
    vae: Path

    @classmethod
    def open(cls, path: Path) -> Layout:
        """Layout of a folder that holds `model_index.json`, or `t2i`, or is `t2i` itself.

        Raises:
            InputRefusedError: parts are missing, or the transformer's config cannot be meant.
        """
        if not path.is_dir():
            raise InputRefusedError(str(path), ["it is not a folder; give the one that holds model_index.json or t2i"])
        if (path / "model_index.json").exists():
            return cls._published(path)
        if (path / ORIGINAL_FOLDER).is_dir():
            return cls._original(path / ORIGINAL_FOLDER)
        return cls._original(path)

    @classmethod
    def _published(cls, path: Path) -> Layout:
        _demand(path, PARTS)
        weights = TensorFolder(path / "transformer")
        config = parse_config(HunyuanConfig, path / "transformer" / "config.json")
        # Rather than the config, which does not say it up to version 1.1.
        config = replace(config, use_style_cond_and_image_meta_size=STYLE_KEY in weights.keys())  # noqa: SIM118
        return cls(
            config,
            weights,
            read_json(path / "scheduler" / "scheduler_config.json"),
            path / "text_encoder",
            path / "text_encoder_2",
            path / "tokenizer",
            path / "tokenizer_2" / "spiece.model",
            path / "vae",
        )

    @classmethod
    def _original(cls, path: Path) -> Layout:
        _demand(path, ORIGINAL_PARTS)
        found = next((path / "model" / n for n in ORIGINAL_FILES if (path / "model" / n).is_file()), None)
        if found is None:
            raise InputRefusedError(str(path / "model"), [f"none of {', '.join(ORIGINAL_FILES)} is in it"])
        file = TensorFile(found)
        weights = OriginalTensors(file) if is_original(file.keys()) else file
        config = config_of(weights)
        return cls(
            config,
            weights,
            SCHEDULE | {"beta_end": 0.03 if config.use_style_cond_and_image_meta_size else 0.018},
            path / "clip_text_encoder",
            path / "mt5",
            path / "tokenizer",
            path / "mt5" / "spiece.model",
            path / "sdxl-vae-fp16-fix",
        )


@dataclass(frozen=True)
class ControlNetLayout:
    """An opened ControlNet: diffusers' folder, or Tencent's file."""

    config: ControlNetConfig
    weights: Tensors
    """Under diffusers' keys."""

    @classmethod
    def open(cls, path: Path) -> ControlNetLayout:
        """Layout of a folder that holds `config.json`, or of a file of tensors.

        Raises:
            InputRefusedError: it is neither, or its config cannot be meant.
        """
        if path.is_dir():
            weights: Tensors = TensorFolder(path)
            config = parse_config(ControlNetConfig, path / "config.json")
            # Rather than the config, which does not say it up to version 1.1.
            sized = STYLE_KEY in weights.keys()  # noqa: SIM118
            return cls(replace(config, use_style_cond_and_image_meta_size=sized), weights)
        file = TensorFile(path)
        weights = OriginalTensors(file) if is_original(file.keys()) else file
        config = controlnet_config_of(weights)
        # Tencent's files hold more than the network uses, such as layers for skips that it does not have.
        used = empty(ControlNet, config).state_dict().keys() & set(weights.keys())
        return cls(config, weights.renamed({key: key for key in used}))


def controlnet_config_of(weights: Tensors) -> ControlNetConfig:
    """Config told by the shapes of a ControlNet's weights.

    Raises:
        InputRefusedError: those that tell it are missing, or cannot be meant.
    """
    # The first half of the blocks, but for the last of them.
    layers = 2 * (sum(re.fullmatch(r"controlnet_blocks\.\d+\.weight", key) is not None for key in weights.keys()) + 1)  # noqa: SIM118
    return _told(ControlNetConfig, weights, lambda: {"transformer_num_layers": layers, "learn_sigma": False})


def config_of(weights: Tensors) -> HunyuanConfig:
    """Config told by the shapes of a network's weights.

    Raises:
        InputRefusedError: those that tell it are missing, or cannot be meant.
    """

    def more() -> dict[str, Any]:
        patch, channels = weights.shape("pos_embed.proj.weight")[2], weights.shape("pos_embed.proj.weight")[1]
        return {
            "num_layers": sum(key.endswith(".norm1.linear.weight") for key in weights.keys()),  # noqa: SIM118
            "learn_sigma": weights.shape("proj_out.weight")[0] > patch**2 * channels,
        }

    return _told(HunyuanConfig, weights, more)


def _told(kind: type[C], weights: Tensors, more: Callable[[], dict[str, Any]]) -> C:
    """Config of values that all networks tell alike, and of some more."""
    keys = weights.keys()
    try:
        dim, channels, patch, _ = weights.shape("pos_embed.proj.weight")
        head = weights.shape("blocks.0.attn1.norm_q.weight")[0]
        text_len_t5 = weights.shape("time_extra_emb.pooler.positional_embedding")[0] - 1
        values = {
            "num_attention_heads": dim // head,
            "attention_head_dim": head,
            "hidden_size": dim,
            "in_channels": channels,
            "patch_size": patch,
            # Half a channel more, so that cutting to a whole number gives this one.
            "mlp_ratio": (weights.shape("blocks.0.ff.net.0.proj.weight")[0] + 0.5) / dim,
            "cross_attention_dim": weights.shape("text_embedding_padding")[1],
            "cross_attention_dim_t5": weights.shape("text_embedder.linear_1.weight")[1],
            "pooled_projection_dim": weights.shape("time_extra_emb.pooler.c_proj.weight")[0],
            "text_len": weights.shape("text_embedding_padding")[0] - text_len_t5,
            "text_len_t5": text_len_t5,
            "use_style_cond_and_image_meta_size": STYLE_KEY in keys,
        }
        return kind.from_dict(values | more())
    except KeyError as error:
        raise InputRefusedError(str(weights.where), [f"it is no HunyuanDiT: tensor {error} is missing"]) from None
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise InputRefusedError(str(weights.where), [f"its shapes are those of no HunyuanDiT ({error})"]) from None


def _demand(path: Path, parts: tuple[str, ...]) -> None:
    missing = [name for name in parts if not (path / name).exists()]
    if missing:
        raise InputRefusedError(str(path), [f"it is no checkpoint in a published layout, missing {', '.join(missing)}"])
