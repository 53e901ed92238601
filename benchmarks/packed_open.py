"""What packed weights spare when a bundle opens: `python -m pochade.benchmarks.packed_open BUNDLE [--json FILE]`.

Every component that is worth it is opened as it is and from an empty cache, which writes it, and from the cache then:
seconds, bytes of memory that is the process's own, and bytes on disk. Each in a process of its own; files are warm.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pochade.benchmarks.child import read_figures
from pochade.benchmarks.machine_card import write_report
from pochade.bundle import Bundle
from pochade.machine import usable_cores
from pochade.runtime.locate import resolve
from pochade.runtime.packed import PackedWeights
from pochade.runtime.providers import choose
from pochade.runtime.session import ComponentSession, Stop

LIMIT = 1 << 40
"""Bytes the cache may hold here: all that is asked for."""


def own_memory() -> int:
    """Bytes of memory that no file stands behind (Linux)."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Open one component in this process."""
    packed = PackedWeights(LIMIT, Path(job["cache"])) if job["cache"] else None
    bundle, before = Bundle.open(Path(job["folder"])), own_memory()
    start = time.perf_counter()
    session = ComponentSession(bundle, job["component"], choose("cpu"), usable_cores(), Stop(), packed=packed)
    seconds = time.perf_counter() - start
    memory = own_memory() - before
    session.close()
    return {"seconds": seconds, "own_memory": memory, "disk": packed.size if packed else 0}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="folder or name")
    parser.add_argument("--json", type=Path, metavar="FILE")
    if (sys.argv[1:] if argv is None else argv) == ["--job"]:
        print(json.dumps(measure(json.load(sys.stdin))))
        return
    args = parser.parse_args(argv)
    bundle = Bundle.open(resolve(args.bundle))
    rows = []
    print("| component | way | opened in s | own memory MB | disk MB |\n|---|---|---|---|---|")
    for name in bundle.manifest.components:
        if not PackedWeights(LIMIT).is_worthwhile(bundle, name):
            continue
        with tempfile.TemporaryDirectory() as cache:
            for way, folder in (("warm up", ""), ("as it is", ""), ("packing", cache), ("packed", cache)):
                job = {"folder": str(bundle.path), "component": name, "cache": folder}
                command = [sys.executable, "-m", "pochade.benchmarks.packed_open", "--job"]
                done = subprocess.run(command, input=json.dumps(job), check=True, stdout=subprocess.PIPE, text=True)
                figures = read_figures(done.stdout)
                rows.append({"component": name, "way": way, **figures})
                cells = f"{figures['seconds']:.2f} | {figures['own_memory'] / 1e6:.0f} | {figures['disk'] / 1e6:.0f}"
                print(f"| {name} | {way} | {cells} |", flush=True)
    write_report(args.json, "pochade packed open", {"rows": rows})


if __name__ == "__main__":
    main()
