"""Makes the starter from nothing: `python -m pochade.starter.build --out DIR`.

Transformer, codec, checkpoint, float and int8 bundles, and the card with what they can do. Seeds are fixed. Run again
after an interruption, it goes on where it stopped: a stage whose result is there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pochade
from pochade.export.write import export_checkpoint
from pochade.quant.bundle import quantize_bundle
from pochade.quant.scheme import SCHEMES, Keep
from pochade.starter.card import write_card
from pochade.starter.checkpoint import CODEC, load_run, write_checkpoint
from pochade.starter.codec import CHANNELS, PARTS, new_codec, round_trip, train_codec
from pochade.starter.data import Batches, starter_tokenizer
from pochade.starter.evaluate import CATEGORIES, cases, judge, share_of
from pochade.starter.fast import use_fast_operations
from pochade.starter.schedule import Budget
from pochade.starter.train import Trainer, run

log = logging.getLogger(__name__)

SHIPPED = replace(SCHEMES["int8"], int8_attention=False).keeping([Keep("^vq_.*conv", 8)])
"""How the shipped bundle is quantized: the codec's convolutions at 8 bits as well, to stay below 15 MB; attention among
so few tokens as they are, which gains nothing by 8 bits."""


SHARES = {"decoder": 1.0, "encoder": 0.4}
"""Of the codec's pictures; reading a patch is easier than painting it."""


def train_codec_once(folder: Path, samples: int, toy: bool) -> None:
    """Train both parts of the codec, unless that is done, and write its weights and what they are good for."""
    file, facts = folder / CODEC, folder / "codec.json"
    known: dict[str, Any] = json.loads(facts.read_text("utf-8")) if facts.exists() else {"seconds": {}}
    codec = new_codec((16, 16, 16, 16) if toy else CHANNELS)
    if file.exists():
        codec.load_state_dict(torch.load(file, weights_only=True))
    for part in PARTS:
        if part in known["seconds"]:
            continue
        start = time.perf_counter()
        train_codec(codec, part, Budget(samples=math.ceil(samples * SHARES[part])), batch=4 if toy else 8)
        torch.save(codec.state_dict(), file)
        known["seconds"][part] = round(time.perf_counter() - start, 1)
        known.pop("round trip", None)
        facts.write_text(json.dumps(known, indent=2) + "\n", "utf-8")
    if "round trip" not in known:
        known["round trip"] = round_trip(codec, 4 if toy else 400)
        facts.write_text(json.dumps(known, indent=2) + "\n", "utf-8")


def adherence_once(bundle: Path, n: int, file: Path) -> dict[str, Any]:
    """Right pictures of every category by a bundle; what the file has already is not counted again."""
    rows: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    with pochade.load(bundle, device="cpu") as pipe:
        for category in CATEGORIES:
            if rows.get(category, {}).get("n") == n:
                continue
            share = share_of(judge(pipe, cases(category, n)))
            log.info("%s, %s: %s", bundle.name, category, share)
            rows[category] = {"right": share.right, "n": share.n}
            file.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
    return rows


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--samples", type=int, default=260_000, help="pictures that the transformer sees")
    parser.add_argument("--codec-samples", type=int, default=16_000, help="pictures that each part of the codec sees")
    parser.add_argument("--rate", type=float, default=8e-4, help="peak learning rate of the transformer")
    parser.add_argument("--adamw", action="store_true", help="AdamW for all weights, no Muon")
    parser.add_argument("--compile", action="store_true", help="torch.compile (needs a C++ compiler; a quarter faster)")
    parser.add_argument("--judge", type=int, default=400, metavar="N", help="pictures per category for the card")
    parser.add_argument("--toy", action="store_true", help="tiny networks and batches, to try the whole way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pochade.starter").setLevel(logging.INFO)
    torch.set_num_threads(args.threads)
    use_fast_operations()
    batches = Batches(starter_tokenizer(), np.random.default_rng(args.seed), size=4 if args.toy else 64)
    sizes = {"dim": 64, "layers": 1, "single_layers": 1} if args.toy else {}
    trainer = Trainer(batches, args.rate, not args.adamw, args.seed, args.compile, **sizes)
    run(trainer, args.out, Budget(samples=args.samples))
    train_codec_once(args.out, args.codec_samples, args.toy)
    checkpoint, fp32, int8 = (args.out / name for name in ("checkpoint", "fp32", "int8"))
    painter, tokenizer = load_run(args.out)
    write_checkpoint(checkpoint, painter, torch.load(args.out / CODEC, weights_only=True), tokenizer)
    export_checkpoint(checkpoint, fp32, overwrite=True)
    quantize_bundle(fp32, int8, SHIPPED, overwrite=True)
    if args.judge:
        write_card(args.out, adherence_once(fp32, args.judge, args.out / "adherence.json"))


if __name__ == "__main__":
    main()
