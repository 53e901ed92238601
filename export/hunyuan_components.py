"""Components of HunyuanDiT's transformer: what is computed before the loop, and one step of it.

`condition` holds all that depends on time and prompt alone, the modulation of every block included, so that its
weights (169 of 1500 million) are not in memory while the loop runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone gives it
from torch import Tensor, nn
from torch.export import Dim

from pochade.export.checkpoint import Tensors, empty
from pochade.export.component import ComponentPlan, WeightSource
from pochade.export.modules.hunyuan_dit import META_SIZES, HunyuanConfig, HunyuanDiT, HunyuanNetwork
from pochade.export.modules.masked_transformer import SINUSOID_DIM, sinusoid

STYLE = 0
"""The only style that was ever trained."""

CONTROL_AXES = ("control_batch", "control_cells", "control_dim")
"""Of the transformer's input `controls`: those of its tokens, or 1 where there is no ControlNet."""


class Condition(HunyuanNetwork):
    """Everything that depends on the prompt and the time alone, always in float32."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__(config)
        sizes = META_SIZES * SINUSOID_DIM if config.use_style_cond_and_image_meta_size else 0
        # The style is a constant and therefore part of the bias.
        self.extra_in = nn.Linear(config.pooled_projection_dim + sizes, 4 * config.dim)

    def forward(
        self,
        text_states: Tensor,
        text_mask: Tensor,
        text_states_2: Tensor,
        text_mask_2: Tensor,
        timesteps: Tensor,
        image_meta_size: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Text tokens (batch, tokens, width) and modulation (timesteps, batch, rows, dim)."""
        embed = self.time_extra_emb
        told = embed.pooler(text_states_2)
        if image_meta_size is not None:
            told = torch.cat((told, sinusoid(image_meta_size).flatten(1)[:, None]), dim=-1)
        extra = embed.extra_embedder.linear_2(F.silu(self.extra_in(told)))
        context = self.context(text_states, text_mask, text_states_2, text_mask_2)
        return context, self.modulation(timesteps, extra)


class DiTCondition(Condition, HunyuanDiT):  # type: ignore[misc]
    """The transformer's."""


class DenoiseStep(HunyuanDiT):
    """Latents to the prediction of v."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__(config)
        width = config.in_channels * config.patch_size**2
        self.patch_in, self.patch_out = nn.Linear(width, config.dim), nn.Linear(config.dim, width)

    def forward(  # type: ignore[override]
        self,
        latent: Tensor,
        context: Tensor,
        modulation: Tensor,
        step: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        controls: Tensor | None = None,
    ) -> Tensor:
        """Prediction of v for latents, both (batch, channels, height, width) float32.

        `step` (1) picks from the modulation of all steps, which therefore never has to move between steps. `controls`
        is what ControlNets add to the skips, (skips, batch, cells, dim) float32.
        """
        dtype = self.patch_in.weight.dtype
        rows = modulation.index_select(0, step).squeeze(0).to(dtype)
        x = self.patch_in(self.cut(latent).to(dtype))
        x = self.patch_out(self.hidden(x, context.to(dtype), rows, (rope_cos, rope_sin), controls))
        return self.join(x, *latent.shape[-2:]).float()


def condition_plan(config: HunyuanConfig, weights: Tensors, network: type[Condition] = DiTCondition) -> ComponentPlan:
    """Component `condition` of a network; takes `image_meta_size` where the version does."""
    module = empty(network, config)
    batch = Dim("batch", max=1024)
    shapes = {
        "text_states": (2, config.text_len, config.cross_attention_dim),
        "text_mask": (2, config.text_len),
        "text_states_2": (2, config.text_len_t5, config.cross_attention_dim_t5),
        "text_mask_2": (2, config.text_len_t5),
        "timesteps": (3,),
    }
    if config.use_style_cond_and_image_meta_size:
        shapes["image_meta_size"] = (2, META_SIZES)
    return ComponentPlan(
        name="condition",
        module=module,
        inputs={
            name: torch.zeros(shape, dtype=torch.int64 if "mask" in name else torch.float32)
            for name, shape in shapes.items()
        },
        dynamic={name: {0: batch} for name in shapes if name != "timesteps"}
        | {"timesteps": {0: Dim("steps", max=4096)}},
        axes={name: ("steps" if name == "timesteps" else "batch", *shape[1:]) for name, shape in shapes.items()}
        | {
            "context": ("batch", config.text_tokens, config.cross_attention_dim),
            "modulation": ("steps", "batch", config.modulation_rows, config.dim),
        },
        outputs=("context", "modulation"),
        weights=stored(module, weights) | _extra_in(config, weights),
    )


def transformer_plan(config: HunyuanConfig, weights: Tensors, dtype: torch.dtype) -> ComponentPlan:
    """Component `transformer`, computing in `dtype`; its input `controls` is zero where a run leaves it out."""
    module = empty(DenoiseStep, config, dtype)
    inputs, dynamic, axes = step_ports(config)
    return ComponentPlan(
        name="transformer",
        module=module,
        inputs=inputs,
        dynamic=dynamic,
        axes=axes | {"noise_pred": axes["latent"]},
        outputs=("noise_pred",),
        weights=stored(module, weights) | patch_in(weights) | _patch_out(config, weights),
        defaults=no_controls(config),
    )


def step_ports(
    config: HunyuanConfig, *more_latents: str
) -> tuple[dict[str, Tensor], dict[str, dict[int, Any]], dict[str, tuple[str | int, ...]]]:
    """Inputs of a step, the free axes of each and their names; see `ComponentPlan`.

    Args:
        config: of the network.
        *more_latents: names of inputs that are like `latent` and follow it.
    """
    batch, height, width = Dim("batch", max=1024), Dim("grid_height", max=512), Dim("grid_width", max=512)
    steps, cells, patch = Dim("steps", max=4096), Dim("cells", max=1 << 18), config.patch_size
    # Grids with an odd and an even side, so that nothing is taken for a constant.
    rows, columns = 3, 4
    latents = ("latent", *more_latents)
    inputs = {name: torch.zeros(2, config.in_channels, rows * patch, columns * patch) for name in latents} | {
        "context": torch.zeros(2, config.text_tokens, config.cross_attention_dim),
        "modulation": torch.zeros(3, 2, config.modulation_rows, config.dim),
        "step": torch.zeros(1, dtype=torch.int64),
        "rope_cos": torch.zeros(rows * columns, config.attention_head_dim // 2),
        "rope_sin": torch.zeros(rows * columns, config.attention_head_dim // 2),
        "controls": torch.zeros(config.num_skips, 2, rows * columns, config.dim),
    }
    free: dict[str, dict[int, Any]] = {name: {0: batch, 2: patch * height, 3: patch * width} for name in latents} | {
        "context": {0: batch},
        "modulation": {0: steps, 1: batch},
        "rope_cos": {0: cells},
        "rope_sin": {0: cells},
        "controls": {i + 1: Dim(name, max=1 << 18) for i, name in enumerate(CONTROL_AXES)},
    }
    axes: dict[str, tuple[str | int, ...]] = {
        **dict.fromkeys(latents, ("batch", config.in_channels, "height", "width")),
        "context": ("batch", config.text_tokens, config.cross_attention_dim),
        "modulation": ("steps", "batch", config.modulation_rows, config.dim),
        "step": (1,),
        "rope_cos": ("cells", config.attention_head_dim // 2),
        "rope_sin": ("cells", config.attention_head_dim // 2),
        "controls": (config.num_skips, *CONTROL_AXES),
    }
    return inputs, free, axes


def no_controls(config: HunyuanConfig) -> dict[str, Tensor]:
    """Default of the input `controls`."""
    return {"controls": torch.zeros(config.num_skips, 1, 1, 1)}


def _extra_in(config: HunyuanConfig, source: Tensors) -> dict[str, WeightSource]:
    """First layer of the embedder of what is told beside the time, with the constant style in its bias."""
    key = "time_extra_emb.extra_embedder.linear_1"
    if not config.use_style_cond_and_image_meta_size:
        return {f"extra_in.{kind}": _reader(source, f"{key}.{kind}") for kind in ("weight", "bias")}
    told = config.extra_dim - config.dim

    def bias() -> Tensor:
        style = source["time_extra_emb.style_embedder.weight"][STYLE].float()
        folded: Tensor = source[f"{key}.bias"].float() + source[f"{key}.weight"][:, told:].float() @ style
        return folded

    return {"extra_in.weight": lambda: source[f"{key}.weight"][:, :told], "extra_in.bias": bias}


def patch_in(source: Tensors) -> dict[str, WeightSource]:
    """First layer as a product."""
    return {
        "patch_in.weight": lambda: source["pos_embed.proj.weight"].flatten(1),
        "patch_in.bias": _reader(source, "pos_embed.proj.bias"),
    }


def _patch_out(config: HunyuanConfig, source: Tensors) -> dict[str, WeightSource]:
    """Last layer as a product, of it the rows that predict v and not its spread (spec 5.7)."""

    def kept(key: str) -> Tensor:
        rows: Tensor = source[key].unflatten(0, (config.patch_size**2, -1))
        return rows[:, : config.in_channels].flatten(0, 1)

    return {
        "patch_out.weight": lambda: kept("proj_out.weight"),
        "patch_out.bias": lambda: kept("proj_out.bias"),
    }


def stored(module: nn.Module, source: Tensors) -> dict[str, WeightSource]:
    """A source for each parameter of `module` that the checkpoint holds under the same name."""
    keys = source.keys()
    return {name: _reader(source, name) for name, _ in module.named_parameters() if name in keys}


def _reader(source: Tensors, key: str) -> Callable[[], Tensor]:
    return lambda: source[key]
