"""How much memory a codec's decoder takes, whatever the family it serves."""

from __future__ import annotations

from pochade.bundle import Component
from pochade.machine import has_tiles
from pochade.runtime.heap import KEPT, SPARING
from pochade.runtime.opening import takes_gpu_graph
from pochade.runtime.pipeline import Tiling
from pochade.runtime.plan import Way
from pochade.runtime.strips import strip_count, strip_pixels

ASIDE = 30_000_000
"""Bytes of what a session is beside its weights, small things, and holes in the heap."""

TILED = 40_000_000
"""Bytes that a convolution by tiles copies out at most (`pochade.quant.int8_conv`): 9 x 256 channels of a strip."""

DECODED, PICTURE = 12, 3
"""Bytes per pixel of what the decoder gives, and of a finished picture."""


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
        self._weights, self._per_pixel = decoder.held_weights(takes_gpu_graph(decoder, on_gpu)), memory["per_pixel"]
        # Strips are float32 whatever layers are kept in; beside products of 8-bit numbers there are rounded ones.
        is_int8 = bool((decoder.quantization or {}).get("int8_convolutions"))
        self._strips = 16 if is_int8 else 4
        self._tiled = is_int8 and has_tiles()
        self._recomputes = any(spec.name == "recompute" for spec in decoder.inputs)
        self._recomputed = memory["per_pixel_recomputed"] if self._recomputes else self._per_pixel
        self._factor, self._on_gpu = factor, on_gpu
        self._strip_pixels = strip_pixels(decoder, on_gpu)

    def ways(self, base: int, rows: int, columns: int, images: int, tiling: Tiling) -> list[Way]:
        """Ways to decode, the fastest first.

        Args:
            base: what the process holds already.
            rows: of cells in a picture.
            columns: of cells.
            images: finished pictures that are kept.
            tiling: what the user allows.
        """
        return [
            Way(base + self._peak(rows, columns, images, tiling, recompute), recompute)
            for recompute in self._choices(tiling)
        ]

    def _choices(self, tiling: Tiling) -> list[bool]:
        """Whether layers may be computed again, in the order to be tried."""
        if not self._recomputes or tiling == "off":
            return [False]
        return [True] if tiling == "on" else [False, True]

    def _peak(self, rows: int, columns: int, images: int, tiling: Tiling, recompute: bool) -> int:
        """The decoder, open and at work, and the pictures."""
        pixels = rows * columns * self._factor**2
        strip = pixels // (1 if tiling == "off" else strip_count(rows, columns, self._factor, self._strip_pixels))
        layers = (self._recomputed if recompute else self._per_pixel) * pixels
        # Recomputing is for where memory is short: then less of the heap is kept, and no tiles are multiplied.
        kept = 0 if recompute or self._on_gpu else KEPT - SPARING + TILED * self._tiled
        return (
            self._weights
            + layers
            + kept
            + self._strips * strip * self._per_pixel
            + ASIDE
            + (DECODED + PICTURE * images) * pixels
        )
