"""One pass of HunyuanDiT's transformer in bundles and in diffusers, from one checkpoint: time and memory.

    python -m pochade.benchmarks.hunyuan_step CHECKPOINT BUNDLE [BUNDLE ...] [--size 512x512] [--json FILE]

CHECKPOINT is in diffusers' layout. A pass is of one picture; guidance takes two. Every case runs in a process of its
own that holds nothing but the transformer, --passes times, of which the first warms up. Inputs are random: time and
memory do not depend on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pochade.benchmarks.child import read_figures
from pochade.benchmarks.machine_card import write_report
from pochade.bundle import Bundle
from pochade.machine import usable_cores
from pochade.runtime.hunyuan_grid import rotary_tables
from pochade.runtime.memory import peak_memory
from pochade.sizes import read_picture_size

FACTOR, PATCH = 8, 2
"""Pixels per side of a latent, and latents per side of a cell."""

TEXT, TEXT_T5 = (77, 1024), (256, 2048)
"""Tokens and widths of what both text encoders give."""

Array = NDArray[np.float32]
Pass = Callable[[], object]


def ours(folder: Path, height: int, width: int, threads: int) -> Pass:
    """A pass of a bundle's transformer on latents (1, 4, height, width)."""
    from pochade.runtime.providers import choose
    from pochade.runtime.session import ComponentSession, Stop

    bundle = Bundle.open(folder)
    session = ComponentSession(bundle, "transformer", choose("cpu"), threads, Stop())
    shapes = {spec.name: spec.shape for spec in bundle.manifest.components["transformer"].inputs}
    rows, dim, half_head = int(shapes["modulation"][2]), int(shapes["modulation"][3]), int(shapes["rope_cos"][1])
    cos, sin = rotary_tables(height // PATCH, width // PATCH, 2 * half_head)
    inputs: dict[str, NDArray[Any]] = {
        "latent": _random(1, int(shapes["latent"][1]), height, width),
        "context": _random(1, int(shapes["context"][1]), int(shapes["context"][2])),
        "modulation": _random(1, 1, rows, dim),
        "step": np.array([0]),
        "rope_cos": cos,
        "rope_sin": sin,
    }
    return lambda: session.run(inputs)


def diffusers(folder: Path, height: int, width: int, threads: int, dtype: str) -> Pass:
    """The same of `HunyuanDiT2DModel`, which also embeds the texts in every pass."""
    import torch
    from diffusers import HunyuanDiT2DModel

    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    model: Any = HunyuanDiT2DModel.from_pretrained(folder / "transformer", torch_dtype=kind)  # type: ignore[no-untyped-call]
    tables = rotary_tables(height // PATCH, width // PATCH, int(model.config.attention_head_dim))
    inputs = {
        "hidden_states": torch.from_numpy(_random(1, int(model.config.in_channels), height, width)).to(kind),
        "timestep": torch.tensor([500.0], dtype=kind),
        "encoder_hidden_states": torch.from_numpy(_random(1, *TEXT)).to(kind),
        "text_embedding_mask": torch.ones(1, TEXT[0], dtype=torch.int64),
        "encoder_hidden_states_t5": torch.from_numpy(_random(1, *TEXT_T5)).to(kind),
        "text_embedding_mask_t5": torch.ones(1, TEXT_T5[0], dtype=torch.int64),
        "image_rotary_emb": tuple(torch.from_numpy(table.repeat(2, axis=1)) for table in tables),
    }
    if model.config.use_style_cond_and_image_meta_size:
        inputs["style"] = torch.zeros(1, dtype=torch.int64)
        inputs["image_meta_size"] = torch.tensor([[1024, 1024, 8 * width, 8 * height, 0, 0]], dtype=kind)

    def run() -> object:
        with torch.inference_mode():
            return model(**inputs, return_dict=False)

    return run


def _random(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Figures of one case in this process."""
    folder, height, width = Path(job["folder"]), job["height"], job["width"]
    start = time.perf_counter()
    if job["dtype"]:
        run = diffusers(folder, height, width, job["threads"], job["dtype"])
    else:
        run = ours(folder, height, width, job["threads"])
    opened = time.perf_counter() - start
    seconds, cpu = [], []
    for _ in range(job["passes"]):
        start, began = time.perf_counter(), time.process_time()
        run()
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - began)
    return {"opened": opened, "seconds": seconds, "cpu": cpu, "peak_rss": peak_memory()}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--size", default="512x512", metavar="WxH")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"], help="of PyTorch")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--json", type=Path, metavar="FILE")
    if (sys.argv[1:] if argv is None else argv) == ["--job"]:
        print(json.dumps(measure(json.load(sys.stdin))))
        return
    args = parser.parse_args(argv)
    if args.passes < 2:
        parser.error("--passes must be at least 2: the first warms up")
    width, height = (side // FACTOR for side in read_picture_size(args.size))
    shared = {"height": height, "width": width, "threads": args.threads, "passes": args.passes}
    cases = [(folder.resolve().name, {"folder": str(folder), "dtype": None}) for folder in args.bundles]
    cases += [(f"diffusers {dtype}", {"folder": str(args.checkpoint), "dtype": dtype}) for dtype in args.dtypes]
    rows: list[dict[str, Any]] = []
    print(f"{args.size}, one pass, {args.threads} threads\n")
    print("| transformer | open s | pass s | CPU s of a pass | peak RSS GB |\n|---|---|---|---|---|")
    for name, case in cases:
        command = [sys.executable, "-m", "pochade.benchmarks.hunyuan_step", "--job"]
        job = json.dumps(case | shared)
        figures = read_figures(subprocess.run(command, input=job, check=True, stdout=subprocess.PIPE, text=True).stdout)
        rows.append({"transformer": name, **shared, **figures})
        wall, cpu = (statistics.median(figures[key][1:]) for key in ("seconds", "cpu"))
        cells = f"{figures['opened']:.1f} | {wall:.1f} | {cpu:.1f} | {figures['peak_rss'] / 1e9:.2f}"
        print(f"| {name} | {cells} |", flush=True)
        write_report(args.json, "pochade hunyuandit step", {"size": args.size, "rows": rows})


if __name__ == "__main__":
    main()
