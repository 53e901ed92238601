"""Names of HunyuanDiT's weights: Tencent's own (`t2i/model/*.pt`) and diffusers' (spec section 2.4).

They differ in more than spelling: `norm2` and `norm3` of a block change places, fused projections are cut into rows,
and the last modulation has scale and shift in the other order.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from pochade.export.checkpoint import Tensors

OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_extra_emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_extra_emb.timestep_embedder.linear_2",
    "extra_embedder.0": "time_extra_emb.extra_embedder.linear_1",
    "extra_embedder.2": "time_extra_emb.extra_embedder.linear_2",
    "pooler.q_proj": "time_extra_emb.pooler.q_proj",
    "pooler.k_proj": "time_extra_emb.pooler.k_proj",
    "pooler.v_proj": "time_extra_emb.pooler.v_proj",
    "pooler.c_proj": "time_extra_emb.pooler.c_proj",
    "style_embedder": "time_extra_emb.style_embedder",
    "mlp_t5.0": "text_embedder.linear_1",
    "mlp_t5.2": "text_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
    "before_proj": "input_block",
}
"""Modules outside of the blocks; the last is a ControlNet's."""

INNER: dict[str, tuple[str, ...]] = {
    "norm1": ("norm1.norm",),
    "default_modulation.1": ("norm1.linear",),
    "norm2": ("norm3",),
    "norm3": ("norm2",),
    "attn1.Wqkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn1.q_norm": ("attn1.norm_q",),
    "attn1.k_norm": ("attn1.norm_k",),
    "attn1.out_proj": ("attn1.to_out.0",),
    "attn2.q_proj": ("attn2.to_q",),
    "attn2.kv_proj": ("attn2.to_k", "attn2.to_v"),
    "attn2.q_norm": ("attn2.norm_q",),
    "attn2.k_norm": ("attn2.norm_k",),
    "attn2.out_proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "skip_norm": ("skip_norm",),
    "skip_linear": ("skip_linear",),
}
"""Modules of a block, and the modules that their rows are cut into, in this order."""

PARAMETERS = {
    "text_embedding_padding": "text_embedding_padding",
    "pooler.positional_embedding": "time_extra_emb.pooler.positional_embedding",
}
"""Tensors that are no module's weight or bias."""

SWAPPED = ("norm_out.linear.weight", "norm_out.linear.bias")
"""Rows are shift, scale at Tencent's and scale, shift here."""


def is_original(keys: Collection[str]) -> bool:
    """Whether these are the keys of a network in Tencent's layout."""
    return "mlp_t5.0.weight" in keys


def original_modules(num_layers: int) -> dict[str, tuple[str, ...]]:
    """Tencent's modules with this many blocks, and diffusers' modules that their rows are cut into."""
    modules: dict[str, tuple[str, ...]] = {original: (name,) for original, name in OUTER.items()}
    for i in range(num_layers):
        modules |= {f"blocks.{i}.{inner}": tuple(f"blocks.{i}.{n}" for n in names) for inner, names in INNER.items()}
        modules[f"after_proj_list.{i}"] = (f"controlnet_blocks.{i}",)
    return modules


def original_keys(keys: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Of every tensor in Tencent's layout, the diffusers keys of its parts.

    Args:
        keys: of either layout; as many blocks are named as they have.
    """
    numbers = [int(found[1]) for key in keys if (found := re.match(r"\w+\.(\d+)\.", key))]
    modules = original_modules(max(numbers, default=-1) + 1)
    table: dict[str, tuple[str, ...]] = {original: (name,) for original, name in PARAMETERS.items()}
    for original, names in modules.items():
        table |= {f"{original}.{kind}": tuple(f"{name}.{kind}" for name in names) for kind in ("weight", "bias")}
    return table


class OriginalTensors(Tensors):
    """A network in Tencent's layout under diffusers' keys; an unknown key stays as it is, for `check` to name it."""

    def __init__(self, source: Tensors) -> None:
        self.where = source.where
        self._source = source
        table = original_keys(source.keys())
        self._places: dict[str, tuple[str, int, int]] = {}
        for key in source.keys():  # noqa: SIM118
            names = table.get(key, (key,))
            self._places |= {name: (key, i, len(names)) for i, name in enumerate(names)}

    def keys(self) -> Collection[str]:
        """Keys as in diffusers."""
        return self._places.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the rows that have this key; of all rows where they cannot be cut evenly."""
        source, _, count = self._places[key]
        shape = self._source.shape(source)
        return (shape[0] // count, *shape[1:]) if shape and shape[0] % count == 0 else shape

    def __getitem__(self, key: str) -> Tensor:
        """Those rows."""
        source, index, count = self._places[key]
        return _reordered(key, self._source[source].chunk(count)[index])


def to_original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network with diffusers' keys under Tencent's.

    Raises:
        ValueError: tensors that have no name at Tencent's, or parts of a fused one that are missing.
    """
    originals: dict[str, Tensor] = {}
    left = dict(tensors)
    for original, names in original_keys(tensors.keys()).items():
        if all(name in left for name in names):
            parts = [_reordered(name, left.pop(name)) for name in names]
            originals[original] = torch.cat(parts) if len(parts) > 1 else parts[0]
    if left:
        raise ValueError(f"no name in the original layout for {', '.join(sorted(left))}")
    return originals


def _reordered(key: str, tensor: Tensor) -> Tensor:
    """The halves of the last modulation in the other layout's order, which is its own inverse; others as they are."""
    return torch.cat(tuple(reversed(tensor.chunk(2)))) if key in SWAPPED else tensor
