"""How much memory HunyuanDiT takes while it paints, phase by phase, on a CPU and on a card (see `meissonic_memory`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pochade.bundle import Bundle, Component
from pochade.runtime.codec_memory import ASIDE, CodecMemory
from pochade.runtime.expanded import ways_to_run
from pochade.runtime.pipeline import Tiling
from pochade.runtime.plan import Way, Workload
from pochade.runtime.rounded_attention import scores_at_a_time

FLOAT = 4
"""Bytes."""

WORK = 25
"""Layers of one cell's width that there are at a time while a block is computed, measured at 1024 and 4096 cells."""

HELD = 30_000_000
"""Bytes that stay of reading prompts: libraries, and holes in the heap where a tokenizer of 250 000 pieces was."""

EXPANDED = 2
"""Times a codec's weights are there while it opens, if they are kept in 8 bits: all are cast before all are scaled."""

FLOATS = ("fp32", "fp16")
"""Precisions of weights that are computed with as they are."""

NOT_EXPANDED = (*FLOATS, "int8")
"""Precisions whose weights an open session holds once, and in the form that `memory` counts."""

ROUNDED_SCORE = 9
"""Bytes of each score where attention multiplies 8-bit numbers: itself, its probability, and that rounded."""

PREPACKED = 1.15
"""Share of their weights that block-wise products hold in an open session."""

ADAPTED = 5
"""Layers of one cell's width more where an adapter changes the hidden layer."""


GPU_WORK, GPU_WORK_WHOLE = 28, 40
"""Layers of one cell's width that there are at a time on a card, skips included; more where products take whole weights
and not blocks. Of what CUDA's provider allocates (`pochade.benchmarks.null_cuda`) at 1024 to 4096 cells."""

GPU_EXPANDING = 70_000_000
"""Bytes of weights that are being expanded on a card."""

GPU_TEXT = 80_000_000
"""Bytes that the larger text encoder computes on a card, beside its weights."""

GPU_CONDITION = 1.5
"""Times the weights of `condition` are there on a card, if they are kept in 8 bits."""


class MemoryModel:
    """Predicts the resident set of the whole process or, on a card, what sessions allocate there; in bytes."""

    def __init__(self, bundle: Bundle, factor: int, nets: Sequence[Bundle], on_gpu: bool = False) -> None:
        """Read what the bundle tells; see `of`."""
        components = bundle.manifest.components
        self._on_gpu = on_gpu
        self._components = components
        outputs = {spec.name: spec.shape for spec in components["condition"].outputs}
        tokens = int(outputs["context"][1])
        self._context = tokens * int(outputs["context"][2])
        # The rows are a shift for every block, and shift and scale of the last layer.
        self._rows, self._dim = (int(size) for size in outputs["modulation"][2:4])
        blocks = self._rows - 2
        self._skips = blocks // 2
        # Keys and values of the text wait for no other layer, and ONNX Runtime computes those of all blocks first.
        self._text = blocks * 2 * tokens * self._dim * FLOAT
        self._patch = int(bundle.manifest.scheduler["patch"])
        self._nets = [net.manifest.components for net in nets]
        looped = (components["transformer"], *(net["controlnet"] for net in self._nets))
        self._loop_weights = sum(_loop_weights(component, on_gpu) for component in looped)
        transformer = components["transformer"]
        stored = _loop_weights(transformer, False)
        self._more = 0 if transformer.int8 is None else transformer.int8.weights - stored
        """Of the transformer, if its weights are expanded."""
        self._transformer = transformer
        self._codec = CodecMemory(components["vae_decoder"], factor, on_gpu)
        expanded = 1 if components["vae_decoder"].precision in NOT_EXPANDED else EXPANDED
        self._opening = expanded * self._weights("vae_decoder") + ASIDE
        self._encoder = CodecMemory(components["vae_encoder"], factor, on_gpu) if "vae_encoder" in components else None

    @classmethod
    def of(cls, bundle: Bundle, factor: int, nets: Sequence[Bundle] = (), on_gpu: bool = False) -> MemoryModel | None:
        """The model of a bundle; None for one that does not tell what its components take.

        Args:
            bundle: to be painted with.
            factor: pixels per side of a latent.
            nets: ControlNets to be used with it.
            on_gpu: on a graphics card.
        """
        try:
            model = cls(bundle, factor, nets, on_gpu)
            model.ways(Workload(1, 1, 1, 1, 1), "auto", 0)
        except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError):
            return None
        return model

    def ways(self, work: Workload, tiling: Tiling, base: int) -> dict[str, list[Way]]:
        """Ways to run each phase, the fastest first, `base` being taken already."""
        count = len(self._nets)
        modulation = work.steps * work.texts * (self._rows + count * self._skips) * self._dim * FLOAT
        kept = modulation + work.texts * (1 + count) * self._context * FLOAT
        told = [self._weights("condition"), *(net["condition"].held_weights() for net in self._nets)]
        expands = self._on_gpu and self._components["condition"].precision not in FLOATS
        conditions = int(max(told) * (GPU_CONDITION if expands else 1))
        encoders = max(self._weights("text_encoder"), self._weights("text_encoder_2")) + (
            GPU_TEXT if self._on_gpu else 0
        )
        # Tokenizers leave nothing on a card.
        first, later = {}, base + (0 if self._on_gpu else HELD)
        if work.encodes and self._encoder is not None:
            first["encode"] = self._encoder.ways(base, work.rows, work.columns, 1, tiling, work.threads)
        return first | {
            "text": [Way(base + encoders + ASIDE + work.adapters)],
            # What the session computes, gives, and what is copied of it so that the session can go.
            "condition": [Way(later + conditions + 2 * ASIDE + 3 * kept + work.adapters)],
            "denoise": ways_to_run(
                self._transformer, work, later + kept, lambda expanded: self._loop(work, expanded) + ASIDE
            ),
            "decode": [
                replace(way, peak=max(way.peak, later + self._opening))
                for way in self._codec.ways(later, work.rows, work.columns, work.images, tiling, work.threads)
            ],
        }

    def _weights(self, component: str) -> int:
        return self._components[component].held_weights(self._on_gpu)

    def _loop(self, work: Workload, expanded: bool) -> int:
        """The transformer, open and at work."""
        cells = work.rows * work.columns // self._patch**2
        layer = cells * self._dim * FLOAT
        # What is added to the skips is there twice while a net joins it, and once more for what the net before gave. A
        # change is computed beside the widest layer before it is added.
        adapted, joined = ADAPTED if work.adapters else 0, min(3, 1 + len(self._nets))
        if self._on_gpu:
            # Attention takes the text's keys and values in float16.
            precision = self._transformer.precision
            work_layers = GPU_WORK_WHOLE if precision in NOT_EXPANDED else GPU_WORK
            layers = work_layers + self._skips * (joined - 1) + adapted
            expanding = GPU_EXPANDING if precision == "int8" else 0
            return self._loop_weights + self._text // 2 + expanding + layers * layer + work.adapters
        skips, block = self._skips * joined, WORK + adapted
        # In the middle of the network all skips wait to be read, and half of the text's keys and values have been.
        computed = max(self._text + block * layer, self._text // 2 + (skips + block) * layer)
        computed += ROUNDED_SCORE * scores_at_a_time(self._transformer, cells)
        return self._loop_weights + (self._more if expanded else 0) + computed + work.adapters


def _prepacked(component: Component) -> float:
    """Share of the weights that an open session holds: block-wise products keep sums of their blocks."""
    return 1.0 if component.precision in NOT_EXPANDED else PREPACKED


def _loop_weights(component: Component, on_gpu: bool) -> int:
    """Bytes of a component's weights while it runs on every step."""
    on_card = on_gpu and component.gpu is not None
    return component.held_weights(True) if on_card else int(_prepacked(component) * component.held_weights())
