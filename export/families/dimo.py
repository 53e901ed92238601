"""Components of DiMO: Meissonic distilled to one forward pass (Zhu et al. 2025, arXiv 2503.15457).

Published is a transformer alone, with Meissonic's keys; text tower, codec and tokenizer are Meissonic's. It differs in
what it is given, cells that are mixed with noise, and in how often: once, so nothing has to be left out of a loop.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import onnx_ir as ir
import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone gives it
from torch import Tensor

from pochade.errors import UsageError
from pochade.export.checkpoint import empty
from pochade.export.component import ComponentPlan
from pochade.export.families.meissonic import DenoiseStep, Meissonic, embedded_codes
from pochade.export.sampler import build_one_step_sampler

REVISION = 1
"""Of component and tensor names; pochade.runtime.families.dimo agrees on it."""

MASK_RATIO = 0.6
"""Share of the cells that begin as the mask, as in the published sampling script."""

NOISE_SCALE = 0.1
"""Share of noise in the embedded cells, as in the published sampling script; the variance stays what it was."""


class OneStep(DenoiseStep):
    """Token grid and noise to what the last linear layer sees of every cell."""

    def forward(  # type: ignore[override]
        self, tokens: Tensor, noise: Tensor, context: Tensor, modulation: Tensor
    ) -> Tensor:
        """Features (batch, height * width, dim) float32 of a token grid (batch, height, width) int64.

        `noise` (batch, height, width, dim) is standard normal; `modulation` (1, batch, rows, dim) is of one step. The
        table holds cells that make room for noise, but not the norm in front of the down-sampler: it sees the noise.
        """
        cells = F.embedding(tokens, self.cell_table) + NOISE_SCALE * noise.to(self.cell_table.dtype)
        if self.config.downsample:
            down: Any = self.down_block["downsample"]
            cells = down.norm(cells)
        return self.cells_to_features(cells, context, modulation.squeeze(0))


class Dimo(Meissonic):
    """A Meissonic checkpoint whose transformer is DiMO's."""

    revision: ClassVar[int] = REVISION

    @classmethod
    def open(cls, path: Path, text_encoder: Path | None = None, transformer: Path | None = None) -> Self:
        """As `Meissonic.open`.

        Raises:
            InputRefusedError: as there.
            UsageError: no transformer is named; the one in Meissonic's folder is not meant.
        """
        if transformer is None:
            raise UsageError("DiMO is published as a transformer alone; name its folder with --transformer")
        return super().open(path, text_encoder, transformer)

    def plans(self, dtype: torch.dtype) -> Iterator[ComponentPlan]:
        """Components that are traced from a module."""
        for plan in super().plans(dtype):
            yield self._one_step(plan, dtype) if plan.name == "transformer" else plan

    def scheduler_manifest(self) -> dict[str, Any]:
        """What the runtime's one step needs to know."""
        return {
            "type": "one_step",
            "mask_token_id": self.scheduler["mask_token_id"],
            "mask_ratio": MASK_RATIO,
            "codebook_size": self.transformer.codebook_size,
            "codec_factor": self.codec.factor,
            "patch": self.transformer.patch,
        }

    def _sampler(self) -> ir.Model:
        config, weights = self.transformer, self.transformer_weights
        return build_one_step_sampler(config.dim, config.codebook_size, lambda: weights["mlm_layer.conv2.weight"])

    def _one_step(self, plan: ComponentPlan, dtype: torch.dtype) -> ComponentPlan:
        """Meissonic's transformer, changed in its first layers."""
        config = self.transformer
        tokens = plan.inputs["tokens"]
        rows = plan.inputs["modulation"][:1]

        def cell_table() -> Tensor:
            return math.sqrt(1 - NOISE_SCALE**2) * embedded_codes(self.transformer_weights)

        return replace(
            plan,
            module=empty(OneStep, config, dtype),
            inputs={
                "tokens": tokens,
                "noise": torch.zeros(*tokens.shape, config.dim),
                "context": plan.inputs["context"],
                "modulation": rows,
            },
            dynamic={
                "tokens": plan.dynamic["tokens"],
                "noise": plan.dynamic["tokens"],
                "context": plan.dynamic["context"],
                "modulation": {1: plan.dynamic["modulation"][1]},
            },
            axes={
                "tokens": plan.axes["tokens"],
                "noise": (*plan.axes["tokens"], config.dim),
                "context": plan.axes["context"],
                "modulation": (1, *plan.axes["modulation"][1:]),
                "features": plan.axes["features"],
            },
            weights={**plan.weights, "cell_table": cell_table},
        )
