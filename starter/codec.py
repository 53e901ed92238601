"""Trains a small VQ model of the published layout to the fixed codes of `starter.codes`.

The code book is given. The decoder learns pictures from code vectors; seeing its neighbours, it
smooths the coarse edge prototypes. The encoder learns code vectors from pictures, so that the
nearest code of its output is the patch-local code. Both are independent and share one loop.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pochade.export.modules.vq import VqConfig, VQModel
from pochade.starter.checker import check
from pochade.starter.codec_start import carry_colours
from pochade.starter.codes import CODEBOOK, FLAT, VECTOR, code_vectors, scene_codes
from pochade.starter.draw import random_scene
from pochade.starter.scenes import render
from pochade.starter.schedule import Budget
from pochade.starter.shapes import CELL, GRID

log = logging.getLogger(__name__)

CHANNELS = (16, 32, 64, 96)


def vq_config(channels: tuple[int, ...] = CHANNELS) -> dict[str, Any]:
    """Content of vqvae/config.json."""
    return {
        "_class_name": "VQModel",
        "_diffusers_version": "0.30.2",
        "act_fn": "silu",
        "block_out_channels": list(channels),
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": VECTOR,
        "layers_per_block": 1,
        "lookup_from_codebook": True,
        "mid_block_add_attention": False,
        "norm_num_groups": 4,
        "norm_type": "group",
        "num_vq_embeddings": CODEBOOK,
        "out_channels": 3,
        "sample_size": 32,
        "scaling_factor": 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "vq_embed_dim": None,
    }


def new_codec(channels: tuple[int, ...] = CHANNELS) -> VQModel:
    """An untrained VQ model with the fixed code book."""
    codec = VQModel(VqConfig.from_dict(vq_config(channels)))
    codec.quantize.embedding.weight.data.copy_(torch.from_numpy(code_vectors()))
    codec.quantize.embedding.weight.requires_grad_(False)
    carry_colours(codec)
    return codec


def pictures_and_codes(n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Pictures float32 (n, 3, SIDE, SIDE) in 0..1 and their codes int64 (n, GRID, GRID).

    Rolled by whole cells, so that objects are seen at every place, cut by the border too.
    """
    pictures, codes = [], []
    for _ in range(n):
        scene = random_scene(rng, held_out=True)
        down, right = rng.integers(0, GRID, 2) if rng.random() < 0.3 else (0, 0)
        pictures.append(np.roll(render(scene), (down * CELL, right * CELL), (0, 1)))
        codes.append(np.roll(scene_codes(scene), (down, right), (0, 1)))
    stack = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return stack.float() / 255, torch.from_numpy(np.stack(codes))


def decoder_loss(codec: VQModel, pictures: Tensor, codes: Tensor) -> Tensor:
    """Absolute and squared error of the pictures decoded from the true codes."""
    with torch.autocast("cpu", torch.bfloat16):
        error = codec.decode(codes).float() - pictures
    return error.abs().mean() + 4 * error.square().mean()


def encoder_loss(codec: VQModel, pictures: Tensor, codes: Tensor) -> Tensor:
    """Squared error of the code vectors read from the pictures."""
    # Faint noise, so that the encoder also reads pictures that are not exact.
    noisy = pictures + 0.01 * torch.randn_like(pictures)
    with torch.autocast("cpu", torch.bfloat16):
        latents = codec.encode(noisy)
    return nn.functional.mse_loss(latents.float(), codec.quantize.embedding(codes).permute(0, 3, 1, 2))


PARTS: dict[str, Callable[[VQModel, Tensor, Tensor], Tensor]] = {"decoder": decoder_loss, "encoder": encoder_loss}


def train_codec(
    codec: VQModel,
    part: str,
    budget: Budget,
    batch: int = 8,
    rate: float = 2e-3,
    seed: int = 0,
    compiled: bool = False,
    save: Callable[[], None] | None = None,
) -> None:
    """Train one of PARTS until the budget is used; the other part and the code book stay as they are.

    `save` is called every hundred steps.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    loss_of = torch.compile(PARTS[part]) if compiled else PARTS[part]
    modules = {"decoder": [codec.post_quant_conv, codec.decoder], "encoder": [codec.encoder, codec.quant_conv]}[part]
    weights = [w for module in modules for w in module.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.98), weight_decay=1e-4)
    step = 0
    while (progress := budget.progress(step * batch)) < 1:
        decay = max(0.02, 0.5 + 0.5 * math.cos(math.pi * progress))
        optimiser.param_groups[0]["lr"] = rate * min(1, (step + 1) / 50) * decay
        loss = loss_of(codec, *pictures_and_codes(batch, rng))
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        if step % 50 == 0:
            log.info("%s step %d: loss %.4f", part, step, loss.item())
        if save and step % 100 == 0:
            save()


def decode_pictures(codec: VQModel, codes: Tensor) -> list[np.ndarray]:
    """Pictures uint8 (SIDE, SIDE, 3) of code grids int64 (n, GRID, GRID)."""
    with torch.no_grad():
        painted = codec.decode(codes).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return [np.rint(255 * picture).astype(np.uint8) for picture in painted]


def round_trip(codec: VQModel, n: int, seed: int = 123) -> dict[str, float]:
    """Shares of scenes whose decoded true codes pass the checker, and of cells the encoder reads right."""
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng, held_out=True) for _ in range(n)]
    codes = torch.from_numpy(np.stack([scene_codes(scene) for scene in scenes]))
    painted = decode_pictures(codec, codes)
    truth = np.stack([render(scene) for scene in scenes])
    with torch.no_grad():
        read = codec.nearest_codes(codec.encode(torch.from_numpy(truth).permute(0, 3, 1, 2).contiguous().float() / 255))
    error = np.mean((np.stack(painted).astype(np.float64) - truth) ** 2)
    edges = codes >= FLAT
    return {
        "decoded scenes right": float(np.mean([check(p, s).passed for p, s in zip(painted, scenes, strict=True)])),
        "PSNR of decoded scenes, dB": float(10 * np.log10(255**2 / error)),
        "cells read right": float((read == codes).float().mean()),
        "edge cells read right": float((read == codes)[edges].float().mean()),
    }


def main(argv: list[str] | None = None) -> None:
    """Command line: train a part of the codec on from where its file is, then report the round trip."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="file with the codec's weights; made if missing")
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--samples", type=int, default=8_000)
    parser.add_argument("--compile", action="store_true", help="torch.compile (needs a C++ compiler)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    codec = new_codec()
    if args.out.exists():
        codec.load_state_dict(torch.load(args.out, weights_only=True))

    def save() -> None:
        # Another run may have trained the other part meanwhile: replace only this one.
        state = codec.state_dict()
        if args.out.exists():
            mine = ("decoder.", "post_quant_conv.") if args.part == "decoder" else ("encoder.", "quant_conv.")
            older = torch.load(args.out, weights_only=True)
            state = older | {k: v for k, v in state.items() if k.startswith(mine)}
        torch.save(state, args.out)

    train_codec(codec, args.part, Budget(samples=args.samples), compiled=args.compile, save=save)
    save()
    log.info("%s", round_trip(codec, 200))


if __name__ == "__main__":
    main()
