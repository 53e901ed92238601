"""Trains the starter's transformer and text encoder; `pochade.starter.build` calls it."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pochade.starter.captions import caption
from pochade.starter.checkpoint import LOG, STATE
from pochade.starter.codes import scene_codes
from pochade.starter.data import Batch, Batches
from pochade.starter.draw import random_scene
from pochade.starter.fast import autocast, fast_dtype
from pochade.starter.model import MASK, Painter
from pochade.starter.muon import Muon
from pochade.starter.schedule import Budget, rate_factor
from pochade.starter.shapes import GRID

log = logging.getLogger(__name__)

EMA = 0.999


Features = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Painter.cell_features, compiled or not."""


def masked_loss(painter: Painter, batch: Batch, cell_features: Features) -> Tensor:
    """Mean cross-entropy in nats at the batch's chosen masked cells, averaged per picture."""
    with autocast():
        features = cell_features(batch.tokens, batch.ids, batch.steps)
        # The head only where the loss looks.
        features = features.gather(1, batch.cells[..., None].expand(-1, -1, features.shape[-1]))
        logits = painter.logits(features)
    losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), reduction="none")
    return (losses * batch.weights.flatten()).sum()


def _is_matrix(name: str, weight: Tensor) -> bool:
    """Whether Muon should train this weight: a hidden matrix, no table, head or modulation."""
    skipped = ("embedding", "norm1", "norm.linear", "conv", "cond_embed", "time_text_embed")
    return weight.ndim == 2 and not any(part in name for part in skipped)


def optimisers(painter: Painter, rate: float, muon: bool) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices (if wanted) and AdamW for everything else."""
    named = list(painter.named_parameters())
    matrices = [w for name, w in named if muon and _is_matrix(name, w)]
    chosen = {id(w) for w in matrices}
    rest = [w for _, w in named if id(w) not in chosen]
    decayed = [w for w in rest if w.ndim > 1]
    plain = [w for w in rest if w.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}]
    out: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)]
    if matrices:
        out.append(Muon(matrices, rate, 0.02, fast_dtype()))
    for group in (g for o in out for g in o.param_groups):
        group["peak"] = group["lr"]
    return out


@dataclass(frozen=True)
class CaptionTest:
    """Fixed scenes, fully masked: does the caption tell the model what to paint?"""

    ids: dict[str, Tensor]
    """Prompts by kind: true, empty, wrong (another scene's)."""
    targets: Tensor
    """True codes, int64 (n, cells)."""

    @classmethod
    def build(cls, batches: Batches, n: int = 48) -> CaptionTest:
        """The test for the scenes of a fixed seed."""
        rng = np.random.default_rng(1)
        scenes = [random_scene(rng) for _ in range(n)]
        texts = [caption(scene, rng) for scene in scenes]
        kinds = {"true": texts, "empty": [""] * n, "wrong": texts[1:] + texts[:1]}
        ids = {kind: torch.from_numpy(batches.tokenizer(lines)) for kind, lines in kinds.items()}
        return cls(ids, torch.from_numpy(np.stack([scene_codes(scene).ravel() for scene in scenes])))

    def run(self, painter: Painter) -> dict[str, float]:
        """Cross-entropy at full mask in nats per cell, for each kind of prompt."""
        tokens = torch.full((len(self.targets), GRID, GRID), MASK)
        steps = torch.full((1,), 63)
        with torch.no_grad(), autocast():
            logits = {kind: painter(tokens, ids, steps) for kind, ids in self.ids.items()}
        flat = self.targets.flatten()
        return {
            k: round(nn.functional.cross_entropy(v.float().flatten(0, 1), flat).item(), 4) for k, v in logits.items()
        }


class Trainer:
    """Everything a run needs to go on after an interruption."""

    def __init__(
        self, batches: Batches, rate: float, muon: bool, seed: int, compiled: bool = False, **sizes: int
    ) -> None:
        torch.manual_seed(seed)
        self.batches = batches
        self.painter = Painter(len(batches.tokenizer.ids), **sizes)
        # The rotary table is the same in every step.
        self.painter.transformer.rope = functools.cache(self.painter.transformer.rope)  # type: ignore[method-assign]
        self.cell_features: Features = self.painter.cell_features
        if compiled:
            self.cell_features = torch.compile(self.painter.cell_features)
        self.ema = {name: weight.clone() for name, weight in self.painter.state_dict().items()}
        self.optimisers = optimisers(self.painter, rate, muon)
        self.step = 0

    def train_step(self, progress: float) -> float:
        """One step; the loss in nats."""
        factor = rate_factor(self.step, progress)
        for group in (g for o in self.optimisers for g in o.param_groups):
            group["lr"] = group["peak"] * factor
        loss = masked_loss(self.painter, self.batches.next(), self.cell_features)
        loss.backward()
        nn.utils.clip_grad_norm_(self.painter.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        # Early averages must not remember the random start.
        keep = min(EMA, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            weights = list(self.painter.state_dict().values())
            torch._foreach_lerp_(list(self.ema.values()), weights, 1 - keep)
        return float(loss.detach())

    def save(self, folder: Path, spent: float) -> None:
        """Write the state; a half-written file never takes its place."""
        state: dict[str, Any] = {
            "painter": self.painter.state_dict(),
            "ema": self.ema,
            "optimisers": [o.state_dict() for o in self.optimisers],
            "step": self.step,
            "batch": self.batches.size,
            "spent": spent,
            "rng": json.dumps(self.batches.rng.bit_generator.state),
            "merges": self.batches.tokenizer.merges,
        }
        torch.save(state, folder / (STATE + ".new"))
        (folder / (STATE + ".new")).replace(folder / STATE)

    def resume(self, folder: Path) -> float:
        """Continue from a saved state, if there is one; the seconds it had used."""
        if not (folder / STATE).exists():
            return 0.0
        state = torch.load(folder / STATE, weights_only=True)
        self.painter.load_state_dict(state["painter"])
        self.ema = state["ema"]
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step = state["step"]
        self.batches.rng.bit_generator.state = json.loads(state["rng"])
        return float(state["spent"])


SEPARATED_BY = 300
"""Step at which the caption test must have separated."""

SEPARATION = 0.5
"""Nats by which a picture's own caption must explain it better than none."""


class CaptionIgnoredError(RuntimeError):
    """The text does not reach the picture; more training would not mend that."""


def run(trainer: Trainer, folder: Path, budget: Budget, save_minutes: float = 3.0, test_steps: int = 100) -> None:
    """Train until the budget is used, logging to `log.jsonl` in the folder.

    Raises:
        CaptionIgnoredError: the caption test has not separated in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    budget.spent = trainer.resume(folder)
    test, size = CaptionTest.build(trainer.batches), trainer.batches.size
    saved, losses = budget.seconds(), []
    while (progress := budget.progress(trainer.step * size)) < 1:
        losses.append(trainer.train_step(progress))
        if trainer.step % test_steps == 0:
            row = {
                "step": trainer.step,
                "seconds": round(budget.seconds(), 1),
                "loss": round(float(np.mean(losses)), 4),
            }
            row |= test.run(trainer.painter)
            losses.clear()
            log.info(json.dumps(row))
            with (folder / LOG).open("a") as file:
                file.write(json.dumps(row) + "\n")
            if trainer.step >= SEPARATED_BY and row["empty"] - row["true"] < SEPARATION:
                raise CaptionIgnoredError(
                    f"after {trainer.step} steps a caption explains its picture no better than none does "
                    f"({row['true']} and {row['empty']} nats): stopped; see docs/train-your-own.md"
                )
        if budget.seconds() - saved > 60 * save_minutes:
            trainer.save(folder, budget.seconds())
            saved = budget.seconds()
    trainer.save(folder, budget.seconds())
