"""The VQ codec as graphs that work on strips; the networks are those of `modules.vq`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from pochade.export.codec_graphs import decode, encode
from pochade.export.graph_ops import port
from pochade.export.modules.codec import EPS
from pochade.export.modules.vq import VqConfig
from pochade.export.strips import F32, I64, Layer, StripGraph

Read = Callable[[str], Tensor]


def build_vq_decoder(config: VqConfig, shapes: Mapping[str, torch.Size], read: Read) -> ir.Model:
    """Code ids (1, height, width) and a number of strips, a divisor of the height, to a picture, not yet clipped.

    Where the input `recompute` is true, it takes a third of the memory and a third more time, see
    `codec_graphs.decode`.

    Args:
        config: of the codec.
        shapes: of the weights, `code_table` among them: the code book behind the 1x1 convolution after it.
        read: gives a weight.
    """
    net = StripGraph(shapes, read, config.norm_num_groups, EPS)
    tokens = port("tokens", I64, (1, "height", "width"))
    rows = net.op.Concat(net.strips, net.ints(-1), net.op.Shape(tokens, start=2), axis=0)
    cells = net.op.Gather(net.weight("code_table"), net.op.Reshape(tokens, rows), axis=0)
    x = Layer.kept(net.op.Transpose(cells, perm=[0, 3, 1, 2]), config.latent_channels)
    return net.finish("vq_decoder", [tokens], [decode(net, x, config)])


def build_vq_encoder(config: VqConfig, shapes: Mapping[str, torch.Size], read: Read) -> ir.Model:
    """A picture (1, 3, H, W) in [0, 1] and a number of strips, a divisor of H / factor, to code ids.

    Args:
        config: of the codec.
        shapes: of the weights; `code_kernel` (latent_channels, codes) and `code_bias` (codes) measure the distance of
            the latents before the last 1x1 convolution to every code, up to a term that all codes share.
        read: gives a weight.
    """
    net = StripGraph(shapes, read, config.norm_num_groups, EPS)
    op = net.op
    image = port("image", F32, (1, config.in_channels, "image_height", "image_width"))
    latents = op.Transpose(net.whole(encode(net, image, config)), perm=[0, 2, 3, 1])
    tokens = op.ArgMin(
        op.Add(op.MatMul(latents, net.weight("code_kernel")), net.weight("code_bias")), axis=-1, keepdims=0
    )
    tokens.name, tokens.type, tokens.shape = "tokens", ir.TensorType(I64), ir.Shape((1, "height", "width"))
    return net.finish("vq_encoder", [image], [tokens])
