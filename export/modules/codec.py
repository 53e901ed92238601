"""The networks around a codec's latents, as the published codecs of diffusers share them.

A codec is an encoder of pictures and a decoder of latents; what is between them (`modules.vq`, `modules.vae`) differs.
Parameter names are the published keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch.nn.functional as F  # noqa: N812 - the name everyone gives it
from torch import Tensor, nn

EPS = 1e-6


@dataclass(frozen=True)
class CodecConfig:
    """The values of a codec's `config.json` that change the networks."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    norm_num_groups: int
    in_channels: int
    out_channels: int

    @property
    def factor(self) -> int:
        """Pixels per side of a latent cell."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @classmethod
    def shared(cls, values: dict[str, Any], fixed: dict[str, Any]) -> dict[str, Any]:
        """The fields above from the published JSON.

        Args:
            values: of the JSON.
            fixed: what every released codec of a kind has; a missing value counts as this.

        Raises:
            KeyError: a value is missing.
            ValueError: a layout that no released codec has.
        """
        for name, expected in fixed.items():
            if values.get(name, expected) != expected:
                raise ValueError(f"{name} is {values[name]!r}, released codecs have {expected!r}")
        levels = {*values["down_block_types"]}, {*values["up_block_types"]}
        if levels != ({"DownEncoderBlock2D"}, {"UpDecoderBlock2D"}):
            raise ValueError("only DownEncoderBlock2D and UpDecoderBlock2D levels are known")
        names = ("layers_per_block", "latent_channels", "norm_num_groups", "in_channels", "out_channels")
        return {name: values[name] for name in names} | {"block_out_channels": tuple(values["block_out_channels"])}


class ResnetBlock(nn.Module):
    """Two normalized 3x3 convolutions around a skip connection."""

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, EPS)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels_out, EPS)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels_in, h, w) -> (batch, channels_out, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Downsample(nn.Module):
    """3x3 stride-2 convolution after one zero column right and one zero row at the bottom."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Halves both sides."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest 2x, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Doubles both sides."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution and the resampling after them."""

    def __init__(self, channels: list[int], groups: int, resample: tuple[str, nn.Module] | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairwise(channels))
        self.resample = resample[0] if resample else ""
        if resample:
            self.add_module(resample[0], nn.ModuleList([resample[1]]))

    def forward(self, x: Tensor) -> Tensor:
        """Residual blocks, then the resampling if this level has one."""
        for block in self.resnets:
            x = block(x)
        return self.get_submodule(f"{self.resample}.0")(x) if self.resample else x


class Attention(nn.Module):
    """Attention of one head, of every cell to every other, around a skip connection."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Shape unchanged."""
        cells = self.group_norm(x).flatten(2).mT
        mixed = F.scaled_dot_product_attention(self.to_q(cells), self.to_k(cells), self.to_v(cells))
        return x + self.to_out[0](mixed).mT.unflatten(2, x.shape[2:])


class MidBlock(nn.Module):
    """Two residual blocks at the lowest resolution, with or without attention between them."""

    def __init__(self, channels: int, groups: int, has_attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups)] if has_attention else [])

    def forward(self, x: Tensor) -> Tensor:
        """Shape unchanged."""
        for block in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = block(x)
        return x


class Encoder(nn.Module):
    """Picture to latents, or to what tells their distribution.

    Args:
        config: of the codec.
        channels: of the result.
        has_attention: whether the cells of the lowest resolution see each other.
    """

    def __init__(self, config: CodecConfig, channels: int, has_attention: bool = False) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(
                [widths[max(i - 1, 0)]] + [width] * config.layers_per_block,
                groups,
                ("downsamplers", Downsample(width)) if i < last else None,
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups, has_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, height, width) -> (batch, channels, height / factor, width / factor)."""
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents to picture; see `Encoder`."""

    def __init__(self, config: CodecConfig, has_attention: bool = False) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, has_attention)
        self.up_blocks = nn.ModuleList(
            Level(
                [widths[max(i - 1, 0)]] + [width] * (config.layers_per_block + 1),
                groups,
                ("upsamplers", Upsample(width)) if i < last else None,
            )
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, latent_channels, h, w) -> (batch, 3, h * factor, w * factor)."""
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
