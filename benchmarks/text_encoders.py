"""Text encoders of HunyuanDiT at published size with random weights: bytes, memory and error of each scheme.

    python -m pochade.benchmarks.text_encoders FOLDER [--json FILE]

Export, quantization (rounding to nearest) and each encoding of one prompt run in processes of their own. Writes about
13 GB into FOLDER; what is there from an earlier run is used again. Values are random, so errors only say that nothing
is broken.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pochade.benchmarks.machine_card import write_report
from pochade.bundle import Bundle, BundleWriter, Component

TOKENS = {"text_encoder": 77, "text_encoder_2": 256}
VOCABULARY = {"text_encoder": 47020, "text_encoder_2": 250112}
SCHEMES = ("int8", "int4")

BERT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "vocab_size": VOCABULARY["text_encoder"],
    "layer_norm_eps": 1e-12,
}
MT5_XL = {
    "d_model": 2048,
    "d_ff": 5120,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 32,
    "vocab_size": VOCABULARY["text_encoder_2"],
    "relative_attention_num_buckets": 32,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
}


def export(target: Path) -> None:
    """Bundle of both components in float32; weights are drawn as they are written."""
    import torch
    from torch import Tensor

    from pochade.export.checkpoint import Tensors, empty
    from pochade.export.modules.bert import BertConfig, BertEncoder
    from pochade.export.modules.t5_encoder import T5Config, T5Encoder
    from pochade.export.text_components import BertPart, T5Part
    from pochade.export.trace import build
    from pochade.export.write import write_component

    class RandomTensors(Tensors):
        """Weights of a module, the same every time one is asked for."""

        def __init__(self, module: torch.nn.Module) -> None:
            self.where = Path("random")
            self._shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}

        def keys(self) -> Collection[str]:
            return self._shapes.keys()

        def shape(self, key: str) -> tuple[int, ...]:
            return self._shapes[key]

        def __getitem__(self, key: str) -> Tensor:
            shape = self._shapes[key]
            draw = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
            if len(shape) == 1:
                centre = 1.0 if "norm" in key.lower() and key.endswith("weight") else 0.0
                return draw.mul_(0.02).add_(centre)
            lookup = "embedding" in key or "shared" in key or "relative" in key
            # T5's queries carry the scale that its attention leaves out.
            narrow = 64.0 if key.endswith("SelfAttention.q.weight") else 1.0
            return draw.mul_((1.0 if lookup else shape[1] * narrow) ** -0.5)

    bert, t5 = BertConfig.from_dict(BERT), T5Config.from_dict(MT5_XL)
    plans = (
        BertPart(bert, RandomTensors(empty(BertEncoder, bert))).plan(torch.float32, TOKENS["text_encoder"]),
        T5Part(t5, RandomTensors(empty(T5Encoder, t5))).plan(TOKENS["text_encoder_2"]),
    )
    with BundleWriter(target) as writer:
        _finish(writer, {p.name: write_component(build(p), writer.path, p.name, "fp32", None, {}) for p in plans})


def quantize(source: Path, target: Path, scheme: str) -> None:
    """The same by a scheme, with every weight rounded to nearest."""
    from pochade.quant.component import quantize_component
    from pochade.quant.scheme import SCHEMES

    rounded = replace(SCHEMES[scheme], rounding="rtn")
    bundle = Bundle.open(source)
    with BundleWriter(target) as writer:
        components = {}
        for name, component in bundle.manifest.components.items():
            result = quantize_component(bundle.component_path(name), writer.path / component.file, name, rounded)
            account = {"scheme": rounded.to_manifest(), "weights": result.counts}
            components[name] = replace(component, precision=scheme, quantization=account)
        _finish(writer, components)


def _finish(writer: BundleWriter, components: Mapping[str, Component]) -> None:
    writer.finish(
        name=writer.target.name,
        family="text encoders alone",
        family_revision=1,
        task="benchmark",
        components=components,
        tokenizer=None,
        scheduler={},
        defaults={},
        source={"weights": "random"},
    )


def encode(folder: Path, name: str, answer: Path) -> dict[str, Any]:
    """Open one component and encode one prompt, in this process; the states go to a file."""
    from pochade.machine import usable_cores
    from pochade.runtime.memory import peak_memory
    from pochade.runtime.providers import choose
    from pochade.runtime.session import ComponentSession, Stop

    start = time.perf_counter()
    session = ComponentSession(Bundle.open(folder), name, choose("cpu"), usable_cores(), Stop())
    opened = time.perf_counter()
    (states,) = session.run_numpy(prompt(name)).values()
    done = time.perf_counter()
    np.save(answer, states)
    return {"timings": {"open": opened - start, "run": done - opened}, "peak_memory": peak_memory()}


def prompt(name: str) -> dict[str, NDArray[np.int64]]:
    """Ids and mask of a prompt of thirty tokens."""
    tokens = TOKENS[name]
    mask = (np.arange(tokens) < 30).astype(np.int64)[None]
    ids = np.random.default_rng(0).integers(3, VOCABULARY[name], (1, tokens))
    return {"input_ids": ids * mask, "attention_mask": mask}


def run(folder: Path) -> list[dict[str, Any]]:
    """Make what is missing, then measure every component of every bundle; a row each."""
    from pochade.benchmarks.full_size import measure

    folder.mkdir(parents=True, exist_ok=True)
    program = [sys.executable, "-m", "pochade.benchmarks.text_encoders", str(folder)]
    rows: list[dict[str, Any]] = []
    for bundle in ("fp32", *SCHEMES):
        if not (folder / bundle).exists():
            made = measure(f"make {bundle}", [*program, "--stage", bundle], folder / bundle)
            print(f"| made {bundle} | | {made.bytes / 1e9:.3f} | | {made.peak_rss / 1e9:.2f} | {made.seconds:.0f} | |")
        for name in TOKENS:
            answer = folder / f"{bundle}-{name}.npy"
            # With --json, what a process prints becomes its report.
            command = [*program, "--stage", f"{bundle}:{name}", "--json"]
            figures = measure(f"{bundle} {name}", command, answer).report
            size = Bundle.open(folder / bundle).component_size(name)
            error = _error(folder, bundle, name)
            rows.append({"bundle": bundle, "component": name, "bytes": size, **error, **figures})
            print(_line(rows[-1]), flush=True)
    return rows


def _error(folder: Path, bundle: str, name: str) -> dict[str, float]:
    """Signal to noise in dB against the float component, over all tokens."""
    exact, found = (np.load(folder / f"{which}-{name}.npy") for which in ("fp32", bundle))
    noise = float(np.square(exact - found).sum())
    return {} if noise == 0 else {"snr_db": 10 * float(np.log10(np.square(exact).sum() / noise))}


def _line(row: Mapping[str, Any]) -> str:
    cells = (f"{row['bytes'] / 1e9:.3f}", f"{row['snr_db']:.1f}" if "snr_db" in row else "")
    return (
        f"| {row['bundle']} | {row['component']} | {' | '.join(cells)} | {row['peak_memory'] / 1e9:.2f} | "
        f"{row['timings']['open']:.1f} | {row['timings']['run']:.1f} |"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, nargs="?", const=Path("-"), metavar="FILE", help="write figures there")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder, stage = arguments.folder, arguments.stage
    if stage is None:
        print("| bundle | component | GB | SNR dB | peak RSS GB | open s | run s |\n|---|---|---|---|---|---|---|")
        rows = run(folder)
        write_report(arguments.json, "pochade text encoders", {"rows": rows})
    elif ":" in stage:
        bundle, name = stage.split(":")
        print(json.dumps(encode(folder / bundle, name, folder / f"{bundle}-{name}.npy")))
    elif stage == "fp32":
        export(folder / stage)
    else:
        quantize(folder / "fp32", folder / stage, stage)


if __name__ == "__main__":
    main()
