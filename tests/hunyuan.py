"""Tiny HunyuanDiT networks of the reference library, for parity."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from diffusers.models.controlnets.controlnet_hunyuan import HunyuanDiT2DControlNetModel
from diffusers.models.transformers.hunyuan_transformer_2d import HunyuanDiT2DModel
from torch import Tensor

from pochade.export.checkpoint import Tensors
from pochade.export.component import ComponentPlan
from pochade.export.hunyuan_components import condition_plan, transformer_plan
from pochade.export.modules.hunyuan_dit import HunyuanConfig
from pochade.runtime.hunyuan_grid import rotary_tables

TEXT_LEN, TEXT_LEN_T5 = 77, 256

TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 88,
    "hidden_size": 176,
    "in_channels": 4,
    "patch_size": 2,
    "num_layers": 6,
    "mlp_ratio": 4.3637,
    "cross_attention_dim": 64,
    "cross_attention_dim_t5": 64,
    "pooled_projection_dim": 24,
    "sample_size": 128,
    "learn_sigma": True,
    "text_len": TEXT_LEN,
    "text_len_t5": TEXT_LEN_T5,
}
"""The published config with other numbers."""

VERSIONS = ("v1.1", "v1.2")
"""With and without style and size conditions."""


def transformer(version: str, seed: int = 0) -> HunyuanDiT2DModel:
    """Reference network with random weights, norms and biases included."""
    torch.manual_seed(seed)
    model = HunyuanDiT2DModel(**TRANSFORMER, use_style_cond_and_image_meta_size=version == "v1.1")
    trained: HunyuanDiT2DModel = _trained(model)
    return trained


def controlnet(version: str, seed: int = 7) -> HunyuanDiT2DControlNetModel:
    """Reference ControlNet with random weights, those included that training begins with as zeros."""
    torch.manual_seed(seed)
    values = {name: value for name, value in TRANSFORMER.items() if name not in ("num_layers", "learn_sigma")}
    sized, layers = version == "v1.1", TRANSFORMER["num_layers"]
    net = HunyuanDiT2DControlNetModel(**values, transformer_num_layers=layers, use_style_cond_and_image_meta_size=sized)
    with torch.no_grad():
        for layer in (net.input_block, *net.controlnet_blocks):
            layer.weight.copy_(torch.randn(layer.weight.shape) / layer.weight.shape[0] ** 0.5)
    trained: HunyuanDiT2DControlNetModel = _trained(net)
    return trained


def _trained(model: Any) -> Any:
    """Frozen, with norms and biases that are not as they begin."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.copy_(float("norm" in name and name.endswith("weight")) + 0.1 * torch.randn(value.shape))
    return model.eval().requires_grad_(False)


def text_inputs(batch: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """States and masks of both text encoders, as the pipeline hands them to the network."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([[5], [77], [11], [1]])[:batch]
    return {
        "text_states": torch.randn(batch, TEXT_LEN, TRANSFORMER["cross_attention_dim"], generator=generator),
        "text_mask": (torch.arange(TEXT_LEN) < lengths).long(),
        "text_states_2": torch.randn(batch, TEXT_LEN_T5, TRANSFORMER["cross_attention_dim_t5"], generator=generator),
        "text_mask_2": (torch.arange(TEXT_LEN_T5) < 3 * lengths).long(),
    }


def meta_sizes(batch: int = 2) -> Tensor:
    """Sizes as the published pipeline tells them, (batch, 6)."""
    return torch.tensor([[1024.0, 1024.0, 1280.0, 768.0, 0.0, 0.0]]).repeat(batch, 1)


class Stored(Tensors):
    """Tensors in memory."""

    where = Path("memory")

    def __init__(self, state: dict[str, Tensor]) -> None:
        self._state = state

    def keys(self) -> Collection[str]:
        return self._state.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._state[key].shape)

    def __getitem__(self, key: str) -> Tensor:
        return self._state[key]


def plans(reference: HunyuanDiT2DModel) -> dict[str, ComponentPlan]:
    """Condition and transformer with the weights of a reference network."""
    config, weights = HunyuanConfig.from_dict(dict(reference.config)), Stored(reference.state_dict())
    return {p.name: p for p in (condition_plan(config, weights), transformer_plan(config, weights, torch.float32))}


def filled(plan: ComponentPlan) -> Any:
    """The plan's module with its weights."""
    state = {name: source().to(plan.module.state_dict()[name].dtype) for name, source in plan.weights.items()}
    plan.module.load_state_dict(state, strict=False)
    return plan.module.requires_grad_(False)


def tables(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a latent's cells, as in training."""
    cos, sin = rotary_tables(height // 2, width // 2, TRANSFORMER["attention_head_dim"])
    return torch.from_numpy(cos), torch.from_numpy(sin)


def condition_inputs(version: str) -> dict[str, Tensor]:
    """Of three steps."""
    sizes = {"image_meta_size": meta_sizes()} if version == "v1.1" else {}
    return text_inputs() | {"timesteps": torch.tensor([951.0, 751.0, 1.0])} | sizes


def step_inputs(context: Tensor, modulation: Tensor, step: int, height: int, width: int) -> dict[str, Tensor]:
    """Of one step on random latents."""
    cos, sin = tables(height, width)
    latent = torch.randn(len(context), 4, height, width, generator=torch.Generator().manual_seed(2))
    inputs = {"latent": latent, "context": context, "modulation": modulation, "step": torch.tensor([step])}
    return inputs | {"rope_cos": cos, "rope_sin": sin}


def run(path: Path, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What a component answers in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # As in pochade.runtime.opening: the kernel for signed weights saturates on x86 without VNNI.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return [torch.from_numpy(output) for output in outputs]
