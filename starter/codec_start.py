"""First weights of the VQ model: linear chains that carry every cell's mean colour through.

From random weights the published layout needs hours on a CPU before it paints anything. Started
like this it paints and reads flat patches exactly, and training only has to add the edges.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from pochade.export.modules.codec import Downsample, ResnetBlock, Upsample
from pochade.export.modules.vq import VQModel
from pochade.starter.codes import colour_scale

COLOUR_CHANNELS = (0, 4, 8)
"""Channels that carry red, green and blue through all levels."""

CONSTANT = 8.0
"""Large against the colours (about 1), so that group norm's scale hardly depends on the picture."""


def _bias(conv: nn.Conv2d) -> Tensor:
    return cast(Tensor, conv.bias)


def _carry(conv: nn.Conv2d) -> None:
    """Let a 1x1 shortcut pass the colour channels on unchanged."""
    for c in COLOUR_CHANNELS:
        conv.weight[c] = 0
        conv.weight[c, c] = 1
        _bias(conv)[c] = 0


def _guard(conv: nn.Conv2d, group: int, groups: int) -> float:
    """Make the colours survive the last group norm; returns the scale to undo.

    Beside each colour its negative, so that the mean is zero, and a large constant and its
    negative, so that the root mean square is nearly constant. All other channels of their
    groups are zero.
    """
    touched = {c // group for c in COLOUR_CHANNELS}
    used = {c + k for c in COLOUR_CHANNELS for k in range(4)}
    for channel in range(group * groups):
        if channel // group in touched and channel not in COLOUR_CHANNELS:
            conv.weight[channel] = 0
            _bias(conv)[channel] = 0
    for c in COLOUR_CHANNELS:
        conv.weight[c + 1, c] = -1
        _bias(conv)[c + 2], _bias(conv)[c + 3] = CONSTANT, -CONSTANT
    constants = 2 * len(COLOUR_CHANNELS)
    assert max(used) < group * groups
    return CONSTANT * math.sqrt(constants / (group * len(touched)))


def carry_colours(codec: VQModel) -> None:
    """Set the first weights in place; the widths must be 16 or more in every level."""
    groups = codec.config.norm_num_groups
    widths = codec.config.block_out_channels
    middle, spread = colour_scale()
    with torch.no_grad():
        for module in codec.modules():
            if isinstance(module, ResnetBlock):
                module.conv2.weight.zero_()
                _bias(module.conv2).zero_()
                if isinstance(module.conv_shortcut, nn.Conv2d):
                    _carry(module.conv_shortcut)
            elif isinstance(module, Upsample):
                nn.init.dirac_(module.conv.weight)
                _bias(module.conv).zero_()
            elif isinstance(module, Downsample):
                for c in COLOUR_CHANNELS:
                    # The mean of the four pixels that become one.
                    module.conv.weight[c] = 0
                    module.conv.weight[c, c, :2, :2] = 0.25
                    _bias(module.conv)[c] = 0
        for conv in (codec.quant_conv, codec.post_quant_conv):
            nn.init.dirac_(conv.weight)
            _bias(conv).zero_()

        decoder, encoder = codec.decoder, codec.encoder
        last = cast(ResnetBlock, decoder.up_blocks[-1].get_submodule("resnets.0"))
        paint = (
            _guard(cast(nn.Conv2d, last.conv_shortcut), widths[0] // groups, groups) if widths[0] != widths[1] else 1.0
        )
        last = cast(ResnetBlock, encoder.down_blocks[-1].get_submodule("resnets.0"))
        read = (
            _guard(cast(nn.Conv2d, last.conv_shortcut), widths[-1] // groups, groups)
            if widths[-1] != widths[-2]
            else 1.0
        )
        for i, c in enumerate(COLOUR_CHANNELS):
            decoder.conv_in.weight[c] = 0
            decoder.conv_in.weight[c, [i, 3 + i], 1, 1] = 0.5
            _bias(decoder.conv_in)[c] = 0
            encoder.conv_in.weight[c] = 0
            encoder.conv_in.weight[c, i, 1, 1] = 255 / spread
            _bias(encoder.conv_in)[c] = -float(middle[i]) / spread
            # silu(x) - silu(-x) = x
            decoder.conv_out.weight[i] = 0
            decoder.conv_out.weight[i, c, 1, 1] = paint * spread / 255
            decoder.conv_out.weight[i, c + 1, 1, 1] = -paint * spread / 255
            _bias(decoder.conv_out)[i] = float(middle[i]) / 255
            for row in (i, 3 + i):
                encoder.conv_out.weight[row] = 0
                encoder.conv_out.weight[row, c, 1, 1], encoder.conv_out.weight[row, c + 1, 1, 1] = read, -read
                _bias(encoder.conv_out)[row] = 0
