"""How much memory a codec's decoder takes, whatever the family it serves."""

from __future__ import annotations

from typing import NamedTuple

from pochade.bundle import Component
from pochade.machine import has_tiles
from pochade.runtime.heap import KEPT, SPARING
from pochade.runtime.opening import takes_gpu_graph
from pochade.runtime.pipeline import Tiling
from pochade.runtime.plan import Way
from pochade.runtime.strips import reads_pictures, strip_count, strip_pixels, strips_at_once

ASIDE = 30_000_000
"""Bytes of what a session is beside its weights, small things, and holes in the heap."""

TILED = 40_000_000
"""Bytes that a convolution by tiles copies out at most (`pochade.quant.int8_conv`): 9 x 256 channels of a strip."""

ANOTHER_STRIP, ANOTHER_LEAST = 230_000_000, 60_000_000
"""Bytes that each more strip at the same time takes: at most, and beside half of what is kept of a small picture.
Threads have heaps of their own, whose holes grow with the number of strips. Of what decoders of 8-bit numbers took at
256x256 to 1344x768 (`pochade.benchmarks.budgets`)."""

CUDNN_WORK_SPACE = 32 << 20
"""Bytes that a convolution on a card may take while it works, where memory is limited: ONNX Runtime's own number for
`cudnn_conv_use_max_workspace` = 0."""

DECODED, PICTURE = 12, 3
"""Bytes per pixel of what the decoder gives, and of a finished picture."""


class _OnCard(NamedTuple):
    """What a card's allocator holds, in times of what a codec keeps of a pixel."""

    layers: float
    """Outside of the strip at work: blocks that earlier layers have freed are too small for later ones."""
    strip: float
    """Of the strip at work, computed in float32 however layers are kept."""


ON_CARD = {
    (False, False): _OnCard(1.55, 3.2),
    (False, True): _OnCard(1.4, 7.8),
    (True, False): _OnCard(1.1, 1.65),
    (True, True): _OnCard(1.1, 3.75),
}
"""By whether a codec reads pictures and whether it keeps layers in 16 or 8 bits. Of what CUDA's provider allocates for
the codecs of Meissonic and HunyuanDiT at 256x256 to 1344x768 (`pochade.benchmarks.null_cuda`)."""

ON_CARD_RECOMPUTED, ON_CARD_AGAIN = 1.85, 1.2
"""The first of `_OnCard` where layers are computed again, and how much more a strip is then. Where layers are narrow,
that would take as much as keeping them."""


class CodecMemory:
    """Predicts what decoding adds to a process, in bytes."""

    def __init__(self, decoder: Component, factor: int, on_gpu: bool = False) -> None:
        """Read what the bundle tells of a decoder.

        Args:
            decoder: whose `memory` tells its weights and the bytes per pixel of what it keeps.
            factor: pixels per side of a cell.
            on_gpu: it works on a graphics card.

        Raises:
            KeyError: the bundle, an old one, tells too little.
        """
        memory = decoder.memory or {}
        self._by_gpu_graph = takes_gpu_graph(decoder, on_gpu)
        self._weights, self._per_pixel = decoder.held_weights(self._by_gpu_graph), memory["per_pixel"]
        # Strips are float32 whatever layers are kept in; beside products of 8-bit numbers there are rounded ones.
        is_int8 = bool((decoder.quantization or {}).get("int8_convolutions"))
        self._strips = 16 if is_int8 else 4
        self._tiled = is_int8 and has_tiles()
        narrow = bool((decoder.quantization or {}).get("half_layers"))
        can_recompute = any(spec.name == "recompute" for spec in decoder.inputs)
        self._recomputes = can_recompute and not (on_gpu and narrow)
        self._recomputed = memory["per_pixel_recomputed"] if self._recomputes else self._per_pixel
        self._decoder = decoder
        self._factor, self._strip_pixels = factor, strip_pixels(decoder, on_gpu)
        self._on_card = ON_CARD[reads_pictures(decoder), narrow] if on_gpu else None

    def ways(self, base: int, rows: int, columns: int, images: int, tiling: Tiling, threads: int = 1) -> list[Way]:
        """Ways to decode, the fastest first.

        Args:
            base: what the process holds already.
            rows: of cells in a picture.
            columns: of cells.
            images: finished pictures that are kept.
            tiling: what the user allows.
            threads: that may work.
        """
        strips = 1 if tiling == "off" else strip_count(rows, columns, self._factor, self._strip_pixels)
        at_once = 1 if self._by_gpu_graph else strips_at_once(self._decoder, threads, strips)
        pixels = rows * columns * self._factor**2
        ways = [
            Way(base + self._peak(pixels, pixels // strips, images, recompute, 1), recompute)
            for recompute in self._choices(tiling)
        ]
        if at_once > 1 and not ways[0].recompute:
            peak = self._peak(pixels, pixels // strips, images, False, at_once)
            ways.insert(0, Way(base + peak, at_once=at_once))
        return ways

    def _choices(self, tiling: Tiling) -> list[bool]:
        """Whether layers may be computed again, in the order to be tried."""
        if not self._recomputes or tiling == "off":
            return [False]
        return [True] if tiling == "on" else [False, True]

    def _peak(self, pixels: int, strip: int, images: int, recompute: bool, at_once: int) -> int:
        """The decoder, open and at work, and the pictures.

        Args:
            pixels: of a picture.
            strip: pixels of one.
            images: finished pictures that are kept.
            recompute: whether layers are computed again.
            at_once: strips that are computed at the same time.
        """
        if self._on_card is not None:
            on_card = self._peak_on_card(self._on_card, pixels, strip, recompute)
            return self._weights + on_card + CUDNN_WORK_SPACE + ASIDE
        layers = (self._recomputed if recompute else self._per_pixel) * pixels
        # Recomputing is for where memory is short: then less of the heap is kept, and no tiles are multiplied.
        kept = 0 if recompute else KEPT - SPARING + TILED * self._tiled
        return (
            self._weights
            + layers
            + kept
            + self._strips * strip * self._per_pixel
            + (at_once - 1) * min(ANOTHER_STRIP, ANOTHER_LEAST + layers // 2)
            + ASIDE
            + (DECODED + PICTURE * images) * pixels
        )

    def _peak_on_card(self, shares: _OnCard, pixels: int, strip: int, recompute: bool) -> int:
        """Layers and strips; pictures are not kept there."""
        kept = ON_CARD_RECOMPUTED * self._recomputed if recompute else shares.layers * self._per_pixel
        again = ON_CARD_AGAIN if recompute else 1
        return int(kept * (pixels - strip) + again * shares.strip * self._per_pixel * strip)
