"""Trains a small VQ model of the published layout to the fixed codes of `starter.codes`.

The code book is given. The decoder learns pictures from code vectors; seeing its neighbours, it
smooths the coarse edge prototypes. The encoder learns code vectors from pictures, so that the
nearest code of its output is the patch-local code. Both are independent and share one loop.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pochade.export.modules.vq import VqConfig, VQModel
from pochade.starter.checker import check
from pochade.starter.codec_start import carry_colours
from pochade.starter.codes import CODEBOOK, FLAT, VECTOR, code_vectors, scene_codes
from pochade.starter.draw import random_scene
from pochade.starter.fast import autocast, fast_dtype
from pochade.starter.muon import Muon
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
    with autocast():
        error = codec.decode(codes).float() - pictures
    return error.abs().mean() + 4 * error.square().mean()


def encoder_loss(codec: VQModel, pictures: Tensor, codes: Tensor) -> Tensor:
    """Squared error of the code vectors read from the pictures."""
    # Faint noise, so that the encoder also reads pictures that are not exact.
    noisy = pictures + 0.01 * torch.randn_like(pictures)
    with autocast():
        latents = codec.encode(noisy)
    return nn.functional.mse_loss(latents.float(), codec.quantize.embedding(codes).permute(0, 3, 1, 2))


PARTS: dict[str, Callable[[VQModel, Tensor, Tensor], Tensor]] = {"decoder": decoder_loss, "encoder": encoder_loss}


class ConvMuon:
    """Muon for convolutions, each seen as a matrix of outputs by inputs.

    With the same data it halves the decoder's loss: after 1600 pictures 0.019, with AdamW at its best rate 0.043.
    """

    def __init__(self, weights: list[nn.Parameter], rate: float) -> None:
        self.weights = weights
        self.matrices = [nn.Parameter(self._matrix(weight.detach())) for weight in weights]
        self.muon = Muon(self.matrices, rate, 0.0, fast_dtype())

    def step(self) -> None:
        """Update the convolutions from their gradients."""
        for matrix, weight in zip(self.matrices, self.weights, strict=True):
            matrix.grad = None if weight.grad is None else self._matrix(weight.grad)
        self.muon.step()
        with torch.no_grad():
            for matrix, weight in zip(self.matrices, self.weights, strict=True):
                out, into, height, width = weight.shape
                weight.copy_(matrix.view(out, height, width, into).permute(0, 3, 1, 2))

    @staticmethod
    def _matrix(weight: Tensor) -> Tensor:
        return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1).contiguous()


def train_codec(
    codec: VQModel,
    part: str,
    budget: Budget,
    batch: int = 8,
    rate: float = 3e-3,
    seed: int = 0,
) -> None:
    """Train one of PARTS until the budget is used; the other part and the code book stay as they are.

    Args:
        codec: trained in place.
        part: decoder or encoder.
        budget: how long.
        batch: pictures per step.
        rate: peak learning rate of the convolutions; all else gets 2e-3.
        seed: of pictures and noise.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    codec.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    modules = {"decoder": [codec.post_quant_conv, codec.decoder], "encoder": [codec.encoder, codec.quant_conv]}[part]
    weights = [w for module in modules for w in module.parameters()]
    # Matrices of three rows (the picture's colours) have no directions to balance.
    wide = [w for w in weights if w.ndim == 4 and min(w.shape[0], w[0].numel()) > 3]
    chosen = {id(w) for w in wide}
    convolutions = ConvMuon(wide, rate)
    others = torch.optim.AdamW(
        [w for w in weights if id(w) not in chosen], lr=2e-3, betas=(0.9, 0.98), weight_decay=1e-4
    )
    groups = [*convolutions.muon.param_groups, *others.param_groups]
    peaks = [group["lr"] for group in groups]
    step = 0
    while (progress := budget.progress(step * batch)) < 1:
        factor = min(1, (step + 1) / 30) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * progress))
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * factor
        pictures, codes = pictures_and_codes(batch, rng)
        loss = PARTS[part](codec, pictures.contiguous(memory_format=torch.channels_last), codes)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        convolutions.step()
        others.step()
        for weight in weights:
            weight.grad = None
        step += 1
        if step % 50 == 0:
            log.info("%s step %d: loss %.4f", part, step, loss.item())


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
    painted = [picture for part in codes.split(20) for picture in decode_pictures(codec, part)]
    truth = np.stack([render(scene) for scene in scenes])
    with torch.no_grad():
        pictures = torch.from_numpy(truth).permute(0, 3, 1, 2).contiguous()
        read = torch.cat([codec.nearest_codes(codec.encode(part.float() / 255)) for part in pictures.split(20)])
    error = np.mean((np.stack(painted).astype(np.float64) - truth) ** 2)
    edges = codes >= FLAT
    return {
        "decoded scenes right": float(np.mean([check(p, s).passed for p, s in zip(painted, scenes, strict=True)])),
        "PSNR of decoded scenes, dB": float(10 * np.log10(255**2 / error)),
        "cells read right": float((read == codes).float().mean()),
        "edge cells read right": float((read == codes)[edges].float().mean()),
    }
