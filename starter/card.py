"""The card of a trained starter: data, recipe, time, how often it is right, licence."""

from __future__ import annotations

import itertools
import json
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pochade.bundle import Bundle
from pochade.machine import usable_cores
from pochade.starter.checkpoint import LOG, STATE
from pochade.starter.evaluate import Share, checker_shares

CARD = "CARD.md"


def write_card(folder: Path, adherence: Mapping[str, Mapping[str, int]]) -> None:
    """Write the card of a finished run.

    Args:
        folder: of the run, with the logs of its stages.
        adherence: right pictures of the float bundle and their number, by category.
    """
    state = torch.load(folder / STATE, weights_only=True)
    codec = json.loads((folder / "codec.json").read_text("utf-8"))
    lines = (folder / LOG).read_text("utf-8").splitlines() if (folder / LOG).exists() else []
    log = [json.loads(line) for line in lines]
    sizes = {name: Bundle.open(folder / name).size for name in ("fp32", "int8")}
    text = "\n".join(_lines(state, codec, log, sizes, adherence))
    (folder / CARD).write_text(text + "\n", "utf-8")


def _lines(
    state: Mapping[str, Any],
    codec: Mapping[str, Any],
    log: Sequence[Mapping[str, float]],
    sizes: Mapping[str, int],
    adherence: Mapping[str, Mapping[str, int]],
) -> Iterator[str]:
    weights = sum(weight.numel() for weight in state["ema"].values())
    # Of the log's intervals, so that what else the machine did at times does not count.
    pace = (
        statistics.median((b["step"] - a["step"]) / (b["seconds"] - a["seconds"]) for a, b in itertools.pairwise(log))
        if len(log) > 1
        else state["step"] / state["spent"]
    )
    yield "# Card of the starter model"
    yield ""
    yield "Written by `python -m pochade.starter.build`. Licence of code, data and weights: Apache-2.0."
    yield ""
    yield "**Data.** None but this code: scenes are drawn and described at random while training (`draw.py`,"
    yield "`captions.py`). Eight pairs of colour and shape, eight relations and some templates are never shown."
    yield ""
    steps, batch = state["step"], state.get("batch", 64)
    minutes = steps / pace / 60, sum(codec["seconds"].values()) / 60
    yield f"**Recipe.** {steps} steps of {batch} pictures, Muon and AdamW, seed fixed. Transformer and text encoder"
    yield f"have {weights / 1e6:.1f} M weights with those shared while training. At the median pace of the run that is"
    yield f"{minutes[0]:.0f} minutes; the codec took {minutes[1]:.0f}. On {platform.machine()}, {usable_cores()} cores,"
    yield f"PyTorch {torch.__version__}."
    if log:
        last = log[-1]
        yield (
            f"Caption test at the end, nats per cell of a fully masked picture: {last['true']:.2f} with its caption, "
            f"{last['empty']:.2f} with none, {last['wrong']:.2f} with another's."
        )
    yield ""
    trip = ", ".join(f"{name} {value:.4g}" for name, value in codec["round trip"].items())
    yield f"**Codec round trip.** {trip}."
    yield ""
    true, wrong = checker_shares(1000)
    yield f"**Checker.** True pictures passed: {true}. Pictures of another scene passed: {wrong}."
    yield ""
    bytes_said = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items())
    yield f"**Bundles.** {bytes_said}; int8 is what ships."
    yield ""
    yield "**Right pictures** of the fp32 bundle with its defaults, judged whole (`checker.py`), 95 % Wilson intervals:"
    yield ""
    yield "| category | right |"
    yield "|---|---|"
    shares = {category: Share(row["right"], row["n"]) for category, row in adherence.items()}
    total = Share(sum(share.right for share in shares.values()), sum(share.n for share in shares.values()))
    for category, share in {**shares, "all": total}.items():
        yield f"| {category} | {share} |"
