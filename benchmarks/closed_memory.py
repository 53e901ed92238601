"""What stays of a model in a process after it was closed, again and again.

    python -m pochade.benchmarks.closed_memory BUNDLE [--size 256x256] [--times 10] [--json FILE]

In one process, Linux alone: the starter paints first, so that all libraries are there. Then the bundle is loaded,
paints one step, and is closed, so many times. Tells the resident set beside what it was before the first time, in MB.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pochade
from pochade.benchmarks.machine_card import write_report
from pochade.runtime.memory import resident_memory
from pochade.sizes import read_picture_size


def measure(bundle: str, width: int, height: int, times: int) -> list[int]:
    """Bytes after each time, beside those before the first."""
    with pochade.load("starter", device="cpu") as pipe:
        pipe("a large red star", num_inference_steps=1)
    before, found = resident_memory() or 0, []
    for seed in range(times):
        with pochade.load(bundle, device="cpu") as pipe:
            pipe("a red fox in the snow", num_inference_steps=1, width=width, height=height, seed=seed)
        found.append((resident_memory() or 0) - before)
    return found


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="folder or installed name")
    parser.add_argument("--size", default="256x256", metavar="WxH")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    width, height = read_picture_size(args.size)
    found = measure(args.bundle, width, height, args.times)
    print("MB more than before, after each close: " + " ".join(f"{more / 1e6:.1f}" for more in found))
    write_report(args.json, "pochade memory after close", {"size": args.size, "bytes": found})


if __name__ == "__main__":
    main()
