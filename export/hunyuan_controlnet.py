"""Components of a ControlNet of HunyuanDiT: `condition`, before the loop, and `controlnet`, one step of it.

Several nets are a chain: each adds to the `controls` that it is given, and the transformer takes the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pochade.export.checkpoint import Tensors, empty
from pochade.export.component import ComponentPlan
from pochade.export.hunyuan_components import Condition, condition_plan, no_controls, patch_in, step_ports, stored
from pochade.export.modules.hunyuan_controlnet import ControlNet, ControlNetConfig
from pochade.export.modules.hunyuan_dit import HunyuanConfig
from pochade.export.modules.ops import add_broadcast


class ControlNetCondition(Condition, ControlNet):
    """What depends on the prompt and the time alone."""


class ControlNetStep(ControlNet):
    """Latents and those of a control picture to what the transformer adds to its skips."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__(config)
        self.patch_in = nn.Linear(config.in_channels * config.patch_size**2, config.dim)

    def forward(
        self,
        latent: Tensor,
        control: Tensor,
        context: Tensor,
        modulation: Tensor,
        step: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        controls: Tensor,
        scale: Tensor,
    ) -> Tensor:
        """`controls`, (skips, batch, cells, dim) float32, plus `scale` (1) times this net's.

        `latent` and `control` are (batch, channels, height, width) float32; `step` (1) picks from the modulation.
        """
        dtype = self.patch_in.weight.dtype
        rows, words, rope = (
            modulation.index_select(0, step).squeeze(0).to(dtype),
            context.to(dtype),
            (rope_cos, rope_sin),
        )
        x = self.patch_in(self.cut(latent).to(dtype))
        x = x + self.input_block(self.patch_in(self.cut(control).to(dtype)))
        sums = []
        for i, (block, last) in enumerate(zip(self.blocks, self.controlnet_blocks, strict=True)):
            x = block(x, words, rows[:, i : i + 1], rope)
            sums.append(add_broadcast(last(x).float() * scale, controls[i]))
        return torch.stack(sums)


def controlnet_plans(config: ControlNetConfig, weights: Tensors, dtype: torch.dtype) -> tuple[ComponentPlan, ...]:
    """Both components; `controlnet` computes in `dtype`."""
    module = empty(ControlNetStep, config, dtype)
    inputs, dynamic, axes = step_ports(config, "control")
    step = ComponentPlan(
        name="controlnet",
        module=module,
        inputs=inputs | {"scale": torch.ones(1)},
        dynamic=dynamic,
        axes=axes | {"scale": (1,), "sums": (config.num_skips, "batch", "cells", config.dim)},
        outputs=("sums",),
        weights=stored(module, weights) | patch_in(weights),
        defaults=no_controls(config),
    )
    return condition_plan(config, weights, ControlNetCondition), step
