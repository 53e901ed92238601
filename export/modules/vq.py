"""VQ codec: pictures to code ids and back (van den Oord et al. 2017, arXiv 1711.00937).

The layout is the published `VQModel` of diffusers; parameter names are its keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch.nn.functional as F  # noqa: N812 - the name everyone gives it
from torch import Tensor, nn

EPS = 1e-6


@dataclass(frozen=True)
class VqConfig:
    """The values of `vqvae/config.json` that change the network."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    norm_num_groups: int
    num_vq_embeddings: int
    embed_dim: int
    in_channels: int
    out_channels: int

    @property
    def factor(self) -> int:
        """Pixels per side of a latent cell."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VqConfig:
        """Config from the published JSON.

        Raises:
            KeyError: a value is missing.
            ValueError: a layout that no released codec has.
        """
        fixed = {
            "act_fn": "silu",
            "norm_type": "group",
            "lookup_from_codebook": True,
            "mid_block_add_attention": False,
        }
        for name, expected in fixed.items():
            if values.get(name, expected) != expected:
                raise ValueError(f"{name} is {values[name]!r}, released codecs have {expected!r}")
        levels = {*values["down_block_types"]}, {*values["up_block_types"]}
        if levels != ({"DownEncoderBlock2D"}, {"UpDecoderBlock2D"}):
            raise ValueError("only DownEncoderBlock2D and UpDecoderBlock2D levels are known")
        names = (
            "layers_per_block",
            "latent_channels",
            "norm_num_groups",
            "num_vq_embeddings",
            "in_channels",
            "out_channels",
        )
        return cls(
            block_out_channels=tuple(values["block_out_channels"]),
            embed_dim=values.get("vq_embed_dim") or values["latent_channels"],
            **{name: values[name] for name in names},
        )


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


class MidBlock(nn.Module):
    """Two residual blocks at the lowest resolution, no attention."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Shape unchanged."""
        for block in self.resnets:
            x = block(x)
        return x


class Encoder(nn.Module):
    """Picture to unquantized latents."""

    def __init__(self, config: VqConfig) -> None:
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
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, height, width) -> (batch, latent_channels, height / factor, width / factor)."""
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents to picture."""

    def __init__(self, config: VqConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
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


class Quantizer(nn.Module):
    """The code book."""

    def __init__(self, config: VqConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.num_vq_embeddings, config.embed_dim)


class VQModel(nn.Module):
    """Encoder, code book and decoder. Pictures are in [0, 1], not [-1, 1] (spec 6)."""

    def __init__(self, config: VqConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.embed_dim, 1)
        self.quantize = Quantizer(config)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, image: Tensor) -> Tensor:
        """(batch, 3, H, W) in [0, 1] -> latents (batch, embed_dim, H / factor, W / factor)."""
        return self.quant_conv(self.encoder(image))

    def nearest_codes(self, latents: Tensor) -> Tensor:
        """Nearest code of every cell, (batch, h, w) int64; the first one on ties."""
        codes = self.quantize.embedding.weight
        x = latents.permute(0, 2, 3, 1)
        # |x - e|^2 without |x|^2, which every code shares.
        return (codes.square().sum(-1) - 2 * F.linear(x, codes)).argmin(-1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Code ids (batch, h, w) int64 -> picture (batch, 3, H, W), not yet clipped to [0, 1]."""
        vectors = self.quantize.embedding(tokens).permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(vectors))
