"""Measures how often pictures show what their prompts say, per category, with 95 % intervals."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import pochade
import pochade.runtime.pipeline
from pochade.starter.captions import caption, plain_caption
from pochade.starter.checker import Verdict, check
from pochade.starter.draw import (
    HELD_OUT_PAIRS,
    HELD_OUT_RELATIONS,
    all_pairs,
    backdrop,
    count,
    different_pairs,
    face,
    pick,
    random_of,
    random_scene,
    relation,
    single,
)
from pochade.starter.scenes import MOODS, SETTINGS, Scene, render
from pochade.starter.shapes import BACKGROUNDS, COLOURS

Case = tuple[Scene, str]
"""A scene and the prompt that asks for it."""

AT_ONCE = 16
"""Pictures painted by one call."""

SEEN = all_pairs(held_out=False)


def _singles(i: int, _: np.random.Generator) -> Case:
    scene = single(SEEN[i % len(SEEN)])
    # The plain prompt is what a user types first.
    return scene, plain_caption(scene)


def _held_out_pairs(i: int, rng: np.random.Generator) -> Case:
    pairs = sorted(HELD_OUT_PAIRS)
    scene = single(pairs[i % len(pairs)], "small" if i // len(pairs) % 4 == 3 else "large")
    return scene, caption(scene, rng)


def _places(i: int, rng: np.random.Generator) -> Case:
    place = (int(rng.integers(-1, 2)), int(rng.integers(-1, 2)))
    scene = single(SEEN[i % len(SEEN)], ("small", "large")[i % 2], place)
    return scene, caption(scene, rng)


def _backgrounds(i: int, rng: np.random.Generator) -> Case:
    settings = [*BACKGROUNDS, *SETTINGS]
    scene = backdrop(single(pick(SEEN, rng)), settings[1 + i % (len(settings) - 1)], rng)
    return scene, caption(scene, rng)


def _two(rng: np.random.Generator, differ: bool = False) -> tuple[tuple[str, str], tuple[str, str]]:
    """Two pairs; with `differ`, of different colours and different shapes."""
    while True:
        first, second = different_pairs(rng, 2, SEEN)
        if not differ or (first[0] != second[0] and first[1] != second[1]):
            return first, second


def _binding(_: int, rng: np.random.Generator) -> Case:
    while True:
        first, second = _two(rng, differ=True)
        if (first[1], "x", second[1]) not in HELD_OUT_RELATIONS:
            break
    prompt = "a {} {} and a {} {}".format(*first, *second).replace("a orange", "an orange")
    return relation(first, second, "x"), prompt


def _relations(i: int, rng: np.random.Generator) -> Case:
    while True:
        first, second = _two(rng)
        if (first[1], "xy"[i % 2], second[1]) not in HELD_OUT_RELATIONS:
            break
    scene = relation(first, second, "xy"[i % 2])
    return scene, caption(scene, rng)


def _held_out_relations(i: int, rng: np.random.Generator) -> Case:
    shapes = sorted(HELD_OUT_RELATIONS)
    above, axis, below = shapes[i % len(shapes)]
    first = pick([pair for pair in SEEN if pair[1] == above], rng)
    second = pick([pair for pair in SEEN if pair[1] == below], rng)
    scene = relation(first, second, axis)
    return scene, caption(scene, rng)


def _counts(i: int, rng: np.random.Generator) -> Case:
    scene = count(SEEN[i % len(SEEN)], 2 + i // len(SEEN) % 2)
    return scene, caption(scene, rng)


def _threes(_: int, rng: np.random.Generator) -> Case:
    scene = random_of("three", rng, SEEN)
    return scene, caption(scene, rng)


def _faces(i: int, rng: np.random.Generator) -> Case:
    scene = face(list(COLOURS)[i % len(COLOURS)], MOODS[i // len(COLOURS) % len(MOODS)])
    return scene, caption(scene, rng)


def _houses(_: int, rng: np.random.Generator) -> Case:
    scene = random_of("house", rng, SEEN)
    return scene, caption(scene, rng)


def _held_out_templates(_: int, rng: np.random.Generator) -> Case:
    scene = random_scene(rng)
    return scene, caption(scene, rng, held_out=True)


def _english(_: int, rng: np.random.Generator) -> Case:
    scene = random_scene(rng)
    # The generator goes on in both languages with the same draws, so their scenes are the same.
    words = np.random.default_rng(int(rng.integers(1 << 32)))
    return scene, caption(scene, words)


def _chinese(_: int, rng: np.random.Generator) -> Case:
    scene = random_scene(rng)
    words = np.random.default_rng(int(rng.integers(1 << 32)))
    return scene, caption(scene, words, "zh")


CATEGORIES: dict[str, Callable[[int, np.random.Generator], Case]] = {
    "single": _singles,
    "held-out pair": _held_out_pairs,
    "place": _places,
    "background": _backgrounds,
    "binding": _binding,
    "relation": _relations,
    "held-out relation": _held_out_relations,
    "count": _counts,
    "three": _threes,
    "face": _faces,
    "house": _houses,
    "held-out template": _held_out_templates,
    "english": _english,
    "chinese": _chinese,
}
"""Makes the i-th case of a category. "english" and "chinese" are the same scenes, of all kinds, in both languages."""


@dataclass(frozen=True)
class Share:
    """Right pictures out of n."""

    right: int
    n: int

    @property
    def value(self) -> float:
        """The share, 0 to 1."""
        return self.right / max(1, self.n)

    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson score interval of the share."""
        z, n = 1.959964, max(1, self.n)
        middle, half = (
            self.value + z * z / (2 * n),
            z * math.sqrt(self.value * (1 - self.value) / n + z * z / (4 * n * n)),
        )
        return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.right}/{self.n} = {self.value:.1%} ({low:.1%} to {high:.1%})"


def cases(category: str, n: int, seed: int = 0) -> list[Case]:
    """The first n cases of one of CATEGORIES; a longer list begins with a shorter one."""
    rng = np.random.default_rng(seed)
    make = CATEGORIES[category]
    return [make(i, rng) for i in range(n)]


def judge(
    pipe: pochade.runtime.pipeline.Pipeline, chosen: Iterable[Case], seed: int = 0, **settings: Any
) -> list[Verdict]:
    """Paint every case, the i-th with seed + i, and check the pictures.

    Args:
        pipe: an opened starter bundle.
        chosen: scenes and prompts.
        seed: of the first picture.
        settings: arguments of the pipeline beside prompt and seed.
    """
    todo, verdicts = list(chosen), list[Verdict]()
    for start in range(0, len(todo), AT_ONCE):
        part = todo[start : start + AT_ONCE]
        # Pictures of one call have consecutive seeds, and sessions are opened once for all of them.
        pictures = pipe([prompt for _, prompt in part], seed=seed + start, **settings).images
        verdicts += [check(np.asarray(picture), scene) for picture, (scene, _) in zip(pictures, part, strict=True)]
    return verdicts


def share_of(verdicts: list[Verdict]) -> Share:
    """How many passed."""
    return Share(sum(verdict.passed for verdict in verdicts), len(verdicts))


def checker_shares(n: int, seed: int = 1) -> tuple[Share, Share]:
    """How often the checker passes true pictures, and how often pictures of other scenes; n of each."""
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng, held_out=True) for _ in range(n)]
    pictures = [render(scene) for scene in scenes]
    true = [check(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    others = scenes[1:] + scenes[:1]
    wrong = [
        check(picture, other)
        for picture, scene, other in zip(pictures, scenes, others, strict=True)
        # Twins by chance are no error.
        if other.undecorated() != scene.undecorated()
    ]
    return share_of(true), share_of(wrong)


def main(argv: list[str] | None = None) -> None:
    """Command line: evaluate a bundle as users paint with it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", nargs="?", default="starter", help="bundle folder or installed name")
    parser.add_argument("-n", type=int, default=128, help="pictures per category")
    parser.add_argument("--categories", nargs="+", default=list(CATEGORIES), choices=CATEGORIES, metavar="CATEGORY")
    parser.add_argument("--steps", type=int, help="denoise steps (default: the bundle's)")
    parser.add_argument("--guidance", type=float, help="guidance (default: the bundle's)")
    parser.add_argument("--temperature", type=float, nargs=2, help="first and last (default: the bundle's)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next ones count up")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args(argv)
    rows: dict[str, Any] = {}
    with pochade.load(args.bundle, device="cpu") as pipe:
        settings = {
            "num_inference_steps": args.steps,
            "guidance_scale": args.guidance,
            "temperature": tuple(args.temperature) if args.temperature else None,
        }
        for category in args.categories:
            verdicts = judge(pipe, cases(category, args.n, args.seed), args.seed, **settings)
            share = share_of(verdicts)
            reasons = Counter(reason for verdict in verdicts for reason in verdict.reasons)
            print(f"{category:18} {share}", dict(reasons.most_common(3)), flush=True)
            rows[category] = {"right": share.right, "n": share.n, "interval": share.interval()}
    total = Share(sum(row["right"] for row in rows.values()), sum(row["n"] for row in rows.values()))
    print(f"{'all':18} {total}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
