"""The VQ codec as graphs that work on strips; the networks are those of `modules.vq`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from pochade.export.graph_ops import port
from pochade.export.modules.vq import EPS, VqConfig
from pochade.export.strips import F32, I64, Layer, StripGraph

Read = Callable[[str], Tensor]


def build_vq_decoder(config: VqConfig, shapes: Mapping[str, torch.Size], read: Read) -> ir.Model:
    """Code ids (1, height, width) and a number of strips, a divisor of the height, to a picture, not yet clipped.

    Where the input `recompute` is true, layers of the last level, the largest, are computed again by whoever reads
    them: a third of the memory, for a third more time.

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
    x = net.convolve(x, "decoder.conv_in")
    for i in range(2):
        x = net.residual(x, f"decoder.mid_block.resnets.{i}")
    *levels, last = (f"decoder.up_blocks.{level}" for level in range(len(config.block_out_channels)))
    blocks = range(config.layers_per_block + 1)
    up = ""
    for level in levels:
        x = net.convolve(x, up, resample="up") if up else x
        for i in blocks:
            x = net.residual(x, f"{level}.resnets.{i}")
        up = f"{level}.upsamplers.0.conv"
    x = _doubled_block(net, x, up, f"{last}.resnets.0")
    for i in blocks[1:]:
        x = _block(net, x, f"{last}.resnets.{i}")
    x = net.convolve(x, "decoder.conv_out", norm="decoder.conv_norm_out", measured=False)
    image = net.whole(x)
    image.name, image.type = "image", ir.TensorType(F32)
    image.shape = ir.Shape((1, config.out_channels, "image_height", "image_width"))
    return net.finish("vq_decoder", [tokens], [image])


def decoder_layer_bytes(config: VqConfig) -> dict[str, int]:
    """Bytes per pixel of the layers kept at most: those of the last level's first residual block, or of a later one.

    Recomputing, a block keeps its input and its output; the first one has the layer before the up-sampling for input.
    """
    width, doubled = config.block_out_channels[:2]
    return {"per_pixel": 4 * (doubled + 2 * width), "per_pixel_recomputed": 4 * max(doubled // 4 + width, 2 * width)}


def _block(net: StripGraph, x: Layer, name: str) -> Layer:
    """A residual block in both forms."""
    made: list[Layer] = []

    def make(fast: bool) -> list[ir.Value]:
        made.append(net.residual(x, name, keep_inner=fast))
        return made[-1].parts

    value, *moments = net.choose(make)
    return Layer.kept(value, made[-1].channels, *moments)


def _doubled_block(net: StripGraph, x: Layer, up: str, name: str) -> Layer:
    """An up-sampling convolution and the residual block after it, in both forms.

    The wide layer between them is kept in one form only, the layer before it in the other one only: either is an
    empty picture where the other one is there.
    """
    before = x.value
    assert before is not None

    def make_doubled(fast: bool) -> list[ir.Value]:
        doubled = net.convolve(x, up, resample="up", keep=fast)
        value = net.again(before, keep=False) if doubled.value is None else doubled.value
        return [net.again(before, keep=not fast), value, *doubled.parts[-2:]]

    small, large, mean, variance = net.choose(make_doubled)
    made: list[Layer] = []

    def make_block(fast: bool) -> list[ir.Value]:
        doubled = Layer.kept(large, x.channels, mean, variance)
        if not fast:
            doubled = net.recomputed(Layer.kept(small, x.channels), up, mean, variance, resample="up")
        made.append(net.residual(doubled, name, keep_inner=fast))
        return made[-1].parts

    value, *moments = net.choose(make_block)
    return Layer.kept(value, made[-1].channels, *moments)


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
    # (1, channels, H, W) to (channels, strips, rows, W) to (strips, channels, rows, W).
    lead = net.ints(config.in_channels)
    rows = op.Concat(lead, net.strips, net.ints(-1), op.Shape(image, start=3), axis=0)
    x = Layer.kept(op.Transpose(op.Reshape(image, rows), perm=[1, 0, 2, 3]), config.in_channels)
    x = net.convolve(x, "encoder.conv_in")
    last = len(config.block_out_channels) - 1
    for level in range(last + 1):
        for i in range(config.layers_per_block):
            x = net.residual(x, f"encoder.down_blocks.{level}.resnets.{i}")
        if level < last:
            x = net.convolve(x, f"encoder.down_blocks.{level}.downsamplers.0.conv", resample="down")
    for i in range(2):
        x = net.residual(x, f"encoder.mid_block.resnets.{i}")
    x = net.convolve(x, "encoder.conv_out", norm="encoder.conv_norm_out", measured=False)
    latents = op.Transpose(net.whole(x), perm=[0, 2, 3, 1])
    tokens = op.ArgMin(
        op.Add(op.MatMul(latents, net.weight("code_kernel")), net.weight("code_bias")), axis=-1, keepdims=0
    )
    tokens.name, tokens.type, tokens.shape = "tokens", ir.TensorType(I64), ir.Shape((1, "height", "width"))
    return net.finish("vq_encoder", [image], [tokens])
