"""Bundles beside other runtimes on one checkpoint: the same prompt, size, steps and threads, taking turns."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pochade.benchmarks.speed import Case, Figures, Report
from pochade.export.families.meissonic import Meissonic

PEERS: Mapping[str, tuple[str, str]] = {
    "PyTorch fp32": ("torch_child", "fp32"),
    "PyTorch bf16": ("torch_child", "bf16"),
    "PyTorch fp16": ("torch_child", "fp16"),
    "PyTorch fp16 compiled": ("torch_child", "fp16 compiled"),
    "OpenVINO bf16": ("openvino_child", "bf16"),
    "OpenVINO int8": ("openvino_child", "int8"),
    "OpenVINO int4": ("openvino_child", "int4"),
}
"""Name, module that runs it, and its variant. OpenVINO computes in bfloat16 whatever its weights are kept in."""

RATIOS = ("step", "picture_loaded", "picture_from_files", "text", "decode")
"""What is compared. Peers open all models before a picture and keep them, bundles theirs while they paint: so pictures
are compared without it on both sides, and with it."""


def peer_cases(checkpoint: Path, models: Path | None, names: Sequence[str]) -> Iterator[Case]:
    """A case for each name of PEERS.

    Args:
        checkpoint: in the published layout.
        models: folder of `openvino_models`, if any of its peers is named.
        names: some of PEERS.
    """
    opened = Meissonic.open(checkpoint)
    numbers = sum(
        _numbers(folder) for folder in (opened.transformer_weights, opened.text_weights, opened.codec_weights)
    )
    for name in names:
        module, variant = PEERS[name]
        folder, size = checkpoint, numbers * _bytes(variant)
        if module == "openvino_child":
            assert models is not None, f"{name} needs a folder of models"
            folder = models / variant
            size = sum(f.stat().st_size for f in folder.glob("*.bin"))
        yield Case(
            name,
            folder,
            f"{module} {variant}",
            size,
            None,
            module=f"pochade.benchmarks.peers.{module}",
            extra={"checkpoint": str(checkpoint), "models": str(models), "variant": variant},
        )


def _numbers(folder: Any) -> int:
    return sum(int(folder[key].numel()) for key in folder.keys())  # noqa: SIM118


def _bytes(variant: str) -> int:
    return 4 if variant == "fp32" else 2


@dataclass(frozen=True)
class Advantage:
    """How many times as long a peer takes as a bundle, round by round."""

    bundle: str
    peer: str
    metric: str
    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Above 1 the bundle is faster."""
        return statistics.median(self.rounds)

    def to_json(self) -> dict[str, Any]:
        """For files."""
        return {
            "bundle": self.bundle,
            "peer": self.peer,
            "metric": self.metric,
            "ratio": round(self.median, 4),
            "least": round(min(self.rounds), 4),
            "greatest": round(max(self.rounds), 4),
        }


def advantages(report: Report, metrics: Sequence[str] = RATIOS) -> Iterator[Advantage]:
    """Every bundle against every peer; of rounds that both have finished."""
    peers = [case for case in report.cases if case.name in PEERS]
    for bundle in (case for case in report.cases if case.name not in PEERS):
        for peer in peers:
            pairs = list(zip(bundle.runs[1:], peer.runs[1:], strict=False))
            for metric in metrics if pairs else ():
                rounds = tuple(_median(peer, metric, b) / _median(bundle, metric, a) for a, b in pairs)
                yield Advantage(bundle.name, peer.name, metric, rounds)


def _median(case: Case, metric: str, run: Figures) -> float:
    return statistics.median(case.samples(metric, [run]))
