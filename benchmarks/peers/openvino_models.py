"""OpenVINO models of a checkpoint, made once: 16-bit weights, 8-bit weights and activations, 4-bit weights.

    python -m pochade.benchmarks.peers.openvino_models CHECKPOINT FOLDER [--variants bf16 int8 int4]

What OpenVINO's own tools recommend for each: conversion from PyTorch; NNCF post-training quantization for transformers,
calibrated on inputs of the kind the model gets; NNCF compression of weights to 4 bits in groups of 128.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
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
GRID = 16
"""Cells per side of what the decoder is calibrated with."""


class Decoder(nn.Module):
    """Only the half of the codec that paints."""

    def __init__(self, codec: VQModel) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Grid to picture."""
        return self.codec.decode(tokens)


Calls = list[dict[str, Array]]
"""Inputs of a network, one run after the other."""


def make(checkpoint_folder: Path, folder: Path, variants: list[str], width: int, height: int) -> None:
    """Write the models of each variant to `folder/VARIANT`; what is there is kept.

    One network at a time is in memory, and what was interrupted goes on with the next one.

    Args:
        checkpoint_folder: in the published layout.
        folder: to write to.
        variants: some of VARIANTS.
        width: of the pictures they are for, in pixels.
        height: as `width`.
    """
    # Its tools report to their makers, unless they believe to be in somebody's CI.
    os.environ.setdefault("CI", "true")
    if all((folder / name / DONE).exists() for name in variants):
        return
    checkpoint = Meissonic.open(checkpoint_folder)
    ids = np.array([checkpoint.tokenizer().encode("a photo of a small red house near the lake").ids], np.int64)
    size = (width, height)
    facts = {"ids": _both(checkpoint, ids), "scheduler": checkpoint.scheduler_manifest(), "size": list(size)}
    networks: dict[str, Callable[[], tuple[Any, Calls]]] = {
        "text_encoder": lambda: _text_encoder(checkpoint, ids),
        "transformer": lambda: _transformer(checkpoint, ids, size),
        "vq_decoder": lambda: _decoder(checkpoint),
    }
    for part, prepare in networks.items():
        missing = [name for name in variants if not (folder / name / f"{part}.xml").exists()]
        if missing:
            _write(part, *prepare(), [folder / name for name in missing], _group(checkpoint))
    for name in variants:
        (folder / name / DONE).write_text(json.dumps(facts), "utf-8")


def _write(part: str, model: Any, calls: Calls, targets: list[Path], group: int) -> None:
    """One network in each of the variants that the folders are named after."""
    import nncf
    import openvino as ov

    for target in targets:
        made = model.clone()
        if target.name == "int8" and part != "text_encoder":
            kind = nncf.ModelType.TRANSFORMER if part == "transformer" else None
            made = nncf.quantize(made, nncf.Dataset(calls), model_type=kind, subset_size=len(calls))
        elif target.name == "int8":
            made = nncf.compress_weights(made, mode=nncf.CompressWeightsMode.INT8_SYM)
        elif target.name == "int4" and part != "vq_decoder":
            made = nncf.compress_weights(made, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=group)
        new = target / "new"
        new.mkdir(parents=True, exist_ok=True)
        ov.save_model(made, new / f"{part}.xml", compress_to_fp16=True)
        # The graph last: where it is, the weights are.
        for suffix in ("bin", "xml"):
            (new / f"{part}.{suffix}").replace(target / f"{part}.{suffix}")
        new.rmdir()


def _text_encoder(checkpoint: Meissonic, ids: Array) -> tuple[Any, Calls]:
    calls = [{"input_ids": ids}]
    return _convert(_loaded(ClipTextEncoder, checkpoint.text, checkpoint.text_weights, FOREIGN_TEXT_KEYS), calls), calls


def _transformer(checkpoint: Meissonic, ids: Array, size: tuple[int, int]) -> tuple[Any, Calls]:
    text = _loaded(ClipTextEncoder, checkpoint.text, checkpoint.text_weights, FOREIGN_TEXT_KEYS)
    with torch.inference_mode():
        states, pooled = (value.numpy() for value in text(torch.from_numpy(ids)))
    del text
    calls = list(_calls(checkpoint, states, pooled, size))
    return _convert(_loaded(MaskedTransformer, checkpoint.transformer, checkpoint.transformer_weights), calls), calls


def _decoder(checkpoint: Meissonic) -> tuple[Any, Calls]:
    """Calibrated on small pictures: at 1024x1024 NNCF wants more than 24 GB, and convolutions see no difference."""
    codes = np.random.default_rng(0).integers(0, checkpoint.transformer.codebook_size, (CALIBRATION, 1, GRID, GRID))
    calls = [{"tokens": grid} for grid in codes]
    return _convert(Decoder(_loaded(VQModel, checkpoint.codec, checkpoint.codec_weights)), calls), calls


def _both(checkpoint: Meissonic, ids: Array) -> list[list[int]]:
    return [ids[0].tolist(), list(checkpoint.tokenizer().encode("").ids)]


def _group(checkpoint: Meissonic) -> int:
    """128, or what a smaller network's widths are multiples of."""
    return int(np.gcd.reduce([128, checkpoint.transformer.dim, checkpoint.text.hidden_size]))


def _loaded(kind: type[nn.Module], config: object, source: Any, foreign: tuple[str, ...] = ()) -> Any:
    module = empty(kind, config)
    source.load_into(module, foreign)
    return module


def _convert(module: nn.Module, calls: Calls) -> Any:
    import openvino as ov

    with torch.inference_mode():
        inputs = {name: torch.from_numpy(array) for name, array in calls[0].items()}
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
