"""OpenVINO models of a checkpoint, made once: 16-bit weights, 8-bit weights and activations, 4-bit weights.

    python -m pochade.benchmarks.peers.openvino_models CHECKPOINT FOLDER [--variants bf16 int8 int4]

What OpenVINO's own tools recommend for each: conversion from PyTorch; NNCF post-training quantization for transformers,
calibrated on inputs of the kind the model gets; NNCF compression of weights to 4 bits in groups of 128.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pochade.benchmarks.peers.loop import Array
from pochade.export.checkpoint import empty
from pochade.export.families.meissonic import FOREIGN_TEXT_KEYS, Meissonic
from pochade.export.modules.clip_text import ClipTextEncoder
from pochade.export.modules.masked_transformer import MaskedTransformer
from pochade.export.modules.vq import VQModel

VARIANTS = ("bf16", "int8", "int4")
DONE = "facts.json"
CALIBRATION = 4
"""Grids to calibrate with: the share of masked cells from all to few."""


class Decoder(nn.Module):
    """Only the half of the codec that paints."""

    def __init__(self, codec: VQModel) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Grid to picture."""
        return self.codec.decode(tokens)


def make(checkpoint_folder: Path, folder: Path, variants: list[str], width: int, height: int) -> None:
    """Write the models of each variant to `folder/VARIANT`; what is there is kept.

    Args:
        checkpoint_folder: in the published layout.
        folder: to write to.
        variants: some of VARIANTS.
        width: of the pictures they are for, in pixels.
        height: as `width`.
    """
    # Its tools report to their makers, unless they believe to be in somebody's CI.
    os.environ.setdefault("CI", "true")
    import nncf
    import openvino as ov

    missing = [name for name in variants if not (folder / name / DONE).exists()]
    if not missing:
        return
    checkpoint = Meissonic.open(checkpoint_folder)
    ids = np.array([checkpoint.tokenizer().encode("a photo of a small red house near the lake").ids], np.int64)
    text = _loaded(ClipTextEncoder, checkpoint.text, checkpoint.text_weights, FOREIGN_TEXT_KEYS)
    with torch.inference_mode():
        states, pooled = (value.numpy() for value in text(torch.from_numpy(ids)))
    models = {"text_encoder": _convert(ov, text, {"input_ids": ids})}
    del text
    calls = list(_calls(checkpoint, states, pooled, (width, height)))
    transformer = _loaded(MaskedTransformer, checkpoint.transformer, checkpoint.transformer_weights)
    models["transformer"] = _convert(ov, transformer, calls[0])
    del transformer
    codec = _loaded(VQModel, checkpoint.codec, checkpoint.codec_weights)
    grid = {"tokens": np.where(calls[-1]["tokens"] < checkpoint.transformer.codebook_size, calls[-1]["tokens"], 0)}
    models["vq_decoder"] = _convert(ov, Decoder(codec), grid)
    del codec
    for name in missing:
        target = folder / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for part, model in models.items():
            made = model.clone()
            data = {"transformer": calls, "vq_decoder": [grid]}.get(part)
            if name == "int8" and data is not None:
                kind = nncf.ModelType.TRANSFORMER if part == "transformer" else None
                made = nncf.quantize(made, nncf.Dataset(data), model_type=kind, subset_size=len(data))
            elif name == "int8":
                made = nncf.compress_weights(made, mode=nncf.CompressWeightsMode.INT8_SYM)
            elif name == "int4" and part != "vq_decoder":
                made = nncf.compress_weights(
                    made, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=_group(checkpoint)
                )
            ov.save_model(made, target / f"{part}.xml", compress_to_fp16=True)
        facts = {"ids": _both(checkpoint, ids), "scheduler": checkpoint.scheduler_manifest(), "size": [width, height]}
        (target / DONE).write_text(json.dumps(facts), "utf-8")


def _both(checkpoint: Meissonic, ids: Array) -> list[list[int]]:
    return [ids[0].tolist(), list(checkpoint.tokenizer().encode("").ids)]


def _group(checkpoint: Meissonic) -> int:
    """128, or what a smaller network's widths are multiples of."""
    return int(np.gcd.reduce([128, checkpoint.transformer.dim, checkpoint.text.hidden_size]))


def _loaded(kind: type[nn.Module], config: object, source: Any, foreign: tuple[str, ...] = ()) -> Any:
    module = empty(kind, config)
    source.load_into(module, foreign)
    return module


def _convert(ov: Any, module: nn.Module, example: dict[str, Array]) -> Any:
    with torch.inference_mode():
        inputs = {name: torch.from_numpy(array) for name, array in example.items()}
        return ov.convert_model(module.eval(), example_input=inputs)


def _calls(checkpoint: Meissonic, states: Array, pooled: Array, size: tuple[int, int]) -> Iterator[dict[str, Array]]:
    """Inputs of the transformer at several stages of a picture with random codes."""
    rng = np.random.default_rng(0)
    columns, rows = (side // checkpoint.codec.factor for side in size)
    for i in range(CALIBRATION):
        tokens = rng.integers(0, checkpoint.transformer.codebook_size, (1, rows, columns))
        tokens[rng.random(tokens.shape) < np.cos(i / CALIBRATION * np.pi / 2)] = checkpoint.scheduler["mask_token_id"]
        yield {
            "tokens": tokens,
            "text_states": states,
            "pooled": pooled,
            "micro_conds": np.array([[*size, 0, 0, 6.0]], np.float32),
            "timestep": np.array([63 - 16 * i], np.float32),
        }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--size", type=int, nargs=2, default=[1024, 1024], metavar=("WIDTH", "HEIGHT"))
    arguments = parser.parse_args()
    make(arguments.checkpoint, arguments.folder, arguments.variants, *arguments.size)


if __name__ == "__main__":
    main()
