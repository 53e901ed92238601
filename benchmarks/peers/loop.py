"""The sampling loop around another runtime's networks, timed like ours.

Peers get what helps them as far as it is their user's choice and not their runtime's: guidance as two passes of one
picture (a batch of two takes longer), and a draw for cells that are still masked only, by an inverted cumulative sum in
numpy, which takes a quarter of the time of the published one.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pochade.benchmarks.card import watched_card
from pochade.runtime.memory import peak_memory
from pochade.runtime.rng import PhiloxNoise
from pochade.runtime.schedulers.masked import MaskedSchedule

CHUNK = 256
"""Rows of logits drawn from at a time; more do not fit into the cache (perf: 172 against 280 ms)."""

TEMPERATURE = (2.0, 0.01)

Array = NDArray[Any]


@dataclass(frozen=True)
class Step:
    """What a step starts from, beside the logits."""

    tokens: Array
    """(1, height, width) int64."""
    guidance: float
    draw: Array
    """Uniform numbers (cells)."""
    keep: Array
    """Uniform numbers (cells)."""
    temperature: float
    """Of the noise on confidence."""
    num_masked: int
    """Cells to mask again; 0 on the last step."""
    mask_token_id: int


class Networks(Protocol):
    """The networks of a checkpoint, loaded."""

    def encode(self, input_ids: Array) -> tuple[Any, Any]:
        """Text states and pooled vector of token ids (1, tokens)."""

    def logits(self, tokens: Array, states: Any, pooled: Any, micro_conds: Array, timestep: Array) -> Array:
        """Float32 logits (cells, codes) of a grid (1, height, width)."""

    def decode(self, tokens: Array) -> Array:
        """Picture (1, 3, height, width) of a grid."""

    def sample(self, step: Step, logits: list[Any]) -> Array:
        """The next grid, of what `logits` gave for the prompt and, with guidance, for the negative prompt."""


class Clock:
    """Seconds of what happens, by component."""

    def __init__(self) -> None:
        self.components: dict[str, dict[str, list[float]]] = defaultdict(lambda: {"opened": [], "ran": []})

    @contextmanager
    def __call__(self, component: str, what: str = "ran") -> Iterator[None]:
        """Time what happens inside."""
        start = time.perf_counter()
        yield
        self.components[component][what].append(time.perf_counter() - start)


def run(load: Callable[[Mapping[str, Any], Clock], tuple[Networks, Array, Mapping[str, Any]]]) -> None:
    """Do the job on stdin and print its figures.

    Args:
        load: gives the networks, token ids of prompt and negative prompt (2, tokens), and the scheduler's facts.
    """
    job = json.load(sys.stdin)
    clock = Clock()
    with watched_card(job["device"]) as card:
        networks, ids, scheduler = load(job, clock)
        start = time.perf_counter()
        paint(networks, ids, scheduler, job["settings"], clock)
        painted = time.perf_counter() - start
    figures = {
        "picture": painted,
        "cpu": time.process_time(),
        "peak_rss": peak_memory(),
        "peak_vram": card.bytes,
        "components": clock.components,
    }
    print(json.dumps(figures))


def paint(
    networks: Networks, ids: Array, scheduler: Mapping[str, Any], settings: Mapping[str, Any], clock: Clock
) -> Array:
    """One picture.

    Args:
        networks: loaded.
        ids: token ids of prompt and negative prompt, (2, tokens).
        scheduler: mask_token_id, masking_schedule and codec_factor.
        settings: width, height, num_inference_steps, guidance_scale and seed.
        clock: told about every part.
    """
    height, width = (int(settings[side]) // scheduler["codec_factor"] for side in ("height", "width"))
    steps, guidance = int(settings["num_inference_steps"]), float(settings["guidance_scale"])
    schedule = MaskedSchedule.create(steps, height * width, TEMPERATURE, scheduler["masking_schedule"])
    noise = PhiloxNoise(int(settings["seed"]))
    micro = np.array([[settings["width"], settings["height"], 0, 0, 6.0]], np.float32)
    with clock("text_encoder"):
        texts = [networks.encode(row[None]) for row in (ids if guidance > 1 else ids[:1])]
    clock.components["condition"]["ran"].append(0.0)  # peers compute it anew in every pass
    tokens = np.full((1, height, width), scheduler["mask_token_id"], np.int64)
    for step, timestep in enumerate(schedule.timesteps):
        logits = []
        for text in texts:
            with clock("transformer"):
                logits.append(networks.logits(tokens, *text, micro, np.array([timestep], np.float32)))
        with clock("sampler"):
            draw, keep = noise.draw(0, step, tokens.size), noise.keep(0, step, tokens.size)
            confident, masked = float(schedule.temperatures[step]), int(schedule.num_masked[step])
            mask = int(scheduler["mask_token_id"])
            tokens = networks.sample(Step(tokens, guidance, draw, keep, confident, masked, mask), logits)
    with clock("vq_decoder"):
        return networks.decode(tokens)


def sample(step: Step, logits: list[Array]) -> Array:
    """The next grid on the host: a draw for every masked cell, and the least confident ones masked again.

    Args:
        step: where it starts.
        logits: of the prompt and, with guidance, of the negative prompt, each (cells, codes).
    """
    flat = step.tokens.reshape(-1).copy()
    rows = np.flatnonzero(flat == step.mask_token_id)
    confidence = np.full(flat.size, np.inf, np.float32)
    for start in range(0, len(rows), CHUNK):
        here = rows[start : start + CHUNK]
        mixed = logits[0][here]
        if len(logits) > 1:
            mixed = logits[1][here] + np.float32(step.guidance) * (mixed - logits[1][here])
        p = np.exp(mixed - mixed.max(-1, keepdims=True))
        upto = p.cumsum(-1)
        target = step.draw[here, None] * upto[:, -1:]
        codes = np.minimum((upto <= target).sum(-1), p.shape[1] - 1)
        flat[here] = codes
        confidence[here] = np.log(p[np.arange(len(here)), codes] / upto[:, -1])
    if step.num_masked:
        gumbel = -np.log(np.maximum(-np.log(np.maximum(step.keep, 1e-20)), 1e-20))
        confidence += np.float32(step.temperature) * gumbel
        count = max(1, min(len(rows) - 1, step.num_masked))
        cut = np.partition(confidence, count)[count]
        flat[confidence < cut] = step.mask_token_id
    return flat.reshape(step.tokens.shape)
