"""Whole runs of the reference pipelines of HunyuanDiT, on our noise, positions and sizes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from numpy.typing import NDArray
from transformers import BertTokenizer, T5Tokenizer

from pochade.runtime.rng import PhiloxGaussianNoise
from tests import hunyuan, hunyuan_checkpoint, text_models

SCHEDULERS: dict[str, Any] = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpm-solver": DPMSolverMultistepScheduler,
}
PROMPT, NEGATIVE = "  一只红色的狐狸 in the snow ", "worst quality"


class GivenNoise:
    """A generator's place in the reference, handing out our noise."""

    def __init__(self, noise: PhiloxGaussianNoise, shape: tuple[int, ...]) -> None:
        self._noise, self._shape, self.steps = noise, shape, 0

    def __call__(self, *_: Any, **__: Any) -> torch.Tensor:
        self.steps += 1
        return torch.from_numpy(self._noise.step(0, self.steps - 1, self._shape))


class Cut:
    """`set_timesteps` of a reference scheduler, without the first steps."""

    def __init__(self, scheduler: Any, first: int) -> None:
        self._scheduler, self._set, self._first = scheduler, scheduler.set_timesteps, first

    def __call__(self, *given: Any, **named: Any) -> None:
        self._set(*given, **named)
        self._scheduler.timesteps = self._scheduler.timesteps[self._first :]


def reference(
    checkpoint: Path,
    version: str,
    sampler: str,
    size: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
    begun: tuple[int, NDArray[np.float32]] | None = None,
    nets: Sequence[Any] = (),
    **given: Any,
) -> NDArray[np.float32]:
    """Latents that diffusers ends with; positions and sizes told as in training (docs/families.md).

    `begun` is the first step to be taken and the latents before it; all steps and noise without. With ControlNets
    among `nets`, what they look at is the mean of its posterior rather than a draw from it.
    """
    import diffusers.pipelines.controlnet_hunyuandit.pipeline_hunyuandit_controlnet as controlled
    import diffusers.pipelines.hunyuandit.pipeline_hunyuandit as plain
    import diffusers.schedulers.scheduling_ddpm as ddpm

    module: Any = controlled if nets else plain

    width, height = size
    shape = (1, 4, height // 8, width // 8)
    noise = PhiloxGaussianNoise(3)
    monkeypatch.setattr(ddpm, "randn_tensor", GivenNoise(noise, shape))
    monkeypatch.setattr(module, "get_2d_rotary_pos_embed", lambda *_, **__: rope(height // 8, width // 8))
    config = json.loads((checkpoint / "scheduler" / "scheduler_config.json").read_text())
    scheduler = SCHEDULERS[sampler].from_config(config)
    first, latents = begun or (0, noise.start(0, shape))
    monkeypatch.setattr(scheduler, "set_timesteps", Cut(scheduler, first))
    kind: Any = plain.HunyuanDiTPipeline
    parts: dict[str, Any] = {}
    if nets:
        monkeypatch.setattr(DiagonalGaussianDistribution, "sample", DiagonalGaussianDistribution.mode)
        kind = controlled.HunyuanDiTControlNetPipeline
        parts["controlnet"] = nets[0] if len(nets) == 1 else list(nets)
    pipeline = kind(
        vae=hunyuan_checkpoint.vae(),
        text_encoder=text_models.bert(),
        tokenizer=BertTokenizer.from_pretrained(checkpoint / "tokenizer"),
        transformer=hunyuan.transformer(version),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=text_models.t5_encoder(text_models.mt5()),
        tokenizer_2=T5Tokenizer.from_pretrained(checkpoint / "tokenizer_2", extra_ids=0),
        **parts,
    )
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        height=height,
        width=width,
        target_size=(width, height),
        latents=torch.from_numpy(latents),
        use_resolution_binning=False,
        output_type="latent",
        **given,
    ).images
    return np.asarray(images)


def rope(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference's network takes angles: each of them for two channels."""
    cos, sin = hunyuan.tables(height, width)
    return cos.repeat_interleave(2, dim=1), sin.repeat_interleave(2, dim=1)
