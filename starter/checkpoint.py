"""Writes the trained networks as a checkpoint folder in the published layout, all float32."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pochade.starter.bpe import END, PAD, START, Tokenizer
from pochade.starter.codec import vq_config
from pochade.starter.model import MASK, TEXT_LENGTH, Painter, sizes_of, text_config, transformer_config

State = dict[str, torch.Tensor]

STATE = "state.pt"
"""File of a run with everything it needs to go on."""

LOG = "log.jsonl"
"""File of a run with a line every hundred steps."""

CODEC = "codec.pt"
"""File of a run with the codec's weights."""

MODEL_INDEX = {
    "_class_name": "Pipeline",
    "_diffusers_version": "0.30.2",
    "scheduler": ["scheduler", "Scheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "transformer": ["transformer", "Transformer2DModel"],
    "vqvae": ["diffusers", "VQModel"],
}

SCHEDULER = {
    "_class_name": "Scheduler",
    "_diffusers_version": "0.30.2",
    "mask_token_id": MASK,
    "masking_schedule": "cosine",
}


def _token(content: str, normalized: bool) -> dict[str, Any]:
    """A special token as the tokenizer files describe it."""
    return {"content": content, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """Contents of the two JSON files beside vocab.json and merges.txt."""
    added = {str(tokenizer.ids[t]): _token(t, t != PAD) | {"special": True} for t in (PAD, START, END)}
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "bos_token": START,
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "eos_token": END,
        "errors": "replace",
        "model_max_length": tokenizer.length,
        "pad_token": PAD,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": END,
    }
    special = {
        "bos_token": _token(START, True),
        "eos_token": _token(END, True),
        "pad_token": PAD,
        "unk_token": _token(END, True),
    }
    return {"tokenizer_config.json": config, "special_tokens_map.json": special}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def _write_weights(path: Path, state: State, prefix: str = "") -> None:
    """The tensors under a prefix, without it, as float32 safetensors."""
    tensors = {k.removeprefix(prefix): v.float().contiguous() for k, v in state.items() if k.startswith(prefix)}
    save_file(tensors, path, metadata={"format": "pt"})


def write_checkpoint(folder: Path, painter: Painter, codec: State, tokenizer: Tokenizer) -> None:
    """Write the whole checkpoint.

    Args:
        folder: made if missing; files in it are replaced.
        painter: the trained text encoder and transformer.
        codec: state of the VQ model.
        tokenizer: the tokenizer the text encoder was trained with.
    """
    weights = painter.published()
    levels = sum(name.startswith("decoder.up_blocks") and name.endswith("resnets.0.conv1.bias") for name in codec)
    channels = tuple(len(codec[f"encoder.down_blocks.{i}.resnets.0.conv1.bias"]) for i in range(levels))
    _write_json(folder / "model_index.json", MODEL_INDEX)
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    _write_json(folder / "transformer" / "config.json", transformer_config(**painter.sizes))
    _write_json(folder / "text_encoder" / "config.json", text_config(len(tokenizer.ids), painter.sizes["dim"]))
    _write_json(folder / "vqvae" / "config.json", vq_config(channels))
    for name, values in tokenizer_files(tokenizer).items():
        _write_json(folder / "tokenizer" / name, values)
    tokenizer.save(folder / "tokenizer")
    _write_weights(folder / "transformer" / "diffusion_pytorch_model.safetensors", weights, "transformer.")
    _write_weights(folder / "text_encoder" / "model.safetensors", weights, "text.")
    _write_weights(folder / "vqvae" / "diffusion_pytorch_model.safetensors", codec)


def load_run(folder: Path) -> tuple[Painter, Tokenizer]:
    """The averaged networks of a run, finished or not, and their tokenizer."""
    state = torch.load(folder / STATE, weights_only=True)
    tokenizer = Tokenizer(state["merges"], TEXT_LENGTH)
    painter = Painter(len(tokenizer.ids), **sizes_of(state["ema"]))
    painter.load_state_dict(state["ema"])
    return painter, tokenizer


def main(argv: list[str] | None = None) -> None:
    """Command line: the checkpoint of a run that is still going on, from its last saved state."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder that starter.train writes to")
    parser.add_argument("--codec", type=Path, help="the codec's weights; codec.pt in the run's folder if not given")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    args = parser.parse_args(argv)
    painter, tokenizer = load_run(args.run)
    codec = torch.load(args.codec or args.run / CODEC, weights_only=True)
    write_checkpoint(args.out, painter, codec, tokenizer)


if __name__ == "__main__":
    main()
