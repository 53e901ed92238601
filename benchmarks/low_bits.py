"""What fewer bits would give: linear weights of a float bundle rounded to 2, 3, 4 and 8 bits, computed in float.

    python -m pochade.benchmarks.low_bits BUNDLE [--bits 3 2] [--judge N]

The rounded bundles are float bundles: nothing of them is small or fast. They tell whether a kernel would be worth it.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from pochade.bundle import Bundle
from pochade.quant.blocks import rows_of
from pochade.quant.component import decide
from pochade.quant.fidelity import Call
from pochade.quant.instrument import Instrument
from pochade.quant.moments import input_moments
from pochade.quant.rounding import METHODS
from pochade.quant.scheme import SCHEMES
from pochade.quant.scorecard import Scorecard
from pochade.quant.select import find_weights
from pochade.quant.trial import record_calibration
from pochade.runtime.locate import resolve

BITS = (8, 4, 3, 2)
BLOCK = 128
COMPONENTS = ("text_encoder", "transformer")
"""Those whose weights are rounded; what the int4 scheme calls sensitive stays float."""


def round_component(source: Path, target: Path, name: str, bits: int, method: str, calls: list[Call]) -> None:
    """Write a copy of a graph with its 4-bit layers rounded to other bits."""
    model = ir.load(source)
    weights = {w.name: w for w in find_weights(model) if decide(w, name, SCHEMES["int4"]).bits == 4}
    for weight_name, moment in input_moments(Instrument(source, replacing=False), list(weights), calls):
        weight = weights[weight_name]
        rows = rows_of(weight)
        scales, codes = METHODS[method](rows, bits, BLOCK, np.float32, moment)
        kept = (codes * scales[..., None]).reshape(len(rows), -1)[:, : weight.width].astype(np.float32)
        plain = kept if weight.axis == 0 else kept.T
        weight.value.const_value = ir.Tensor(np.ascontiguousarray(plain), name=weight.name)
    ir.save(model, target, external_data=f"{target.name}.data", size_threshold_bytes=1024)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="float bundle: folder or installed name")
    parser.add_argument("--judge", type=int, default=0, metavar="N", help="starter: also judge N pictures a category")
    parser.add_argument("--bits", type=int, nargs="+", choices=BITS, default=list(BITS), metavar="BITS")
    args = parser.parse_args(argv)
    bundle = Bundle.open(resolve(args.bundle))
    calls = record_calibration(bundle, (), lambda *_: None)
    print("| bits | rounding | text, dB | transformer, dB | draws equal | right pictures |")
    print("|---|---|---|---|---|---|")
    for bits in args.bits:
        for method in ("rtn", "gptq"):
            with tempfile.TemporaryDirectory(dir=bundle.path.parent) as folder:
                copy = Path(folder)
                for file in bundle.path.iterdir():
                    if not file.name.startswith(COMPONENTS):
                        shutil.copyfile(file, copy / file.name)
                for name in COMPONENTS:
                    graph = bundle.component_path(name)
                    round_component(graph, copy / graph.name, name, bits, method, calls[name])
                rounded = Bundle(copy, replace(bundle.manifest, files=()))
                scorecard = Scorecard.measure(bundle, rounded, lambda *_: None)
                right = _right(rounded, args.judge) if args.judge else "-"
            parts = scorecard.components
            print(
                f"| {bits} | {method} | {parts['text_encoder']['snr_db']:.1f} | {parts['transformer']['snr_db']:.1f} "
                f"| {scorecard.pipeline['forced_agreement']:.2%} | {right} |",
                flush=True,
            )


def _right(bundle: Bundle, n: int) -> str:
    from pochade.quant.fidelity import open_pipeline
    from pochade.starter.evaluate import CATEGORIES, cases, judge, share_of

    pipe = open_pipeline(bundle)
    return str(share_of([verdict for category in CATEGORIES for verdict in judge(pipe, cases(category, n))]))


if __name__ == "__main__":
    main()
