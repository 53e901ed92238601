"""Memory and time of decoding latents with a decoder of published size and random weights, in fresh processes.

    python -m pochade.benchmarks.vae_memory FOLDER [--size 1024x1024] [--schemes int4] [--strips 64 1] [--json FILE]

Makes HunyuanDiT's VAE decoder (SDXL's) in FOLDER, 0.2 GB and its quantized forms, and uses again what is there. Every
case is decoded with all of the largest layers kept in memory, and with few.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pochade.benchmarks.child import read_figures
from pochade.benchmarks.machine_card import write_report
from pochade.runtime.memory import peak_memory
from pochade.runtime.strips import strip_count
from pochade.sizes import read_picture_size

FACTOR, CHANNELS = 8, 4
"""Pixels per side of a cell, and numbers in it."""


def make(folder: Path, scheme: str) -> Path:
    """The decoder in float32 or quantized, made if it is not there."""
    path = folder / scheme / "vae_decoder.onnx"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if scheme == "fp32":
        import torch

        from pochade.benchmarks.random_hunyuandit import CONFIGS
        from pochade.export.modules.vae import AutoencoderKL, VaeConfig
        from pochade.export.trace import save
        from pochade.export.vae_graphs import build_vae_decoder

        torch.manual_seed(0)
        config = VaeConfig.from_dict(CONFIGS["vae"])
        save(build_vae_decoder(config, AutoencoderKL(config).state_dict().__getitem__), path)
    else:
        from pochade.quant.component import quantize_component
        from pochade.quant.scheme import SCHEMES

        quantize_component(make(folder, "fp32"), path, "vae_decoder", SCHEMES[scheme])
    return path


def decode(path: Path, rows: int, columns: int, strips: int, recompute: bool, threads: int) -> dict[str, Any]:
    """Figures of one decoding in this process."""
    import numpy as np

    from pochade.runtime.ort import ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    latent = np.random.default_rng(0).standard_normal((1, CHANNELS, rows, columns), dtype=np.float32)
    start, cpu = time.perf_counter(), time.process_time()
    session.run(None, {"latent": latent, "strips": np.array([strips]), "recompute": np.array(recompute)})
    return {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "peak_rss": peak_memory(),
    }


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="1024x1024", metavar="WxH")
    parser.add_argument("--schemes", nargs="+", default=["int8", "int4"], choices=["fp32", "int8", "int4"])
    parser.add_argument("--strips", nargs="+", type=int, metavar="N", help="default: as the runtime takes them, and 1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.job:
        print(json.dumps(decode(args.folder, **json.loads(args.job))))
        return
    width, height = read_picture_size(args.size)
    rows, columns = height // FACTOR, width // FACTOR
    counts = args.strips or [strip_count(rows, columns, FACTOR), 1]
    cases: list[dict[str, Any]] = []
    print("| decoder | strips | recompute | peak RSS GB | wall s | CPU s |")
    print("|---|---|---|---|---|---|")
    for scheme, strips, recompute in itertools.product(args.schemes, counts, (False, True)):
        job = {"rows": rows, "columns": columns, "strips": strips, "recompute": recompute, "threads": args.threads}
        command = [sys.executable, "-m", "pochade.benchmarks.vae_memory", str(make(args.folder, scheme))]
        command += ["--job", json.dumps(job)]
        figures = read_figures(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        cases.append({"scheme": scheme, **job, **figures})
        cells = f"{figures['peak_rss'] / 1e9:.2f} | {figures['seconds']:.1f} | {figures['cpu']:.1f}"
        print(f"| {scheme} | {strips} | {'yes' if recompute else 'no'} | {cells} |", flush=True)
        write_report(args.json, "pochade vae memory", {"cases": cases})


if __name__ == "__main__":
    main()
