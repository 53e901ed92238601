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
from pochade.starter.checkpoint import STATE
from pochade.starter.evaluate import Share

CARD = "CARD.md"


def write_card(folder: Path, adherence: Mapping[str, Mapping[str, Mapping[str, int]]]) -> None:
    """Write the card of a finished run.

    Args:
        folder: of the run, with the logs of its stages.
        adherence: right pictures and their number, by bundle and category.
    """
    state = torch.load(folder / STATE, weights_only=True)
    codec = json.loads((folder / "codec.json").read_text("utf-8"))
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    sizes = {name: Bundle.open(folder / name).size for name in adherence}
    text = "\n".join(_lines(state, codec, log, sizes, adherence))
    (folder / CARD).write_text(text + "\n", "utf-8")


def _lines(
    state: Mapping[str, Any],
    codec: Mapping[str, Any],
    log: Sequence[Mapping[str, float]],
    sizes: Mapping[str, int],
    adherence: Mapping[str, Mapping[str, Mapping[str, int]]],
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
    yield f"**Recipe.** {state['step']} steps of {state.get('batch', 64)} pictures, Muon and AdamW, seed fixed; transformer and"
    yield f"text encoder have {weights / 1e6:.1f} M weights with those shared while training. At the median pace of the run"
    yield f"that is {state['step'] / pace / 60:.0f} minutes; the codec took {codec['seconds'] / 60:.0f}. On {platform.machine()}, "
    yield f"{usable_cores()} cores, PyTorch {torch.__version__}."
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
    yield "**Right pictures**, painted by the runtime with the bundle's defaults and judged whole (`checker.py`):"
    yield ""
    yield "| category | " + " | ".join(f"{name}, {size / 1e6:.1f} MB" for name, size in sizes.items()) + " |"
    yield "|---" * (1 + len(sizes)) + "|"
    for category in next(iter(adherence.values())):
        cells = [str(Share(rows[category]["right"], rows[category]["n"])) for rows in adherence.values()]
        yield f"| {category} | " + " | ".join(cells) + " |"
