"""The same prompts and seed painted by several bundles, in one picture.

python -m pochade.benchmarks.side_by_side OUT.png BUNDLE BUNDLE ... [--prompt TEXT ...]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import pochade
from pochade.bundle import Bundle
from pochade.quant.trial import typical_prompts
from pochade.runtime.locate import resolve


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="picture to write")
    parser.add_argument("bundles", nargs="+", help="bundle folders or installed names, a column each")
    parser.add_argument("--prompt", action="append", default=[], help="a row; repeatable (default: typical prompts)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    from matplotlib.figure import Figure

    bundles = [Bundle.open(resolve(name)) for name in args.bundles]
    prompts = args.prompt or [text for text in typical_prompts(bundles[0]) if text.isascii()][:4]
    figure = Figure(figsize=(1.7 * len(bundles), 1.85 * len(prompts)), layout="constrained")
    axes = figure.subplots(len(prompts), len(bundles), squeeze=False)
    for column, bundle in enumerate(bundles):
        with pochade.load(bundle.path, device="cpu") as pipe:
            for row, prompt in enumerate(prompts):
                panel = axes[row][column]
                panel.imshow(np.asarray(pipe(prompt, seed=args.seed).images[0]))
                panel.set_xticks([])
                panel.set_yticks([])
                if row == 0:
                    panel.set_title(f"{bundle.manifest.name}, {bundle.size / 1e6:.1f} MB", fontsize="small")
    figure.savefig(args.target, dpi=110)


if __name__ == "__main__":
    main()
