"""What the graphs of all codecs share; the networks are those of `modules.codec`."""

from __future__ import annotations

import onnx_ir as ir

from pochade.export.modules.codec import CodecConfig
from pochade.export.strips import F32, Layer, StripGraph


def decode(net: StripGraph, x: Layer, config: CodecConfig, has_attention: bool = False) -> ir.Value:
    """Latents to a picture (1, out_channels, height, width), the output `image`.

    Where the input `recompute` is true, layers of the last level, the largest, are computed again by whoever reads
    them: about half the memory, for a third more time.

    Args:
        net: graph to add to.
        x: what `decoder.conv_in` takes.
        config: of the codec.
        has_attention: whether the cells of the lowest resolution see each other.
    """
    x = _middle(net, net.convolve(x, "decoder.conv_in"), "decoder.mid_block", has_attention)
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
    return image


def decoder_layer_bytes(config: CodecConfig) -> dict[str, int]:
    """Bytes per pixel of the layers kept at most: those of the last level's first residual block, or of a later one.

    Recomputing, a block keeps its input and its output; the first one has the layer before the up-sampling for input.
    `per_pixel_convolved` is how much of that convolutions give, with nothing added: in the first block what is before
    and between its convolutions, in later ones what is between them; the less, where the other block then needs more.
    """
    width, doubled = config.block_out_channels[:2]
    return {
        "per_pixel": 4 * (doubled + 2 * width),
        "per_pixel_recomputed": 4 * max(doubled // 4 + width, 2 * width),
        "per_pixel_convolved": 4 * min(doubled + width, 2 * doubled - width),
    }


def encode(net: StripGraph, image: ir.Value, config: CodecConfig, has_attention: bool = False) -> Layer:
    """A picture (1, in_channels, height, width) to what `encoder.conv_out` gives; see `decode`."""
    x = split(net, image, config.in_channels)
    x = net.convolve(x, "encoder.conv_in")
    last = len(config.block_out_channels) - 1
    for level in range(last + 1):
        for i in range(config.layers_per_block):
            x = net.residual(x, f"encoder.down_blocks.{level}.resnets.{i}")
        if level < last:
            x = net.convolve(x, f"encoder.down_blocks.{level}.downsamplers.0.conv", resample="down")
    x = _middle(net, x, "encoder.mid_block", has_attention)
    return net.convolve(x, "encoder.conv_out", norm="encoder.conv_norm_out", measured=False)


def split(net: StripGraph, picture: ir.Value, channels: int) -> Layer:
    """A picture (1, channels, height, width) as a layer."""
    # To (channels, strips, rows, width) and then (strips, channels, rows, width).
    op = net.op
    rows = op.Concat(net.ints(channels), net.strips, net.ints(-1), op.Shape(picture, start=3), axis=0)
    return Layer.kept(op.Transpose(op.Reshape(picture, rows), perm=[1, 0, 2, 3]), channels)


def _middle(net: StripGraph, x: Layer, name: str, has_attention: bool) -> Layer:
    """The blocks of the lowest resolution."""
    x = net.residual(x, f"{name}.resnets.0")
    if has_attention:
        x = net.attend(x, f"{name}.attentions.0")
    return net.residual(x, f"{name}.resnets.1")


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
