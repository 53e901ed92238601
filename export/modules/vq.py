"""VQ codec: pictures to code ids and back (van den Oord et al. 2017, arXiv 1711.00937).

The layout is the published `VQModel` of diffusers; parameter names are its keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F  # noqa: N812 - the name everyone gives it
from torch import Tensor, nn

from pochade.export.modules.codec import CodecConfig, Decoder, Encoder

FIXED = {
    "act_fn": "silu",
    "norm_type": "group",
    "lookup_from_codebook": True,
    "mid_block_add_attention": False,
}
"""Values that every released codec has."""


@dataclass(frozen=True)
class VqConfig(CodecConfig):
    """The values of `vqvae/config.json` that change the network."""

    num_vq_embeddings: int
    embed_dim: int

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VqConfig:
        """Config from the published JSON.

        Raises:
            KeyError: a value is missing.
            ValueError: a layout that no released codec has.
        """
        return cls(
            num_vq_embeddings=values["num_vq_embeddings"],
            embed_dim=values.get("vq_embed_dim") or values["latent_channels"],
            **cls.shared(values, FIXED),
        )


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
        self.encoder = Encoder(config, config.latent_channels)
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
