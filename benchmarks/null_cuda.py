"""What would happen on a graphics card, told on a machine without one.

That is: which provider would compute each node, what would be allocated on the card, and every byte that would be
copied to it or back.

    python -m pochade.benchmarks.null_cuda BUNDLE [--size 1024x1024] [--steps 3] [--cuda-graphs] [--tiling on]
        [--json FILE]

Needs a C compiler and the package onnxruntime-gpu, and neither a card nor a driver nor NVIDIA's libraries: it puts
libraries of its own in their place, which compute nothing (null_cuda.c). ONNX Runtime's CUDA provider cannot tell. So
kernels leave memory as it was, and a picture shows nothing; sessions, bindings, plans and loops are the real ones, from
the prompt to the picture.

Ends with 1 where a node that computes would run on the CPU, or a captured CUDA graph would read memory of the host.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pochade.benchmarks.phase_peaks import when_closed

if TYPE_CHECKING:
    from pochade.runtime.pipeline import Pipeline, Tiling

LIBRARIES = {
    "CUDART": "libcudart.so.13",
    "CUBLASLT": "libcublasLt.so.13",
    "CUBLAS": "libcublas.so.13",
    "CURAND": "libcurand.so.10",
    "CUDA": "libcuda.so.1",
    "CUDNN": "libcudnn.so",
}
"""What the CUDA provider links or opens, by the part of null_cuda.c that takes its place."""

VERSIONED = ("CUDART", "CUBLASLT", "CUBLAS", "CURAND")
"""Libraries whose symbols carry their name as version."""


SUMMED = ("to_device", "to_host", "within_device", "launches", "captured_copies", "captured_allocations")
"""Counters that begin anew each time they are taken."""


class Counters(ctypes.Structure):
    """`struct counters` of null_cuda.c."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("allocated", "peak", "limit")] + [
        (name, ctypes.c_uint64) for name in SUMMED
    ]


class NullCuda:
    """The libraries, built and loaded; to be made before the first session is opened."""

    def __init__(self, folder: Path) -> None:
        """Build them there.

        Raises:
            RuntimeError: there is no compiler, or it refuses.
        """
        source = Path(__file__).with_suffix(".c")
        for part, name in LIBRARIES.items():
            script = folder / f"{name}.map"
            script.write_text(f"{name if part in VERSIONED else ''} {{ global: *; }};\n", "ascii")
            command = ["cc", "-shared", "-fPIC", "-O1", "-w", f"-D{part}", f"-Wl,-soname,{name}"]
            command += [f"-Wl,--version-script={script}", "-o", str(folder / name), str(source)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            except FileNotFoundError:
                raise RuntimeError("there is no C compiler here (cc)") from None
            if done.returncode:
                raise RuntimeError(f"cc refuses {source.name}: {done.stderr[-1000:]}")
        loaded = {part: ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL) for part, name in LIBRARIES.items()}
        self._runtime = loaded["CUDART"]

    def take(self) -> Counters:
        """What was counted since the last call; `peak` begins anew with what is allocated now."""
        counters = Counters()
        self._runtime.null_cuda_read(ctypes.byref(counters))
        self._runtime.null_cuda_reset()
        return counters


@dataclass(frozen=True)
class Placed:
    """Where a component's nodes would be computed."""

    component: str
    graph: str
    nodes: int
    """On the card."""
    strays: dict[str, int]
    """Computing on the CPU, by operator."""


@dataclass(frozen=True)
class Stretch:
    """What happened from one step of a picture to the next, or from the last one to the picture."""

    until: str
    peak: int
    """Bytes allocated on the card at most."""
    to_device: int
    to_host: int
    within_device: int
    launches: int
    """Of kernels and of captured graphs."""
    captured_copies: int
    """Bytes between host and card that became part of a captured graph, which reads them where they were then."""
    captured_allocations: int
    """Blocks allocated while a graph was captured, which CUDA forbids."""


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="folder or installed name")
    parser.add_argument("--size", metavar="WxH", help="of the picture (default: the bundle's)")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--cuda-graphs", action="store_true", help="capture passes of the transformer")
    parser.add_argument("--tiling", choices=("auto", "on", "off"), default="auto", help="of decoding (default: auto)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        card = NullCuda(Path(folder))
        report = examine(args.bundle, args.size, args.steps, card, args.cuda_graphs, args.tiling)
    print("\n".join(_lines(report)))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    captured = any(row["captured_copies"] or row["captured_allocations"] for row in report["painting"])
    return int(captured or any(placed["strays"] for placed in report["components"]))


class Watched:
    """What a pipeline does on the card, by phase and from step to step."""

    def __init__(self, pipe: Pipeline, card: NullCuda) -> None:
        """Watch from now on."""
        self.peaks: dict[str, int] = {}
        """Bytes allocated at most, by phase."""
        self._card = card
        self._since: list[Counters] = []
        # What the session before has not let go of when it closes is gone when the next one opens.
        when_closed(pipe, self._take, self._begin)
        card.take()

    def stretch(self, until: str, phase: str) -> Stretch:
        """What happened since the last time, which ends within a phase."""
        self._take(phase)
        found, self._since = self._since, []
        sums = {name: sum(getattr(each, name) for each in found) for name in SUMMED}
        return Stretch(until, max(each.peak for each in found), **sums)

    def _begin(self) -> Counters:
        self._since.append(self._card.take())
        return self._since[-1]

    def _take(self, phase: str) -> None:
        found = self._begin()
        self.peaks[phase] = max(self.peaks.get(phase, 0), found.peak)


def examine(
    model: str, size: str | None, steps: int, card: NullCuda, cuda_graphs: bool = False, tiling: Tiling = "auto"
) -> dict[str, Any]:
    """The findings, as JSON writes them."""
    import pochade
    from pochade.runtime.ort import ort
    from pochade.runtime.session import ComponentSession, Stop

    with pochade.load(model, device="cuda", cuda_graphs=cuda_graphs, tiling=tiling) as pipe:
        placed = []
        for name in pipe.bundle.manifest.components:
            session = ComponentSession(pipe.bundle, name, pipe.device, 1, Stop())
            graph = pipe.bundle.component_path(name, on_gpu=True).name
            placed.append(Placed(name, graph, session.placement.nodes, dict(session.placement.strays)))
            session.close()
        watched = Watched(pipe, card)
        width, _, height = (size or "").partition("x")
        sides = {"width": int(width), "height": int(height)} if size else {}
        events = pipe.stream("a red fox in the snow", seed=1, num_inference_steps=steps, **sides)
        stretches = []
        for step in range(steps):
            next(events)
            stretches.append(watched.stretch(f"step {step + 1}", "denoise"))
        for _ in events:
            pass
        stretches.append(watched.stretch("picture", "decode"))
        planned = {name: way.peak for name, way in pipe.plan.phases.items()} if pipe.plan is not None else None
    return {
        "bundle": pipe.bundle.manifest.name,
        "onnxruntime": ort.__version__,
        "components": [asdict(one) for one in placed],
        "cuda_graphs": cuda_graphs,
        "tiling": tiling,
        "painting": [asdict(one) for one in stretches],
        "planned_peaks": planned,
        "phase_peaks": watched.peaks,
        "after_close": card.take().allocated,
    }


def _lines(report: dict[str, Any]) -> list[str]:
    rows = ["component        graph                      nodes on the card  computed elsewhere"]
    for placed in report["components"]:
        strays = ", ".join(f"{count} {operator}" for operator, count in placed["strays"].items()) or "nothing"
        rows.append(f"{placed['component']:16} {placed['graph']:26} {placed['nodes']:17}  {strays}")
    planned, found = report["planned_peaks"] or {}, report["phase_peaks"]
    rows += ["", "phase      allocated, MB  planned, MB"]
    for phase, peak in found.items():
        rows.append(f"{phase:10} {peak / 1e6:13.1f}" + (f" {planned[phase] / 1e6:12.1f}" if phase in planned else ""))
    rows.append(f"{'closed':10} {report['after_close'] / 1e6:13.1f}")
    rows += ["", "until     peak on the card, MB    up, KB    down, KB    launches"]
    for stretch in report["painting"]:
        peak, up, down = stretch["peak"] / 1e6, stretch["to_device"] / 1e3, stretch["to_host"] / 1e3
        rows.append(f"{stretch['until']:9} {peak:21.1f} {up:9.1f} {down:11.1f} {stretch['launches']:11}")
        if stretch["captured_copies"] or stretch["captured_allocations"]:
            copies, blocks = stretch["captured_copies"], stretch["captured_allocations"]
            rows.append(f"  captured: {copies} bytes of the host, {blocks} allocations")
    return rows


if __name__ == "__main__":
    sys.exit(main())
