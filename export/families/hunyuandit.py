"""Components of HunyuanDiT 1.0, 1.1, 1.2 and their distilled forms, from either published layout.

Which version a checkpoint is of is told by its weights: up to 1.1 there is an embedding of styles. Distilled weights
cannot be told from others, and run alike with fewer steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir
import torch
from tokenizers import Tokenizer

from pochade.errors import InputRefusedError, UsageError
from pochade.export.bert_tokenizer import bert_tokenizer
from pochade.export.checkpoint import TensorFolder, Tensors, empty, parse_config
from pochade.export.codec_graphs import decoder_layer_bytes
from pochade.export.component import ComponentPlan
from pochade.export.diffusion_sampler import build_diffusion_sampler
from pochade.export.hunyuan_components import condition_plan, transformer_plan
from pochade.export.hunyuan_layouts import SCHEDULE, Layout
from pochade.export.modules.hunyuan_dit import HunyuanDiT as Network
from pochade.export.modules.vae import AutoencoderKL, VaeConfig
from pochade.export.sentencepiece_tokenizer import sentencepiece_tokenizer
from pochade.export.text_components import BertPart, T5Part
from pochade.export.trace import build
from pochade.export.vae_graphs import build_vae_decoder, build_vae_encoder
from pochade.runtime.hunyuan_grid import BASE, BINS, THETA

REVISION = 2
"""Of component and tensor names; pochade.runtime.families.hunyuandit agrees on it."""


@dataclass(frozen=True)
class HunyuanDiT:
    """An opened checkpoint, checked as a whole before anything is written."""

    layout: Layout
    bert: BertPart
    t5: T5Part
    codec: VaeConfig
    codec_weights: Tensors

    revision: ClassVar[int] = REVISION
    lora_components: ClassVar[tuple[str, ...]] = ("text_encoder", "condition", "transformer")
    half_components: ClassVar[tuple[str, ...]] = ("text_encoder", "transformer")
    task: ClassVar[str] = "text-to-image"

    @classmethod
    def open(cls, path: Path, text_encoder: Path | None = None, transformer: Path | None = None) -> HunyuanDiT:
        """Read the configs and compare every tensor's name and shape with what the modules expect.

        Args:
            path: checkpoint folder in a published layout.
            text_encoder: no other one can be taken.
            transformer: no other one can be taken.

        Raises:
            InputRefusedError: every fault found in the first part that has any.
            UsageError: another text encoder or transformer is asked for.
        """
        if text_encoder is not None:
            raise UsageError("HunyuanDiT takes no other text encoder: it was trained with its own two")
        if transformer is not None:
            raise UsageError("HunyuanDiT takes its transformer from the checkpoint; leave --transformer away")
        layout = Layout.open(path)
        codec = parse_config(VaeConfig, layout.vae / "config.json")
        bert, t5 = BertPart.open(layout.text_encoder, layout.config.text_len), T5Part.open(layout.text_encoder_2)
        self = cls(layout, bert, t5, codec, TensorFolder(layout.vae, pickles=True))
        self._check(path)
        return self

    def _check(self, path: Path) -> None:
        config = self.layout.config
        pairs = (
            ("BERT's states are {} wide", self.bert.config.hidden_size, config.cross_attention_dim),
            ("T5's states are {} wide", self.t5.config.d_model, config.cross_attention_dim_t5),
            ("the codec has {} channels", self.codec.latent_channels, config.in_channels),
        )
        faults = [f"{what.format(has)}, the transformer takes {takes}" for what, has, takes in pairs if has != takes]
        for name, expected in SCHEDULE.items():
            found = self.layout.schedule.get(name)
            if name in ("beta_schedule", "prediction_type", "timestep_spacing") and found != expected:
                faults.append(f"scheduler {name} is {found!r}, not {expected!r}")
        for name in ("beta_start", "beta_end"):
            found = self.layout.schedule.get(name)
            if not isinstance(found, float) or not 0 < found < 1:
                faults.append(f"scheduler {name} {found!r} is no number between 0 and 1")
        if faults:
            raise InputRefusedError(str(path), faults)
        self.layout.weights.check(empty(Network, config))
        self.codec_weights.check(empty(AutoencoderKL, self.codec))
        self.tokenizer()
        self.more_tokenizers()

    def graphs(self, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], ir.Model]]]:
        """Name and builder of every component; BERT and the transformer compute in `dtype`, others in float32."""
        for plan in self.plans(dtype):
            yield plan.name, partial(build, plan)
        yield "sampler", lambda: build_diffusion_sampler(self.layout.config.in_channels)
        yield "vae_decoder", lambda: build_vae_decoder(self.codec, self.codec_weights.__getitem__)
        yield "vae_encoder", lambda: build_vae_encoder(self.codec, self.codec_weights.__getitem__)

    def plans(self, dtype: torch.dtype) -> Iterator[ComponentPlan]:
        """Components that are traced from a module."""
        config, weights = self.layout.config, self.layout.weights
        yield self.bert.plan(dtype, config.text_len)
        yield self.t5.plan(config.text_len_t5)
        yield condition_plan(config, weights)
        yield transformer_plan(config, weights, dtype)

    def tokenizer(self) -> Tokenizer:
        """BERT's."""
        return bert_tokenizer(self.layout.tokenizer, self.layout.config.text_len)

    def more_tokenizers(self) -> dict[str, Tokenizer]:
        """T5's."""
        return {"text_encoder_2": sentencepiece_tokenizer(self.layout.spiece, self.layout.config.text_len_t5)}

    def scheduler_manifest(self) -> dict[str, Any]:
        """What the runtime's loop needs to know."""
        config, schedule = self.layout.config, self.layout.schedule
        return {
            "type": "hunyuandit",
            **{name: schedule.get(name, value) for name, value in SCHEDULE.items()},
            "beta_end": schedule["beta_end"],
            "codec_factor": self.codec.factor,
            "patch": config.patch_size,
            "scaling_factor": self.codec.scaling_factor,
            "takes_sizes": config.use_style_cond_and_image_meta_size,
            "rope": {"base": BASE, "theta": THETA},
            "resolutions": [[list(shape), [list(size) for size in sizes]] for shape, sizes in BINS],
        }

    def layer_bytes(self, component: str) -> dict[str, int]:
        """Bytes per pixel of the layers that a component keeps, for the memory plan."""
        if component == "vae_encoder":
            # The input of the first residual block, and what its two convolutions give.
            return {"per_pixel": 4 * 3 * self.codec.block_out_channels[0]}
        return decoder_layer_bytes(self.codec) if component == "vae_decoder" else {}
