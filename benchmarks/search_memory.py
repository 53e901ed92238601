"""Peak memory of the search for bits, phase after phase, without the hours that a whole search takes.

    python -m pochade.benchmarks.search_memory BUNDLE [--pictures 1] [--trials 1]

Records the float bundle as `pochade quantize --target-size` does, then tries the weights with the widest inputs of each
component: their moments are the largest, and as many of them as are ever held together are measured first.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from pochade.bundle import Bundle
from pochade.quant.fidelity import Call
from pochade.quant.scheme import SCHEMES, Use
from pochade.quant.search import gives_floats
from pochade.quant.select import find_weights
from pochade.quant.sensitivity import Journal, forms, measure
from pochade.quant.trial import record_calibration, typical_prompts
from pochade.runtime.locate import resolve
from pochade.runtime.memory import peak_memory

SCHEME = SCHEMES["int4"]
"""What the search begins with."""


class _EnoughError(Exception):
    """Ends a search early."""


def try_widest(path: Path, component: str, calls: Sequence[Call], trials: int) -> int:
    """Try some weights of a component, those with the widest inputs; returns how many were tried."""
    weights = find_weights(ir.load(path))
    widest = max((weight.width for weight in weights if weight.use is Use.LINEAR), default=0)
    tried = 0

    def count(*_: int) -> None:
        nonlocal tried
        if tried == trials:
            raise _EnoughError
        tried += 1

    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "journal.jsonl", {})
        for weight in weights:
            if weight.use is Use.LINEAR and weight.width < widest:
                # As if measured: a search leaves alone what its journal holds.
                journal.put(f"{component}/{weight.name}", dict.fromkeys(map(str, forms(weight.use, SCHEME)), 0.0))
        with contextlib.suppress(_EnoughError):
            measure(path, component, SCHEME, calls, journal, count)
    return tried


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="float bundle: folder or installed name")
    parser.add_argument("--pictures", type=int, default=1, metavar="N", help="recorded at most (default: 1)")
    parser.add_argument("--trials", type=int, default=1, metavar="N", help="weights of each component (default: 1)")
    args = parser.parse_args(argv)
    if args.pictures < 1 or args.trials < 1:
        parser.error("--pictures and --trials must be at least 1")
    bundle = Bundle.open(resolve(args.bundle))
    largest = max(bundle.component_size(name) for name in bundle.manifest.components)
    print(f"largest component: {largest / 1e9:.2f} GB", flush=True)

    def say(phase: str) -> None:
        peak = peak_memory()
        if peak is not None:
            print(f"{phase}: peak so far {peak / 1e9:.2f} GB, {peak / largest:.2f} of the largest", flush=True)

    calls = record_calibration(bundle, typical_prompts(bundle)[1:][: args.pictures], lambda *_: None)
    say("recording")
    for name, recorded in calls.items():
        if gives_floats(recorded):
            tried = try_widest(bundle.component_path(name), name, recorded, args.trials)
            say(f"{name}, {tried} weights tried")


if __name__ == "__main__":
    main()
