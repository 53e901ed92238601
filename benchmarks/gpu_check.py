"""Checks and measures pochade on the graphics card of this machine; without a network, and with one JSON as result.

    python -m pochade.benchmarks.gpu_check [BUNDLE] [--size WxH] [--steps N] [--vram 1G 2G 4G] [--json FILE]

What is checked, each a failure if it does not hold: every component computes on the card alone; its numbers agree with
those of the same bundle on the CPU, on what a picture hands it; a whole picture of one seed agrees in 99 of 100 tokens,
for models that have tokens; every limit of memory is kept. What is measured: seconds a step and a picture, and what the
driver says that this process takes of the card, apart from the context that CUDA makes for any program.

Ends with 1 if a check fails, with 4 if the device cannot be had. `--device cpu` tries the way without a card.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pochade
from pochade.benchmarks.machine_card import machine_card
from pochade.errors import OutOfBudgetError, PochadeError
from pochade.runtime.ort import ort
from pochade.runtime.pipeline import Pipeline, Result
from pochade.runtime.probe import identity_model
from pochade.runtime.providers import PROVIDERS
from pochade.sizes import read_bytes, read_picture_size, show_bytes

FORMAT_VERSION = 1

LEAST_SNR = 25.0
"""Decibels between a component on the card and on the CPU: an int8 bundle rounds activations on the CPU alone, which
leaves 36 dB between the two in the starter's transformer."""

LEAST_AGREEMENT = 0.99
"""Share of a picture's tokens."""

PROMPT, SEED = "a large red star", 4

Array = NDArray[Any]
Calls = dict[str, tuple[dict[str, Array], dict[str, Array]]]
"""Inputs and outputs of each component's first run."""


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", default="starter", help="folder or installed name (default: starter)")
    parser.add_argument("--device", default="cuda", choices=sorted(PROVIDERS))
    parser.add_argument("--size", metavar="WxH", help="of the picture (default: the bundle's)")
    parser.add_argument("--steps", type=int, metavar="N", help="default: the bundle's")
    parser.add_argument("--vram", nargs="*", default=["1G", "2G", "4G"], metavar="LIMIT")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    args = parser.parse_args(argv)
    settings: dict[str, Any] = {"seed": SEED}
    if args.size:
        settings["width"], settings["height"] = read_picture_size(args.size)
    if args.steps:
        settings["num_inference_steps"] = args.steps
    try:
        report = examine(args.bundle, args.device, settings, args.vram)
    except PochadeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print("\n".join(_lines(report)))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return int(bool(report["failures"]))


def examine(model: str, device: str, settings: Mapping[str, Any], limits: list[str]) -> dict[str, Any]:
    """Everything, as JSON writes it; `failures` names what does not hold.

    Raises:
        DeviceUnavailableError: there is no such device here.
    """
    with pochade.load(model, device=device) as card:  # refuses what cannot be had before the long part
        context = card_memory_after(lambda: _open_session(device)) if device != "cpu" else None
        there, on_card = _paint(card, settings)
        with pochade.load(model, device="cpu") as processor:
            here, on_cpu = _paint(processor, settings)
        parity = [_compare(name, outputs, card.run_component(name, inputs)) for name, (inputs, outputs) in here.items()]
    agreement = _agreement(on_cpu, on_card)
    budgets = [_keep_to(model, device, limit, settings, context) for limit in limits]
    failures = [f"{name} runs on {provider}" for name, provider in on_card.providers.items() if " but " in provider]
    failures += [f"{row['component']} has {row['snr_db']} dB" for row in parity if row["snr_db"] < LEAST_SNR]
    if agreement is not None and agreement < LEAST_AGREEMENT:
        failures.append(f"{agreement:.1%} of the tokens agree")
    failures += [f"{row['limit']} was exceeded" for row in budgets if row.get("kept") is False]
    assert there.keys() == here.keys(), "the card ran other components than the CPU"
    return {
        "format_version": FORMAT_VERSION,
        "machine": machine_card() | {"card": _query("name,driver_version,memory.total")},
        "bundle": {"name": card.bundle.manifest.name, "sha256": card.bundle.digest},
        "device": device,
        "settings": {key: value for key, value in on_card.settings.items() if key != "prompt"},
        "providers": dict(on_card.providers),
        "parity": parity,
        "token_agreement": agreement,
        "context_bytes": context,
        "budgets": budgets,
        "seconds": _seconds(on_card) | {"cpu": _seconds(on_cpu)},
        "failures": failures,
    }


def _paint(pipe: Pipeline, settings: Mapping[str, Any]) -> tuple[Calls, Result]:
    """The first run of every component, and a picture painted without anybody looking."""
    calls: Calls = {}

    def observe(name: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        if name not in calls:
            calls[name] = tuple({key: np.array(value) for key, value in part.items()} for part in (inputs, outputs))  # type: ignore[assignment]

    pipe.observer = observe
    pipe(PROMPT, **settings)
    pipe.observer = None
    return calls, pipe(PROMPT, **settings)


def _compare(name: str, expected: Mapping[str, Array], found: Mapping[str, Array]) -> dict[str, Any]:
    """Decibels of float outputs, the worst; whole numbers are a choice that a rounding may tip, and only told."""
    decibels, equal = [float("inf")], []
    for key, array in expected.items():
        if array.dtype.kind == "f":
            wanted = array.astype(np.float64)
            noise = np.square(found[key] - wanted).sum()
            decibels.append(10 * np.log10(np.square(wanted).sum() / noise) if noise else float("inf"))
        else:
            equal.append(float((found[key] == array).mean()))
    return {"component": name, "snr_db": min(round(min(decibels), 1), 999.0), "equal": equal}


def _agreement(one: Result, other: Result) -> float | None:
    """Share of equal tokens; None for models without tokens."""
    pairs = list(zip(one.tokens, other.tokens, strict=True))
    return float(np.mean([(a == b).mean() for a, b in pairs])) if pairs else None


def _keep_to(model: str, device: str, limit: str, settings: Mapping[str, Any], context: int | None) -> dict[str, Any]:
    """A picture within a limit: what was planned, and what the driver saw."""
    ram, vram = (limit, None) if device == "cpu" else (None, limit)
    try:
        with pochade.load(model, device=device, ram=ram, vram=vram) as pipe, watched() as peak:
            result = pipe(PROMPT, **settings)
            planned = pipe.plan.peak if pipe.plan is not None else None
    except OutOfBudgetError as error:
        return {"limit": limit, "refused": str(error)}
    measured = result.peak_memory if device == "cpu" else peak()
    if measured is not None and context is not None:
        measured -= context
    kept = None if measured is None else measured <= read_bytes(limit, "limit")
    return {"limit": limit, "planned": planned, "measured": measured, "kept": kept}


def _seconds(result: Result) -> dict[str, float]:
    """Of a picture, of its phases, and the median of a step's passes."""
    return dict(result.timings) | {"transformer": statistics.median(result.components["transformer"].ran)}


def _open_session(device: str) -> object:
    return ort.InferenceSession(identity_model(), providers=[PROVIDERS[device]])


def card_memory_after(make: Callable[[], object]) -> int | None:
    """Bytes that the driver counts for this process while something it made is there."""
    made = make()
    taken = card_memory()
    del made
    return taken


def card_memory() -> int | None:
    """Bytes of the card that this process takes, its context included; None where the driver does not tell."""
    rows = _query("pid,used_gpu_memory", "compute-apps") or []
    own = [row[1] for row in rows if row[0] == str(os.getpid())]
    return int(float(own[0]) * 1024**2) if own and own[0].replace(".", "").isdigit() else None


@contextmanager
def watched(seconds: float = 0.05) -> Iterator[Callable[[], int | None]]:
    """Asks for `card_memory` again and again; gives the largest so far."""
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(seconds):
            if (taken := card_memory()) is None:
                return
            seen.append(taken)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: max(seen, default=None)
    finally:
        done.set()
        thread.join()


def _query(fields: str, what: str = "gpu") -> list[list[str]] | None:
    """Rows of nvidia-smi; None without it."""
    command = ["nvidia-smi", f"--query-{what}={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    yield f"{report['bundle']['name']} on {report['device']}, card: {report['machine']['card'] or 'none that tells'}"
    for row in report["parity"]:
        equal = "".join(f", {share:.1%} of whole numbers equal" for share in row["equal"])
        yield f"  {row['component']:16} {row['snr_db']:6.1f} dB{equal}  {report['providers'][row['component']]}"
    if report["token_agreement"] is not None:
        yield f"  tokens of a picture: {report['token_agreement']:.2%} agree"
    for row in report["budgets"]:
        if "refused" in row:
            yield f"  {row['limit']}: refused, {row['refused']}"
        else:
            shown = ["unknown" if row[key] is None else show_bytes(row[key]) for key in ("planned", "measured")]
            yield f"  {row['limit']}: planned {shown[0]}, measured {shown[1]}"
    seconds = report["seconds"]
    both = f"picture {seconds['total']:.3f} s, one pass {seconds['transformer']:.4f} s"
    yield f"  {both}; on the CPU {seconds['cpu']['total']:.3f} s"
    yield from (f"FAILED: {failure}" for failure in report["failures"])


if __name__ == "__main__":
    sys.exit(main())
