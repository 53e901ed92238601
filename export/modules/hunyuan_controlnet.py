"""ControlNet of HunyuanDiT: the first half of its blocks, which tells the long skips of the other what to add.

Published as `HunyuanDiT2DControlNetModel` in diffusers and as `HunYuanControlNet` by Tencent; Zhang et al. 2023,
arXiv 2302.05543. Parameter names are the diffusers keys. Its embedders are its own copies of the transformer's.
"""

from __future__ import annotations

from typing import Any, Self

from torch import nn

from pochade.export.modules.hunyuan_dit import Block, HunyuanConfig, HunyuanNetwork


class ControlNetConfig(HunyuanConfig):
    """The values of a ControlNet's `config.json`; `num_layers` counts the blocks of the transformer it is for."""

    @property
    def modulation_rows(self) -> int:
        """A shift per block: there is no last norm."""
        return self.num_skips

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Config from the published JSON.

        Raises:
            KeyError: a value is missing.
            ValueError: a network of another kind.
        """
        return super().from_dict({**values, "num_layers": values["transformer_num_layers"]})


class ControlNet(HunyuanNetwork):
    """The published modules; what they compute is cut in two, see `pochade.export.hunyuan_controlnet`."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__(config)
        dim, count = config.dim, config.num_skips
        self.input_block = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(Block(config, skip=False) for _ in range(count))
        self.controlnet_blocks = nn.ModuleList(nn.Linear(dim, dim) for _ in range(count))
