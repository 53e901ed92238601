"""A codec's encoder and decoder in several bundles of one source: time, and what differs.

    python -m pochade.benchmarks.codec_times FLOAT BUNDLE ... [--size 1024x1024] [--rounds 2] [--json FILE]

All encode the same picture, of soft random colours, and decode what the first one's encoder gave. They take turns,
after a round that warms up; times are medians. Without --threads they take all cores of the process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pochade.benchmarks.machine_card import write_report
from pochade.bundle import Bundle
from pochade.machine import usable_cores
from pochade.quant.fidelity import Difference
from pochade.runtime.image import from_image
from pochade.runtime.locate import resolve
from pochade.runtime.providers import choose
from pochade.runtime.session import ComponentSession, Stop
from pochade.runtime.strips import strip_count, strip_pixels, strips_at_once
from pochade.sizes import read_picture_size

ENCODER, DECODER = "vq_encoder", "vq_decoder"
BLOB = 32
"""Pixels between the random colours of the picture."""

Inputs = dict[str, NDArray[Any]]


def soft_picture(width: int, height: int) -> Image.Image:
    """Random colours with smooth ways between them."""
    colours = np.random.default_rng(0).integers(0, 256, (height // BLOB + 1, width // BLOB + 1, 3), np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def run(bundle: Bundle, component: str, inputs: Inputs, threads: int) -> tuple[float, dict[str, NDArray[Any]]]:
    """Seconds of one run, and what it gave; opening the component does not count."""
    declared = bundle.manifest.components[component]
    at_once = strips_at_once(declared, threads, int(inputs["strips"][0]))
    session = ComponentSession(bundle, component, choose("cpu"), threads, Stop(), at_once=at_once)
    known = {spec.name for spec in declared.inputs}
    start = time.perf_counter()
    outputs = session.run_numpy({name: value for name, value in inputs.items() if name in known})
    seconds = time.perf_counter() - start
    session.close()
    return seconds, outputs


def compare(bundles: list[Bundle], width: int, height: int, rounds: int, threads: int) -> list[dict[str, Any]]:
    """A row for each bundle and component."""
    factor = int(bundles[0].manifest.scheduler["codec_factor"])
    picture = from_image(soft_picture(width, height))
    seconds: dict[tuple[int, str], list[float]] = defaultdict(list)
    expected: dict[str, Inputs] = {}
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for turn in range(rounds + 1):
        for i, bundle in enumerate(bundles):
            for component in (ENCODER, DECODER):
                pixels = strip_pixels(bundle.manifest.components[component], on_gpu=False)
                strips = np.array([strip_count(height // factor, width // factor, factor, pixels)])
                inputs: Inputs = {"strips": strips, "recompute": np.array(False)}
                inputs |= {"image": picture} if component == ENCODER else {"tokens": expected[ENCODER]["tokens"]}
                taken, outputs = run(bundle, component, inputs, threads)
                if turn == 0:
                    difference = Difference()
                    difference.add(expected.setdefault(component, outputs), outputs)
                    rows[i, component] = {"bundle": bundle.manifest.name, "component": component}
                    rows[i, component] |= difference.to_json() if i else {}
                else:
                    seconds[i, component].append(taken)
    for (i, component), row in rows.items():
        row["seconds"] = seconds[i, component]
        row["ratio"] = statistics.median(seconds[i, component]) / statistics.median(seconds[0, component])
    return list(rows.values())


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE", help="folder or name; the first is compared with")
    parser.add_argument("--size", default="1024x1024")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    width, height = read_picture_size(args.size)
    bundles = [Bundle.open(resolve(name)) for name in args.bundles]
    rows = compare(bundles, width, height, args.rounds, args.threads)
    print("| bundle | component | s | of the first | differs |\n|---|---|---|---|---|")
    for row in rows:
        told = [f"{row['snr_db']:.1f} dB"] if "snr_db" in row else []
        told += [f"{row['agreement']:.2%} equal"] if "agreement" in row else []
        cells = f"{statistics.median(row['seconds']):.2f} | {row['ratio']:.2f} | {', '.join(told)}"
        print(f"| {row['bundle']} | {row['component']} | {cells} |")
    write_report(args.json, "pochade codec times", {"size": args.size, "threads": args.threads, "rows": rows})


if __name__ == "__main__":
    main()
