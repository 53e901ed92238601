"""How much memory Meissonic and Monetico take while they paint.

Every phase takes what the process holds already, the weights of its sessions, and what is computed at a time. The
latter is counted in the tensors whose shapes the bundle tells; how many of them there are at once was measured, on a
CPU (`pochade.benchmarks.budgets`) and of what CUDA's provider allocates (`pochade.benchmarks.null_cuda`).
"""

from __future__ import annotations

from pochade.bundle import Bundle
from pochade.runtime.codec_memory import ASIDE, CodecMemory
from pochade.runtime.expanded import ways_to_run
from pochade.runtime.pipeline import Tiling
from pochade.runtime.plan import Way, Workload
from pochade.runtime.rounded_attention import scores_at_a_time

FLOAT = 4
"""Bytes."""

HEAD_CHUNK = 512
"""Cells that the sampler computes logits of at a time; pochade.export.sampler has the same number."""

HOLES = 40_000_000
"""Bytes of holes in the heap that many steps leave; 16 of them take 30 MB more than one."""

ROUNDED_ATTENTION, ROUNDED_SCORE = 12_000_000, 4
"""Bytes of constants where attention multiplies 8-bit numbers, and of each score; there are more while the widest
layers are not."""

GPU_TENSORS, GPU_TENSORS_EXPANDED = 7, 11
"""Layers of one cell's width that there are at a time on a card; more where products expand their weights before."""

GPU_EXPANDED = 1.15
"""Share of weights of 8 bits that is there on a card with those that are being expanded."""

GPU_TEXT = 8_000_000
"""Bytes more on a card while texts are encoded: weights of 8 bits that are expanded for their product."""

GPU_CONDITION = 1.1
"""Times the weights of `condition` are there on a card, for the same reason."""


class MemoryModel:
    """Predicts the resident set of the whole process or, on a card, what sessions allocate there; in bytes."""

    def __init__(self, bundle: Bundle, factor: int, on_gpu: bool = False) -> None:
        """Read what the bundle tells; see `of`."""
        components = bundle.manifest.components
        self._on_gpu = on_gpu
        self._expands = components["transformer"].precision == "int8"
        self._components = components
        outputs = {spec.name: spec.shape for spec in components["condition"].outputs}
        self._dim = int(outputs["context"][2])
        self._rows = int(outputs["modulation"][2])
        self._text, self._patch = int(outputs["context"][1]), int(bundle.manifest.scheduler["patch"])
        self._codes = components["sampler"].num_parameters // self._dim
        self._blocks = components["transformer"].precision not in ("fp32", "fp16", "int8")
        self._expanded = int8.weights if (int8 := components["transformer"].int8) is not None else 0
        self._transformer = components["transformer"]
        self._noise = any(spec.name == "noise" for spec in components["transformer"].inputs)
        self._codec = CodecMemory(components["vq_decoder"], factor, on_gpu)

    @classmethod
    def of(cls, bundle: Bundle, factor: int, on_gpu: bool = False) -> MemoryModel | None:
        """The model of a bundle; None for one that was made before bundles told what they take.

        Args:
            bundle: to be painted with.
            factor: pixels per side of a cell.
            on_gpu: on a graphics card.
        """
        try:
            model = cls(bundle, factor, on_gpu)
            model.ways(Workload(1, 1, 1, 1, 1), "auto", 0)
        except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError):
            return None
        return model

    def ways(self, work: Workload, tiling: Tiling, base: int) -> dict[str, list[Way]]:
        """Ways to run each phase, the fastest first, `base` being taken already."""
        modulation = work.steps * work.texts * self._rows * self._dim * FLOAT
        text, times = (GPU_TEXT, GPU_CONDITION) if self._on_gpu else (0, 1)
        condition = int(times * self._weights("condition"))
        return {
            "text": [Way(base + self._weights("text_encoder") + text + ASIDE + work.adapters)],
            # What the session computes, gives, and what is copied of it so that the session can go.
            "condition": [Way(base + condition + ASIDE + 3 * modulation + work.adapters)],
            "denoise": ways_to_run(
                self._transformer, work, base + modulation, lambda expanded: self._loop(work, expanded) + ASIDE
            ),
            "decode": self._codec.ways(base, work.rows, work.columns, work.images, tiling, work.threads),
        }

    def _weights(self, component: str) -> int:
        return self._components[component].held_weights(self._on_gpu)

    def _loop(self, work: Workload, expanded: bool) -> int:
        """Transformer and sampler, open and at work."""
        if self._on_gpu:
            return self._gpu_loop(work)
        # Block-wise products keep sums of their blocks, the sampler its head as it came and laid out anew.
        prepacked = 1.11 if self._blocks else 1.0
        transformer = self._expanded if expanded else prepacked * self._weights("transformer")
        weights = transformer + 2 * self._weights("sampler")
        # Noise that a family starts from is a tensor more.
        # A change is computed beside the widest layer before it is added.
        tensors = (11.5 if self._noise else 10.5) + (7 if work.adapters else 0)
        cells = tensors * work.rows * work.columns * self._dim
        logits = 4.5 * HEAD_CHUNK * self._codes
        scores = scores_at_a_time(self._transformer, self._text + work.rows * work.columns // self._patch**2)
        attention = ROUNDED_ATTENTION + ROUNDED_SCORE * scores if scores else 0
        return int(weights + (cells + logits) * FLOAT + attention + HOLES + work.adapters)

    def _gpu_loop(self, work: Workload) -> int:
        """The same on a card."""
        expanded, tensors = (GPU_EXPANDED, GPU_TENSORS_EXPANDED) if self._expands else (1.0, GPU_TENSORS)
        # The sampler's head is expanded to float32 before its loop.
        weights = expanded * self._weights("transformer") + (5 if self._expands else 2) * self._weights("sampler")
        cells = (tensors + (7 if work.adapters else 0)) * work.rows * work.columns * self._dim
        logits = 4.5 * HEAD_CHUNK * self._codes
        return int(weights + (cells + logits) * FLOAT + work.adapters)
