"""Tiny random HunyuanDiT checkpoints in both published layouts, written by the reference libraries."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from diffusers import AutoencoderKL

from pochade.benchmarks.random_hunyuandit import BETA_END, SCHEDULER
from pochade.export.hunyuan_keys import to_original
from tests import hunyuan, text_models

WORDS = ("red", "fox", "in", "the", "snow", "blue", "heart", "worst", "quality", "a", "fox ##es", "##s")
CHARACTERS = "一只红色的狐狸在雪地里错误的眼睛，糟糕的人脸蓝心宇航员骑马"


def write_checkpoint(folder: Path, version: str, seed: int = 0) -> Path:
    """The folder, holding a checkpoint of this version as diffusers publishes it."""
    hunyuan.transformer(version, seed).save_pretrained(folder / "transformer")
    if version == "v1.1":
        # Published configs of that time do not say it.
        path = folder / "transformer" / "config.json"
        values = json.loads(path.read_text())
        del values["use_style_cond_and_image_meta_size"]
        path.write_text(json.dumps(values))
    text_models.save_published(folder)
    vae().save_pretrained(folder / "vae")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER | {"beta_end": BETA_END[version]}))
    write_vocabulary(folder / "tokenizer")
    write_spiece(folder / "tokenizer_2")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "HunyuanDiTPipeline"}))
    return folder


def write_original(folder: Path, version: str, seed: int = 0, file: str = "pytorch_model_ema.pt") -> Path:
    """The folder, holding the same checkpoint in Tencent's layout."""
    (folder / "t2i" / "model").mkdir(parents=True)
    torch.save(to_original(hunyuan.transformer(version, seed).state_dict()), folder / "t2i" / "model" / file)
    bert, mt5 = text_models.bert(), text_models.mt5()
    bert.config.save_pretrained(folder / "t2i" / "clip_text_encoder")
    mt5.config.save_pretrained(folder / "t2i" / "mt5")
    state = {f"bert.{key}": value for key, value in bert.state_dict().items()}
    torch.save(state | {"visual.proj": torch.zeros(3)}, folder / "t2i" / "clip_text_encoder" / "pytorch_model.bin")
    torch.save(mt5.state_dict(), folder / "t2i" / "mt5" / "pytorch_model.bin")
    write_vocabulary(folder / "t2i" / "tokenizer")
    write_spiece(folder / "t2i" / "mt5")
    vae().save_pretrained(folder / "t2i" / "sdxl-vae-fp16-fix")
    return folder


def write_controlnet(folder: Path, version: str, seed: int = 7) -> Path:
    """The folder, holding a ControlNet as diffusers publishes it."""
    hunyuan.controlnet(version, seed).save_pretrained(folder)
    if version == "v1.1":
        path = folder / "config.json"
        values = json.loads(path.read_text())
        del values["use_style_cond_and_image_meta_size"]
        path.write_text(json.dumps(values))
    return folder


def write_original_controlnet(file: Path, version: str, seed: int = 7) -> Path:
    """The file, holding the same ControlNet as Tencent publishes it, with layers that nothing uses."""
    state = to_original(hunyuan.controlnet(version, seed).state_dict())
    width = hunyuan.TRANSFORMER["hidden_size"]
    state |= {"blocks.0.skip_linear.weight": torch.zeros(width, 2 * width), "blocks.0.skip_norm.bias": torch.zeros(3)}
    torch.save(state, file)
    return file


def vae() -> Any:
    """SDXL's codec with other widths."""
    torch.manual_seed(5)
    model: Any = AutoencoderKL(  # type: ignore[no-untyped-call]
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=512,
        scaling_factor=0.13025,
        force_upcast=False,
    )
    return model.eval()


def write_vocabulary(folder: Path) -> None:
    """A small BERT vocabulary of Chinese characters and English words."""
    folder.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = dict.fromkeys([*special, *" ".join(WORDS).split(), *CHARACTERS])
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 77}))


def write_spiece(folder: Path) -> None:
    """A small unigram model with mT5's settings."""
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    lines = [" ".join(WORDS[i:] + WORDS[:i]) + " " + CHARACTERS[i:] for i in range(len(WORDS))] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=390,
        hard_vocab_limit=False,
        model_type="unigram",
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())


def copy(source: Path, target: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(source, target))
