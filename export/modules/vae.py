"""Autoencoder of continuous latents (Kingma and Welling 2013, arXiv 1312.6114): HunyuanDiT's is SDXL's.

The layout is the published `AutoencoderKL` of diffusers; parameter names are its keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pochade.export.modules.codec import CodecConfig, Decoder, Encoder

FIXED = {
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}
"""Values that the released codec has."""

LOG_VARIANCE = (-30.0, 20.0)
"""Bounds of what the encoder may say."""


@dataclass(frozen=True)
class VaeConfig(CodecConfig):
    """The values of `vae/config.json` that change the network."""

    scaling_factor: float
    """Latents are multiplied by it, so that they have a variance of about 1."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VaeConfig:
        """Config from the published JSON.

        Raises:
            KeyError: a value is missing.
            ValueError: a layout that the released codec does not have.
        """
        return cls(scaling_factor=values["scaling_factor"], **cls.shared(values, FIXED))


class AutoencoderKL(nn.Module):
    """Encoder and decoder. Pictures are in [-1, 1] here, as in the published code."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        moments = 2 * config.latent_channels
        self.encoder = Encoder(config, moments, has_attention=True)
        self.quant_conv = nn.Conv2d(moments, moments, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config, has_attention=True)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Picture (batch, 3, H, W) -> mean, scaled, and logarithm of the variance, unscaled.

        Both are (batch, latent_channels, H / factor, W / factor).
        """
        mean, log_variance = self.quant_conv(self.encoder(image)).chunk(2, 1)
        return self.config.scaling_factor * mean, log_variance.clamp(*LOG_VARIANCE)

    def decode(self, latent: Tensor) -> Tensor:
        """Scaled latents (batch, latent_channels, h, w) -> picture (batch, 3, H, W), not yet clipped to [-1, 1]."""
        return self.decoder(self.post_quant_conv(latent / self.config.scaling_factor))
