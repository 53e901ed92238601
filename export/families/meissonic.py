"""Components of Meissonic and Monetico, from the published checkpoint layout.

What the loop does not change is computed before it: the token embedding, its norm and its convolution become one
table, two linear maps without anything between them become one, and everything that depends on the step number
and the prompt alone is a component of its own (`condition`). None of this changes a result beyond rounding
(docs/families.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import onnx_ir as ir
import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone gives it
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.export import Dim

from pochade.errors import InputRefusedError
from pochade.export.checkpoint import Checkpoint, TensorFolder, empty, parse_config
from pochade.export.clip_tokenizer import clip_tokenizer
from pochade.export.codec_graphs import decoder_layer_bytes
from pochade.export.component import ComponentPlan, WeightSource
from pochade.export.modules.clip_text import ClipTextConfig, ClipTextEncoder
from pochade.export.modules.masked_transformer import EPS, MICRO_CONDS, MaskedTransformer, TransformerConfig
from pochade.export.modules.ops import rms_norm
from pochade.export.modules.vq import VqConfig, VQModel
from pochade.export.sampler import build_sampler
from pochade.export.trace import build
from pochade.export.vq_graphs import build_vq_decoder, build_vq_encoder

REVISION = 3
"""Of component and tensor names; pochade.runtime.families.meissonic agrees on it."""

PARTS = ("transformer", "vqvae", "text_encoder", "tokenizer", "scheduler")

FOREIGN_TEXT_KEYS = ("vision_model.", "visual_projection.", "logit_scale", "text_model.embeddings.position_ids")
"""What a whole CLIP file or one written by an old library version holds beside the text tower."""


class Condition(MaskedTransformer):
    """Everything that depends on the prompt and the step number alone, always in float32."""

    def forward(  # type: ignore[override]
        self, text_states: Tensor, pooled: Tensor, micro_conds: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Text stream (batch, text tokens, dim) and modulation (timesteps, batch, rows, dim)."""
        steps, batch = timesteps.shape[0], pooled.shape[0]
        every_step = timesteps[:, None].expand(-1, batch).flatten()
        temb = self.condition(pooled.repeat(steps, 1), micro_conds.repeat(steps, 1), every_step)
        return self.context(text_states), self.modulation(temb).unflatten(0, (steps, batch))


class DenoiseStep(MaskedTransformer):
    """Token grid to what the last linear layer sees of every cell."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        dim, patch = config.dim, config.patch
        self.cell_table = nn.Parameter(torch.empty(config.vocab_size, dim))
        if patch == 2:
            self.down_kernel = nn.Parameter(torch.empty(dim, 4 * dim))
        self.head_kernel = nn.Parameter(torch.empty(patch * patch * dim, dim))

    def forward(  # type: ignore[override]
        self, tokens: Tensor, context: Tensor, modulation: Tensor, step: Tensor
    ) -> Tensor:
        """Features (batch, height * width, dim) float32 of a token grid (batch, height, width) int64.

        `step` (1) picks from the modulation of all steps, which therefore never has to move between steps.
        """
        rows = modulation.index_select(0, step).squeeze(0)
        return self.cells_to_features(F.embedding(tokens, self.cell_table), context, rows)

    def cells_to_features(self, cells: Tensor, context: Tensor, rows: Tensor) -> Tensor:
        """Features (batch, height * width, dim) float32 of cells (batch, height, width, dim), ready to be merged.

        `rows` (batch, rows, dim) is the modulation of this step.
        """
        patch, dtype = self.config.patch, self.cell_table.dtype
        height, width = cells.shape[1] // patch, cells.shape[2] // patch
        if patch == 2:
            cells = self.merge_cells(cells, self.down_kernel)
        x = self.project_to_hidden(self.project_to_hidden_norm(cells.flatten(1, 2)))
        rope = self.rope(context.shape[1], height, width)
        x = self.project_from_hidden_norm(self.blocks(x, context.to(dtype), rows.to(dtype), rope))
        if patch == 2:
            x = self.project_from_hidden(x).unflatten(1, (height, width))
            up: Any = self.up_block["upsample"]
            x = self.split_cells(up.norm(x), self.head_kernel).flatten(1, 2)
        else:
            x = F.linear(x, self.head_kernel)
        return self.mlm_layer.layer_norm(x).float()


def embedded_codes(source: TensorFolder) -> Tensor:
    """Every row of the token embedding after its norm and its convolution, (vocab_size, dim) float32."""
    gain = source["embed.layer_norm.weight"].float()
    rows = rms_norm(source["embed.embeddings.weight"].float(), gain, EPS)
    return F.linear(rows, source["embed.conv.weight"].float().flatten(1))


def folded_weights(source: TensorFolder, config: TransformerConfig) -> dict[str, WeightSource]:
    """The weights that `DenoiseStep` has beyond the published ones, computed in float32 (spec section 15)."""

    def get(key: str) -> Tensor:
        return source[key].float()

    def cell_table() -> Tensor:
        rows = embedded_codes(source)
        return rms_norm(rows, get("down_block.downsample.norm.weight"), EPS) if config.downsample else rows

    def down_kernel() -> Tensor:
        return get("down_block.downsample.conv.weight").permute(0, 2, 3, 1).flatten(1)

    def head_kernel() -> Tensor:
        conv1 = get("mlm_layer.conv1.weight").flatten(1)
        if not config.upsample:
            return conv1 @ get("project_from_hidden.weight")
        up = get("up_block.upsample.conv.weight").permute(2, 3, 1, 0)  # row, column, out, in
        return (conv1 @ up).flatten(0, 2)

    return {"cell_table": cell_table, "down_kernel": down_kernel, "head_kernel": head_kernel}


class TextEncoder(ClipTextEncoder):
    """Text tower with float32 results in every weight precision."""

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Penultimate states (batch, tokens, hidden) and pooled vector (batch, projection_dim), float32."""
        states, pooled = super().forward(input_ids)
        return states.float(), pooled.float()


@dataclass(frozen=True)
class Meissonic:
    """An opened checkpoint, checked as a whole before anything is written."""

    transformer: TransformerConfig
    text: ClipTextConfig
    codec: VqConfig
    scheduler: dict[str, Any]
    transformer_weights: TensorFolder
    text_weights: TensorFolder
    codec_weights: TensorFolder
    tokenizer_folder: Path

    @classmethod
    def open(cls, path: Path, text_encoder: Path | None = None, transformer: Path | None = None) -> Self:
        """Read the configs and compare every tensor's name and shape with what the modules expect.

        Args:
            path: checkpoint folder in the published layout.
            text_encoder: folder of another CLIP text tower of the same width, e.g. the original LAION one that
                Meissonic's own scripts prefer.
            transformer: folder of another transformer for the same codec and text tower, e.g. one trained on.

        Raises:
            InputRefusedError: every fault found in the first part that has any.
        """
        elsewhere = {"text_encoder": text_encoder, "transformer": transformer}
        checkpoint = Checkpoint.open(path, [part for part in PARTS if elsewhere.get(part) is None])
        text_folder = text_encoder or path / "text_encoder"
        transformer_folder = transformer or path / "transformer"
        text = parse_config(ClipTextConfig, text_folder / "config.json")
        codec = parse_config(VqConfig, path / "vqvae" / "config.json")
        self = cls(
            parse_config(TransformerConfig, transformer_folder / "config.json"),
            text,
            codec,
            checkpoint.json("scheduler/scheduler_config.json"),
            TensorFolder(transformer_folder),
            TensorFolder(text_folder),
            TensorFolder(path / "vqvae"),
            path / "tokenizer",
        )
        self._check(path)
        return self

    def _check(self, path: Path) -> None:
        pairs = (
            ("text states are {} wide", self.text.hidden_size, self.transformer.joint_attention_dim),
            ("pooled text is {} wide", self.text.projection_dim, self.transformer.pooled_projection_dim),
            ("the codec has {} codes", self.codec.num_vq_embeddings, self.transformer.codebook_size),
        )
        faults = [f"{what.format(has)}, the transformer takes {takes}" for what, has, takes in pairs if has != takes]
        mask = self.scheduler.get("mask_token_id")
        if not isinstance(mask, int) or not self.transformer.codebook_size <= mask < self.transformer.vocab_size:
            faults.append(f"scheduler mask_token_id {mask!r} is no row of the token embedding beyond the code book")
        if self.scheduler.get("masking_schedule") not in ("cosine", "linear"):
            faults.append(f"masking_schedule {self.scheduler.get('masking_schedule')!r} is neither cosine nor linear")
        if faults:
            raise InputRefusedError(str(path), faults)
        self.transformer_weights.check(empty(MaskedTransformer, self.transformer))
        self.text_weights.check(empty(ClipTextEncoder, self.text), FOREIGN_TEXT_KEYS)
        self.codec_weights.check(empty(VQModel, self.codec))

    revision: ClassVar[int] = REVISION
    lora_components: ClassVar[tuple[str, ...]] = ("text_encoder", "condition", "transformer")
    half_components: ClassVar[tuple[str, ...]] = ("text_encoder", "transformer")
    task: ClassVar[str] = "text-to-image"

    def graphs(self, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], ir.Model]]]:
        """Name and builder of every component; text encoder and transformer compute in `dtype`, others in float32."""
        for plan in self.plans(dtype):
            yield plan.name, partial(build, plan)
        yield "sampler", self._sampler
        yield "vq_decoder", self._vq_decoder
        yield "vq_encoder", self._vq_encoder

    def plans(self, dtype: torch.dtype) -> Iterator[ComponentPlan]:
        """Components that are traced from a module."""
        yield self._text_encoder(dtype)
        yield self._condition()
        yield self._transformer(dtype)

    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the checkpoint, also where another text encoder is used."""
        return clip_tokenizer(self.tokenizer_folder, self.text.max_position_embeddings)

    def more_tokenizers(self) -> dict[str, Tokenizer]:
        """None: there is one text encoder."""
        return {}

    def scheduler_manifest(self) -> dict[str, Any]:
        """What the runtime's loop needs to know."""
        return {
            "type": "masked",
            "mask_token_id": self.scheduler["mask_token_id"],
            "masking_schedule": self.scheduler["masking_schedule"],
            "codec_factor": self.codec.factor,
            "patch": self.transformer.patch,
        }

    def layer_bytes(self, component: str) -> dict[str, int]:
        """Bytes per pixel of the layers that a component keeps, for the memory plan."""
        return decoder_layer_bytes(self.codec) if component == "vq_decoder" else {}

    def _sampler(self) -> ir.Model:
        config, weights = self.transformer, self.transformer_weights
        mask = int(self.scheduler["mask_token_id"])
        return build_sampler(config.dim, config.codebook_size, mask, lambda: weights["mlm_layer.conv2.weight"])

    def _text_encoder(self, dtype: torch.dtype) -> ComponentPlan:
        module, tokens = empty(TextEncoder, self.text, dtype), self.text.max_position_embeddings
        return ComponentPlan(
            name="text_encoder",
            module=module,
            inputs={"input_ids": torch.zeros(2, tokens, dtype=torch.int64)},
            dynamic={"input_ids": {0: Dim("batch", max=1024)}},
            axes={
                "input_ids": ("batch", tokens),
                "text_states": ("batch", tokens, self.text.hidden_size),
                "pooled": ("batch", self.text.projection_dim),
            },
            outputs=("text_states", "pooled"),
            weights=_stored(module, self.text_weights),
        )

    def _condition(self) -> ComponentPlan:
        config, tokens = self.transformer, self.text.max_position_embeddings
        module = empty(Condition, config)
        batch = Dim("batch", max=1024)
        shapes = {
            "text_states": (2, tokens, config.joint_attention_dim),
            "pooled": (2, config.pooled_projection_dim),
            "micro_conds": (2, MICRO_CONDS),
            "timesteps": (3,),
        }
        return ComponentPlan(
            name="condition",
            module=module,
            inputs={name: torch.zeros(shape) for name, shape in shapes.items()},
            dynamic={name: {0: batch} for name in shapes if name != "timesteps"}
            | {"timesteps": {0: Dim("steps", max=4096)}},
            axes={name: ("steps" if name == "timesteps" else "batch", *shape[1:]) for name, shape in shapes.items()}
            | {
                "context": ("batch", tokens, config.dim),
                "modulation": ("steps", "batch", config.modulation_rows, config.dim),
            },
            outputs=("context", "modulation"),
            weights=_stored(module, self.transformer_weights),
        )

    def _transformer(self, dtype: torch.dtype) -> ComponentPlan:
        config, tokens = self.transformer, self.text.max_position_embeddings
        module = empty(DenoiseStep, config, dtype)
        batch, height, width = Dim("batch", max=1024), Dim("grid_height", max=512), Dim("grid_width", max=512)
        patch = config.patch
        return ComponentPlan(
            name="transformer",
            module=module,
            inputs={
                "tokens": torch.zeros(2, 4 * patch, 6 * patch, dtype=torch.int64),
                "context": torch.zeros(2, tokens, config.dim),
                "modulation": torch.zeros(3, 2, config.modulation_rows, config.dim),
                "step": torch.zeros(1, dtype=torch.int64),
            },
            dynamic={
                "tokens": {0: batch, 1: patch * height, 2: patch * width},
                "context": {0: batch},
                "modulation": {0: Dim("steps", max=4096), 1: batch},
            },
            axes={
                "tokens": ("batch", "height", "width"),
                "context": ("batch", tokens, config.dim),
                "modulation": ("steps", "batch", config.modulation_rows, config.dim),
                "step": (1,),
                "features": ("batch", "cells", config.dim),
            },
            outputs=("features",),
            weights=_stored(module, self.transformer_weights) | folded_weights(self.transformer_weights, config),
        )

    def _vq_decoder(self) -> ir.Model:
        source = self.codec_weights

        def code_table() -> Tensor:
            kernel = source["post_quant_conv.weight"].float().flatten(1)
            return F.linear(source["quantize.embedding.weight"].float(), kernel, source["post_quant_conv.bias"].float())

        shape = torch.Size((self.codec.num_vq_embeddings, self.codec.latent_channels))
        return build_vq_decoder(self.codec, *self._codec({"code_table": (shape, code_table)}))

    def _vq_encoder(self) -> ir.Model:
        source = self.codec_weights

        def codes() -> Tensor:
            return source["quantize.embedding.weight"].float()

        # |e - (Wx + b)|^2 is x . (-2 W^T e) + |e|^2 - 2 b . e and a term that all codes share.
        def code_kernel() -> Tensor:
            return -2 * source["quant_conv.weight"].float().flatten(1).T @ codes().T

        def code_bias() -> Tensor:
            return codes().square().sum(-1) - 2 * codes() @ source["quant_conv.bias"].float()

        count = self.codec.num_vq_embeddings
        folded = {
            "code_kernel": (torch.Size((self.codec.latent_channels, count)), code_kernel),
            "code_bias": (torch.Size((count,)), code_bias),
        }
        return build_vq_encoder(self.codec, *self._codec(folded))

    def _codec(
        self, folded: dict[str, tuple[torch.Size, WeightSource]]
    ) -> tuple[dict[str, torch.Size], Callable[[str], Tensor]]:
        """Shapes of the codec's weights and what reads one, folded ones included."""
        shapes = {name: value.shape for name, value in empty(VQModel, self.codec).state_dict().items()}
        shapes |= {name: shape for name, (shape, _) in folded.items()}
        return shapes, lambda name: folded[name][1]() if name in folded else self.codec_weights[name]


def _stored(module: nn.Module, source: TensorFolder) -> dict[str, WeightSource]:
    """A source for each parameter of `module` that the checkpoint holds under the same name."""

    def reader(key: str) -> Callable[[], Tensor]:
        return lambda: source[key]

    return {name: reader(name) for name, _ in module.named_parameters() if name in source.keys()}  # noqa: SIM118
