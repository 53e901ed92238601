"""Checks and measures pochade on the graphics card of this machine; without a network, and with one JSON as result.

    python -m pochade.benchmarks.gpu_check [BUNDLE] [--size WxH] [--steps N] [--vram 1G 2G 4G] [--json FILE]

    python -m pochade.benchmarks.gpu_check BUNDLE --checkpoint FOLDER    beside PyTorch in float16, eager and compiled

What is checked, each a failure if it does not hold: every component computes on the card alone; its numbers agree with
those of the same bundle on the CPU, on what a picture hands it; a whole picture of one seed agrees in 99 of 100 tokens,
for models that have tokens, and so does one whose passes of the transformer are started as CUDA graphs; every limit of
memory is kept, each in a process of its own. What is measured: seconds a step and a picture, with CUDA graphs and
without; what the driver says that a process takes of the card, apart from the context that CUDA makes for
any program; the share of the card's rate for a large product of matrices that a pass of the transformer reaches; and
how many times as long PyTorch takes.

Ends with 1 if a check fails, with 4 if the device cannot be had. `--device cpu` tries the way without a card.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pochade
from pochade.benchmarks.card import card_memory, query_card
from pochade.benchmarks.machine_card import machine_card
from pochade.benchmarks.product_rate import SIDE, pass_operations, product_rate
from pochade.benchmarks.speed import Case, Report, Settings, default_settings, measure, run_once
from pochade.errors import OutOfBudgetError, PochadeError, UsageError
from pochade.runtime.ort import ort
from pochade.runtime.pipeline import Pipeline, Result
from pochade.runtime.probe import one_node_model
from pochade.runtime.providers import PROVIDERS, Device
from pochade.runtime.session import ComponentSession, Stop
from pochade.sizes import read_bytes, read_picture_size, show_bytes

FORMAT_VERSION = 1

LEAST_SNR = 25.0
"""Decibels between a component on the card and on the CPU: an int8 bundle rounds activations on the CPU alone, which
leaves 36 dB between the two in the starter's transformer."""

PASSES = 5
"""That are timed, after one that warms up."""

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
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FOLDER", help="that it was made of: measure PyTorch on it too"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of that (default: 3)")
    parser.add_argument(
        "--side", type=int, default=SIDE, help=f"of the matrices that tell the card's rate (default: {SIDE})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    args = parser.parse_args(argv)
    settings: dict[str, Any] = {"seed": SEED}
    if args.size:
        settings["width"], settings["height"] = read_picture_size(args.size)
    if args.steps:
        settings["num_inference_steps"] = args.steps
    try:
        report = examine(args.bundle, args.device, settings, args.vram, args.checkpoint, args.rounds, args.side)
    except PochadeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print("\n".join(_lines(report)))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return int(bool(report["failures"]))


def examine(
    model: str,
    device: str,
    settings: Mapping[str, Any],
    limits: Sequence[str] = (),
    checkpoint: Path | None = None,
    rounds: int = 3,
    side: int = SIDE,
) -> dict[str, Any]:
    """Everything, as JSON writes it; `failures` names what does not hold.

    Args:
        model: bundle folder or installed name.
        device: to check.
        settings: of the picture.
        limits: of memory to paint within.
        checkpoint: that the bundle was made of, to measure PyTorch with.
        rounds: of that comparison.
        side: of the matrices that tell what the card does at best.

    Raises:
        DeviceUnavailableError: there is no such device here.
        PochadeError: a process that measures failed.
    """
    with pochade.load(model, device=device) as card:  # refuses what cannot be had before the long part
        context = (
            card_memory_after(lambda: card.device.open(one_node_model(), ort.SessionOptions()))
            if device != "cpu"
            else None
        )
        there, on_card = _paint(card, settings)
        with pochade.load(model, device="cpu") as processor:
            here, on_cpu = _paint(processor, settings)
        parity = [_compare(name, outputs, card.run_component(name, inputs)) for name, (inputs, outputs) in here.items()]
        speed = _speed(card, here["transformer"][0], side)
        captured = _captured(card, settings, on_card, here["transformer"][0]) if device == "cuda" else None
    agreement, path = _agreement(on_cpu, on_card), card.bundle.path
    asked = default_settings(card.bundle, prompt=PROMPT, device=device, **settings)
    budgets = [_keep_to(path, asked, limit, context) for limit in limits]
    peers = _beside_peers(checkpoint, path, asked, rounds) if checkpoint is not None else None
    failures = []
    if not card.device.is_partial:  # which leaves to the CPU what it has no kernels for, and says so
        failures += [
            f"{name} runs on {provider}" for name, provider in on_card.providers.items() if " but " in provider
        ]
    failures += [f"{row['component']} has {row['snr_db']} dB" for row in parity if row["snr_db"] < LEAST_SNR]
    if agreement is not None and agreement < LEAST_AGREEMENT:
        failures.append(f"{agreement:.1%} of the tokens agree")
    if captured is not None:
        failures += _faults(captured)
    failures += [f"{row['limit']} was exceeded" for row in budgets if row.get("kept") is False]
    assert there.keys() == here.keys(), "the card ran other components than the CPU"
    return {
        "format_version": FORMAT_VERSION,
        "machine": machine_card() | {"card": query_card("name,driver_version,memory.total")},
        "bundle": {"name": card.bundle.manifest.name, "sha256": card.bundle.digest},
        "device": device,
        "settings": {key: value for key, value in on_card.settings.items() if key != "prompt"},
        "providers": dict(on_card.providers),
        "notes": list(on_card.notes),
        "parity": parity,
        "token_agreement": agreement,
        "context_bytes": context,
        "budgets": budgets,
        "speed": speed,
        "captured": captured,
        "peers": peers,
        "seconds": {**on_card.timings, "cpu": dict(on_cpu.timings)},
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


def _keep_to(path: Path, settings: Settings, limit: str, context: int | None) -> dict[str, Any]:
    """A picture within a limit, in a process of its own: what was planned, and what the driver saw."""
    on_cpu = settings.device == "cpu"
    case = replace(Case.of(path), extra={"ram" if on_cpu else "vram": limit})
    try:
        figures = run_once(case, settings, cold=False)
    except PochadeError as error:
        if error.exit_code != OutOfBudgetError.exit_code:
            raise
        return {"limit": limit, "refused": str(error)}
    measured = figures["peak_rss" if on_cpu else "peak_vram"]
    if measured is not None and context is not None:
        measured -= context
    kept = None if measured is None else measured <= read_bytes(limit, "limit")
    row = {"limit": limit, "planned": figures["planned_peak"], "measured": measured, "kept": kept}
    return row | {"plan": figures["plan"], "providers": figures["providers"]}


def _speed(pipe: Pipeline, inputs: Mapping[str, Array], side: int) -> dict[str, Any]:
    """How much of what the card multiplies at best a pass of the transformer uses."""
    seconds, device = _pass_seconds(pipe, inputs, False)
    operations, rate = pass_operations(pipe.bundle, "transformer", inputs), product_rate(pipe.device, side)
    fraction = operations / seconds / rate if device == pipe.device else None
    return {"pass_seconds": seconds, "pass_operations": operations, "product_rate": rate, "fraction": fraction}


def _pass_seconds(pipe: Pipeline, inputs: Mapping[str, Array], captures: bool) -> tuple[float, Device]:
    """Median seconds of a pass of the transformer, and where it ran."""
    session = ComponentSession(pipe.bundle, "transformer", pipe.device, pipe.threads, Stop(), captures=captures)
    taken = []
    with closing(session):
        kept = {name: session.detached(name, value) for name, value in session.run(inputs).items()}
        runs = session.bind(inputs, kept if session.device.on_gpu else {})
        runs.run()
        for _ in range(PASSES):
            start = time.perf_counter()
            for value in runs.run().values():
                value.numpy()  # since not every card has finished when a run returns
            taken.append(time.perf_counter() - start)
    return statistics.median(taken), session.device


def _captured(
    pipe: Pipeline, settings: Mapping[str, Any], expected: Result, inputs: Mapping[str, Array]
) -> dict[str, Any] | None:
    """The same with CUDA graphs: seconds, and the share of equal tokens; what is wrong, where it does not run at all.

    None for a model that has no use for them.
    """
    try:
        with pochade.load(pipe.bundle.path, device=pipe.device.name, cuda_graphs=True) as captured:
            found = captured(PROMPT, **settings)
        seconds, _ = _pass_seconds(pipe, inputs, True)
    except UsageError:
        return None
    except Exception as error:  # whatever ONNX Runtime raises: the rest of the report is worth as much without it
        return {"error": " ".join(str(error).split())}
    same = [np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(found.images, expected.images, strict=True)]
    return {
        "pass_seconds": seconds,
        "seconds": dict(found.timings),
        "token_agreement": _agreement(expected, found),
        "same_picture": all(same),
    }


def _faults(captured: Mapping[str, Any]) -> list[str]:
    """What is wrong with CUDA graphs."""
    if "error" in captured:
        return [f"CUDA graphs: {captured['error']}"]
    agreement = captured["token_agreement"]
    if agreement is None:
        return [] if captured["same_picture"] else ["with CUDA graphs it is another picture"]
    return [f"with CUDA graphs {agreement:.1%} of the tokens agree"] if agreement < LEAST_AGREEMENT else []


def _beside_peers(checkpoint: Path, path: Path, settings: Settings, rounds: int) -> dict[str, Any]:
    """The same pictures with PyTorch, taking turns."""
    from pochade.benchmarks.peers.versus import advantages, peer_cases

    dtypes = ("fp16", "fp16 compiled") if settings.device == "cuda" else ("fp32", "bf16")
    names = [f"PyTorch {dtype}" for dtype in dtypes]
    report = Report(settings, rounds, [Case.of(path), *peer_cases(checkpoint, None, names)])
    measure(report, lambda what, done, total: print(f"{what} ({done + 1} of {total})", file=sys.stderr), lambda: None)
    return report.to_json() | {"advantages": [each.to_json() for each in advantages(report)]}


def card_memory_after(make: Callable[[], object]) -> int | None:
    """Bytes that the driver counts for this process while something it made is there."""
    made = make()
    taken = card_memory()
    del made
    return taken


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
    yield f"  picture {seconds['total']:.3f} s; on the CPU {seconds['cpu']['total']:.3f} s"
    speed = report["speed"]
    share = "on the CPU" if speed["fraction"] is None else f"at {speed['fraction']:.0%} of that"
    yield (
        f"  a large product reaches {speed['product_rate'] / 1e9:.3g} GFLOP/s, a pass of the transformer, "
        f"{speed['pass_operations'] / 1e9:.1f} GFLOP in {speed['pass_seconds']:.4f} s, computes {share}"
    )
    if (captured := report["captured"]) and "error" not in captured:
        seconds = captured["seconds"]["total"]
        yield f"  as CUDA graphs: a pass in {captured['pass_seconds']:.4f} s, a picture in {seconds:.3f} s"
    for row in (report["peers"] or {}).get("advantages", []):
        spread = f"{row['least']:.2f} to {row['greatest']:.2f}"
        yield f"  {row['peer']}: {row['metric']} takes {row['ratio']:.2f} times as long ({spread})"
    yield from (f"  {note}" for note in report["notes"])
    yield from (f"FAILED: {failure}" for failure in report["failures"])


if __name__ == "__main__":
    sys.exit(main())
