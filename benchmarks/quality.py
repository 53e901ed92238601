"""What bundles lose against the one they come from: numbers, tokens, pictures, and right pictures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pochade.bundle import Bundle
from pochade.errors import UsageError
from pochade.quant.fidelity import Call, Difference, Progress, open_pipeline, psnr, record, replay
from pochade.quant.trial import small_settings, typical_prompts
from pochade.runtime.pipeline import Pipeline, Result

LEVEL = 0.05
"""Significance level below which a difference is no longer called noise."""


@dataclass(frozen=True)
class PairedShares:
    """Right pictures of two bundles on the same prompts and seeds."""

    n: int
    reference: int
    """Right by the reference."""
    other: int
    only_reference: int
    """Right by the reference and wrong by the other."""
    only_other: int

    @classmethod
    def of(cls, reference: Sequence[bool], other: Sequence[bool]) -> PairedShares:
        """Count; both in the same order."""
        pairs = list(zip(reference, other, strict=True))
        return cls(
            len(pairs),
            sum(reference),
            sum(other),
            sum(a and not b for a, b in pairs),
            sum(b and not a for a, b in pairs),
        )

    @property
    def difference(self) -> float:
        """Other minus reference, in percentage points."""
        return 100 * (self.other - self.reference) / max(1, self.n)

    @property
    def p_value(self) -> float:
        """Exact two-sided McNemar test (McNemar 1947): how likely such a split is if neither is better."""
        from scipy.stats import binomtest

        discordant = self.only_reference + self.only_other
        return float(binomtest(self.only_other, discordant).pvalue) if discordant else 1.0

    @property
    def verdict(self) -> str:
        """`noise`, `worse` or `better`."""
        if self.p_value >= LEVEL:
            return "noise"
        return "better" if self.other > self.reference else "worse"

    def to_json(self) -> dict[str, Any]:
        """Everything counted, and what follows from it."""
        return {
            "n": self.n,
            "reference": self.reference,
            "other": self.other,
            "only_reference": self.only_reference,
            "only_other": self.only_other,
            "difference_points": round(self.difference, 2),
            "p_value": round(self.p_value, 4),
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class PictureDistance:
    """How far pictures painted with the same noise are apart, and how far other noise takes them."""

    psnr_db: float
    ssim: float
    other_seed_psnr_db: float
    """The reference against itself with the next seed: a distance that only says the pictures are different ones."""
    other_seed_ssim: float

    def to_json(self) -> dict[str, float]:
        """Rounded medians."""
        return {
            "psnr_db": round(self.psnr_db, 2),
            "ssim": round(self.ssim, 4),
            "other_seed_psnr_db": round(self.other_seed_psnr_db, 2),
            "other_seed_ssim": round(self.other_seed_ssim, 4),
        }


@dataclass(frozen=True)
class Quality:
    """What one bundle loses."""

    bundle: Bundle
    components: Mapping[str, Difference]
    forced: Difference
    """Draws of every step, each step starting from the reference's grid."""
    token_agreement: float | None
    """Equal cells of the final grids, every step starting from the bundle's own."""
    pictures: PictureDistance
    adherence: Mapping[str, PairedShares]
    """By category, for bundles whose pictures a checker can judge; and "all"."""

    def to_json(self) -> dict[str, Any]:
        """For files."""
        return {
            "name": self.bundle.manifest.name,
            "bytes": self.bundle.size,
            "components": {name: difference.to_json() for name, difference in self.components.items()},
            "tokens": {
                "forced_agreement": round(self.forced.agreement, 4) if self.forced.counted else None,
                "final_agreement": None if self.token_agreement is None else round(self.token_agreement, 4),
            },
            "pictures": self.pictures.to_json(),
            "adherence": {category: shares.to_json() for category, shares in self.adherence.items()},
        }


@dataclass(frozen=True)
class Comparison:
    """Bundles against the one they come from, on the same prompts and noise."""

    reference: Bundle
    settings: Mapping[str, Any]
    bundles: Sequence[Quality]

    def to_json(self) -> dict[str, Any]:
        """For files."""
        return {
            "reference": {"name": self.reference.manifest.name, "bytes": self.reference.size},
            "settings": dict(self.settings),
            "bundles": [quality.to_json() for quality in self.bundles],
        }


class _Sums:
    """What is measured of one bundle, picture after picture."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.pipe = open_pipeline(bundle)
        self.components: dict[str, Difference] = {}
        self.forced = Difference()
        self.agreements: list[float] = []
        self.distances: list[tuple[float, float, float, float]] = []

    def add(
        self, calls: Sequence[Call], prompt: str, expected: Result, elsewhere: Image.Image, **settings: Any
    ) -> None:
        """Repeat what the reference did, and paint the picture again.

        Args:
            calls: of the reference while it painted.
            prompt: of the picture.
            expected: what the reference painted.
            elsewhere: what it painted with other noise.
            settings: arguments of the pipeline.
        """
        replayed = replay(self.pipe, calls, lambda *_: None)
        for name, difference in replayed.components.items():
            self.components.setdefault(name, Difference()).merge(difference)
        self.forced.merge(replayed.forced)
        found = self.pipe(prompt, **settings)
        if expected.tokens:
            self.agreements.append(float((expected.tokens[0] == found.tokens[0]).mean()))
        image, again = expected.images[0], found.images[0]
        self.distances.append((psnr(image, again), ssim(image, again), psnr(image, elsewhere), ssim(image, elsewhere)))

    def quality(self, adherence: Mapping[str, PairedShares]) -> Quality:
        """All of it."""
        return Quality(
            self.bundle,
            self.components,
            self.forced,
            statistics.fmean(self.agreements) if self.agreements else None,
            PictureDistance(*(statistics.median(column) for column in zip(*self.distances, strict=True))),
            adherence,
        )


def compare(
    reference: Bundle,
    bundles: Sequence[Bundle],
    *,
    pictures: int = 4,
    adherence: int = 0,
    prompts: Sequence[str] = (),
    seed: int = 0,
    steps: int | None = None,
    progress: Progress,
) -> Comparison:
    """Compare bundles with the one they come from, on the CPU.

    Args:
        reference: usually the float bundle.
        bundles: usually quantized ones.
        pictures: pictures painted by all to compare numbers, tokens and pixels.
        adherence: pictures per category to judge, for starter bundles.
        prompts: taken in turn; without any, the typical ones of the model.
        seed: of the first picture; the next ones count up.
        steps: denoise steps of the compared pictures; without, the bundle's own, but at most 4 for pictures of more
            than 256x256 pixels, which are painted at 512x512 at most.
        progress: told what is done.

    Raises:
        UsageError: the bundles do not come from one source, or cannot be judged.
    """
    for bundle in bundles:
        check_one_source(reference, bundle)
    if adherence and not is_starter(reference):
        raise UsageError(f"only starter bundles can be judged for adherence, and {reference.manifest.name} is none")
    settings = small_settings(reference)
    if steps is not None:
        settings["num_inference_steps"] = steps
    texts = list(prompts) or typical_prompts(reference)
    ours, sums = open_pipeline(reference), [_Sums(bundle) for bundle in bundles]
    for i in range(pictures):
        prompt = texts[i % len(texts)]
        calls, expected = record(ours, prompt, seed + i, **settings)
        elsewhere = ours(prompt, seed=seed + pictures + i, **settings).images[0]
        for j, each in enumerate(sums):
            progress("painting and comparing", i * len(sums) + j, pictures * len(sums))
            each.add(calls, prompt, expected, elsewhere, seed=seed + i, **settings)
    shares = _adherence([ours, *(each.pipe for each in sums)], adherence, seed, progress)
    used = expected.settings
    return Comparison(
        reference,
        {key: used[key] for key in ("num_inference_steps", "guidance_scale", "width", "height")}
        | {"pictures": pictures, "seed": seed},
        [each.quality(found) for each, found in zip(sums, shares, strict=True)],
    )


def is_starter(bundle: Bundle) -> bool:
    """Whether the checker of the starter can judge its pictures."""
    return bundle.manifest.source.get("recipe") == "starter"


def check_one_source(reference: Bundle, other: Bundle) -> None:
    """Refuse bundles that cannot be compared.

    Raises:
        UsageError: they differ in more than how their weights are kept.
    """
    ours, theirs = reference.manifest, other.manifest
    for what, one, two in (
        ("family", ours.family, theirs.family),
        ("recipe", ours.source.get("recipe"), theirs.source.get("recipe")),
        ("scheduler", ours.scheduler, theirs.scheduler),
        ("components", set(ours.components), set(theirs.components)),
    ):
        if one != two:
            raise UsageError(f"{ours.name} and {theirs.name} do not come from one source: they differ in {what}")


def ssim(expected: Image.Image, found: Image.Image) -> float:
    """Structural similarity of the luma, -1 to 1 (Wang et al. 2004, IEEE TIP 13(4)), Gaussian window, deviation 1.5."""
    from scipy.ndimage import gaussian_filter

    def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
        out: NDArray[np.float64] = gaussian_filter(values, 1.5, truncate=3.5)
        return out

    x, y = (np.asarray(image.convert("L"), np.float64) for image in (expected, found))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = smooth(x), smooth(y)
    vx, vy, cov = smooth(x * x) - mx * mx, smooth(y * y) - my * my, smooth(x * y) - mx * my
    values = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(values.mean())


def _adherence(pipes: Sequence[Pipeline], n: int, seed: int, progress: Progress) -> list[dict[str, PairedShares]]:
    """Right pictures of every pipeline but the first beside the first's, by category and over all."""
    out: list[dict[str, PairedShares]] = [{} for _ in pipes[1:]]
    if not n:
        return out
    from pochade.starter.evaluate import CATEGORIES, cases, judge

    pooled: list[list[bool]] = [[] for _ in pipes]
    for i, category in enumerate(CATEGORIES):
        chosen = cases(category, n, seed)
        right = list[list[bool]]()
        for j, pipe in enumerate(pipes):
            progress("judging pictures", i * len(pipes) + j, len(CATEGORIES) * len(pipes))
            right.append([verdict.passed for verdict in judge(pipe, chosen, seed)])
            pooled[j] += right[j]
        for shares, verdicts in zip(out, right[1:], strict=True):
            shares[category] = PairedShares.of(right[0], verdicts)
    for shares, verdicts in zip(out, pooled[1:], strict=True):
        shares["all"] = PairedShares.of(pooled[0], verdicts)
    return out
