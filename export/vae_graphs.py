"""The autoencoder of continuous latents as graphs that work on strips; the network is that of `modules.vae`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt

import onnx_ir as ir
import torch
from torch import Tensor

from pochade.export.codec_graphs import decode, encode, split
from pochade.export.graph_ops import port
from pochade.export.modules.codec import EPS
from pochade.export.modules.vae import LOG_VARIANCE, AutoencoderKL, VaeConfig
from pochade.export.strips import F32, StripGraph

Read = Callable[[str], Tensor]


def build_vae_decoder(config: VaeConfig, read: Read) -> ir.Model:
    """Scaled latents (1, latent_channels, h, w) and a number of strips, a divisor of h, to a picture.

    The picture is in [0, 1], not yet clipped. Where the input `recompute` is true, it takes half the memory and a third
    more time; see `codec_graphs.decode`.

    Args:
        config: of the autoencoder.
        read: gives a published weight.
    """
    channels = config.latent_channels

    def unscaled(kernel: Tensor) -> Tensor:
        return kernel / config.scaling_factor

    # The convolution after it puts zeros around what post_quant_conv gives, which therefore stays by itself.
    folded = _folded(
        read,
        {
            "post_quant_conv.weight": unscaled,
            "decoder.conv_out.weight": lambda kernel: kernel / 2,
            "decoder.conv_out.bias": lambda bias: bias / 2 + 0.5,
        },
        "decoder",
    )
    net = StripGraph(_shapes(config), folded, config.norm_num_groups, EPS)
    latent = port("latent", F32, (1, channels, "height", "width"))
    ready = net.op.Conv(latent, net.weight("post_quant_conv.weight"), net.weight("post_quant_conv.bias"))
    image = decode(net, split(net, ready, channels), config, has_attention=True)
    return net.finish("vae_decoder", [latent], [image])


def build_vae_encoder(config: VaeConfig, read: Read) -> ir.Model:
    """A picture (1, 3, H, W) in [0, 1] and a number of strips, a divisor of H / factor, to the posterior's moments.

    These are the outputs `latent`, the mean, scaled, and `log_variance`, unscaled, both of the shape
    (1, latent_channels, H / factor, W / factor).

    Args:
        config: of the autoencoder.
        read: gives a published weight.
    """
    channels = config.latent_channels

    def through_quant_conv(tensor: Tensor, is_bias: bool) -> Tensor:
        kernel, scale = read("quant_conv.weight").float().flatten(1), torch.ones(2 * channels)
        scale[:channels] = config.scaling_factor
        mixed: Tensor = torch.tensordot(kernel, tensor, dims=1)
        mixed = mixed + read("quant_conv.bias").float() if is_bias else mixed
        return mixed * scale.view(-1, *(1 for _ in mixed.shape[1:]))

    folded = _folded(
        read,
        {
            "encoder.conv_out.weight": lambda kernel: through_quant_conv(kernel, is_bias=False),
            "encoder.conv_out.bias": lambda bias: through_quant_conv(bias, is_bias=True),
        },
        "encoder",
    )
    net = StripGraph(_shapes(config), folded, config.norm_num_groups, EPS)
    op = net.op
    image = port("image", F32, (1, config.in_channels, "image_height", "image_width"))
    centred = op.Sub(op.Mul(image, op.floats("two", 2.0)), op.floats("one", 1.0))
    moments = net.whole(encode(net, centred, config, has_attention=True))
    latent, log_variance = op.Split(moments, axis=1, num_outputs=2, _outputs=2)
    low, high = (op.floats(name, bound) for name, bound in zip(("least", "most"), LOG_VARIANCE, strict=True))
    log_variance = op.Clip(log_variance, low, high)
    for value, name in ((latent, "latent"), (log_variance, "log_variance")):
        value.name, value.type = name, ir.TensorType(F32)
        value.shape = ir.Shape((1, channels, "height", "width"))
    return net.finish("vae_encoder", [image], [latent, log_variance])


def _shapes(config: VaeConfig) -> Mapping[str, torch.Size]:
    """Of the weights; matrices of attention blocks are those of 1x1 convolutions."""
    with torch.device("meta"):
        published = AutoencoderKL(config).state_dict()
    return {name: _as_kernel(value).shape for name, value in published.items()}


def _folded(read: Read, changed: Mapping[str, Callable[[Tensor], Tensor]], side: str) -> Read:
    """Reads weights as the graph has them: some changed, matrices as kernels, and the scale of scores in queries."""
    queries = f"{side}.mid_block.attentions.0.to_q."

    def get(name: str) -> Tensor:
        value = read(name).float()
        if name in changed:
            return changed[name](value)
        value = _as_kernel(value)
        # Scores of vectors of this length are divided by its root (Vaswani et al. 2017, arXiv 1706.03762).
        return value / sqrt(value.shape[0]) if name.startswith(queries) else value

    return get


def _as_kernel(value: Tensor) -> Tensor:
    """A matrix, which only attention blocks have, as a 1x1 convolution; anything else as it is."""
    return value[:, :, None, None] if value.ndim == 2 else value
