"""Measures how often pictures show what their prompts say, per category, with 95 % intervals."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pochade
import pochade.runtime.pipeline
from starter.captions import caption, plain_caption
from starter.checker import check
from starter.scenes import BACKGROUNDS, Scene, all_pairs, count, relation, single

Pictures = Callable[[Sequence[str], Sequence[int]], list[NDArray[np.uint8]]]
"""A picture source: prompts and seeds to uint8 RGB pictures."""

CATEGORIES = ("single", "small", "background", "count", "relation", "chinese")


@dataclass(frozen=True)
class Share:
    """Right pictures out of n."""

    right: int
    n: int

    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson score interval of the share."""
        z, n = 1.959964, max(1, self.n)
        p = self.right / n
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.right}/{self.n} = {self.right / max(1, self.n):.1%} ({low:.1%} to {high:.1%})"


def cases(category: str, n: int, rng: np.random.Generator) -> list[tuple[Scene, str]]:
    """N scenes with prompts. Pairs of colour and shape take turns, so all are covered evenly."""
    pairs = all_pairs()
    out: list[tuple[Scene, str]] = []
    for i in range(n):
        pair = pairs[i % len(pairs)]
        other = pairs[(i + 1 + int(rng.integers(len(pairs) - 1))) % len(pairs)]
        background = list(BACKGROUNDS)[1 + int(rng.integers(len(BACKGROUNDS) - 1))]
        language = "zh" if category == "chinese" else "en"
        match category:
            case "single" | "chinese":
                scene = single(pair, rng)
            case "small":
                scene = single(pair, rng, size="small")
            case "background":
                scene = single(pair, rng, background=background)
            case "count":
                scene = count(pair, 2 + i // len(pairs) % 2)
            case _:
                scene = relation(pair, other, "xy"[i % 2], rng)
        # Singles with the plain prompt a user would type first, the rest in any wording.
        prompt = plain_caption(scene) if category == "single" else caption(scene, rng, language)
        out.append((scene, prompt))
    return out


def adherence(pictures: Pictures, category: str, n: int, seed: int = 0) -> tuple[Share, Counter[str]]:
    """Share of right pictures in a category, and how often each reason made one wrong."""
    chosen = cases(category, n, np.random.default_rng(seed))
    painted = pictures([prompt for _, prompt in chosen], [seed + i for i in range(n)])
    verdicts = [check(picture, scene) for picture, (scene, _) in zip(painted, chosen, strict=True)]
    reasons = Counter(reason for verdict in verdicts for reason in verdict.reasons)
    return Share(sum(verdict.passed for verdict in verdicts), n), reasons


def bundle_pictures(pipe: pochade.runtime.pipeline.Pipeline, **settings: Any) -> Pictures:
    """The picture source of an opened bundle; `settings` are arguments of the pipeline beside prompt and seed."""

    def pictures(prompts: Sequence[str], seeds: Sequence[int]) -> list[NDArray[np.uint8]]:
        images = [pipe(p, seed=s, **settings).images[0] for p, s in zip(prompts, seeds, strict=True)]
        return [np.asarray(image) for image in images]

    return pictures


def main(argv: list[str] | None = None) -> None:
    """Command line: evaluate a bundle as users paint with it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", nargs="?", default="starter", help="bundle folder or installed name")
    parser.add_argument("-n", type=int, default=128, help="pictures per category")
    parser.add_argument("--categories", nargs="+", default=CATEGORIES, choices=CATEGORIES)
    parser.add_argument("--steps", type=int, help="denoise steps (default: the bundle's)")
    parser.add_argument("--guidance", type=float, help="guidance (default: the bundle's)")
    parser.add_argument("--temperature", type=float, nargs=2, help="first and last (default: the bundle's)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next ones count up")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args(argv)
    rows = {}
    with pochade.load(args.bundle, device="cpu") as pipe:
        temperature = tuple(args.temperature) if args.temperature else None
        pictures = bundle_pictures(
            pipe, num_inference_steps=args.steps, guidance_scale=args.guidance, temperature=temperature
        )
        for category in args.categories:
            share, reasons = adherence(pictures, category, args.n, args.seed)
            print(f"{category:12} {share}", dict(reasons.most_common(3)), flush=True)
            rows[category] = {"right": share.right, "n": share.n, "interval": share.interval()}
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
