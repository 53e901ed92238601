"""Compares ways to quantize one float bundle: bytes, fidelity and time.

python -m pochade.benchmarks.roundings BUNDLE [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pochade.bundle import Bundle
from pochade.quant.bundle import quantize_bundle
from pochade.quant.scheme import SCHEMES, STATIC, Scheme, blocks
from pochade.runtime.locate import resolve


def variants() -> Iterator[tuple[str, Scheme]]:
    """What is compared, with a name for each."""
    four, eight = (replace(SCHEMES[name], int8_attention=False) for name in ("int4", "int8"))
    for method in ("rtn", "search", "hqq", "gptq"):
        yield f"int4 {method}", replace(four, rounding=method)
    for rank in (16, 32):
        yield f"int4 rtn + low rank {rank}", replace(four, rounding="rtn", low_rank=rank)
        yield f"int4 gptq + low rank {rank}", replace(four, low_rank=rank)
    for size in (64, 32):
        yield f"int4 rtn, blocks of {size}", replace(four, rounding="rtn").with_block_size(size)
        yield f"int4 gptq, blocks of {size}", four.with_block_size(size)
    yield "int8 dynamic", eight
    for strength in (0.3, 0.5, 0.7):
        yield f"int8 dynamic, smoothing {strength}", replace(eight, smoothing=strength)
    yield "int8 dynamic, int8 attention", replace(eight, int8_attention=True)
    yield "int8 static", replace(eight, linear=STATIC, sensitive=STATIC)
    yield "int8 blocks", replace(eight, linear=blocks(8), sensitive=blocks(8))


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="float bundle: folder or installed name")
    names = [name for name, _ in variants()]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"some of: {'; '.join(names)}")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    source = Bundle.open(resolve(args.bundle))
    results: dict[str, dict[str, Any]] = {}
    print("| variant | transformer, MB | text, dB | transformer, dB | draws equal | seconds |")
    print("|---|---|---|---|---|---|")
    for name, scheme in variants():
        if args.only and name not in args.only:
            continue
        with tempfile.TemporaryDirectory(dir=source.path.parent) as folder:
            start = time.perf_counter()
            made = quantize_bundle(source.path, Path(folder) / "made", scheme)
            seconds = time.perf_counter() - start
            scorecard = made.manifest.scorecard
            assert scorecard is not None
            results[name] = {"bytes": made.size, "transformer_bytes": made.component_size("transformer")}
            results[name] |= {"seconds": round(seconds, 1), "scorecard": scorecard}
        components = scorecard["components"]
        print(
            f"| {name} | {results[name]['transformer_bytes'] / 1e6:.2f} | {components['text_encoder']['snr_db']:.1f} "
            f"| {components['transformer']['snr_db']:.1f} | {scorecard['pipeline']['forced_agreement']:.2%} "
            f"| {seconds:.0f} |",
            flush=True,
        )
        if args.json:
            args.json.write_text(json.dumps(results, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
