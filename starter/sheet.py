"""Paints the sheet of pictures that the README shows: `python -m pochade.starter.sheet docs/starter.png`."""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

import pochade
from pochade.starter.scenes import SIDE

ROWS = (
    ("a red circle", "a large blue star", "一个绿色的月亮", "a small pink heart"),
    ("two purple triangles", "three orange stars", "a black ring on a light blue background", "一个黄色的十字"),
    (
        "a red heart to the left of a blue circle",
        "a green cross above a pink square",
        "紫色的星星在红色圆形的右边",
        "two black moons",
    ),
)
GAP = 8


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--model", default="starter", help="bundle folder or installed name")
    parser.add_argument("--seed", type=int, default=1, help="the same for all pictures")
    arguments = parser.parse_args()
    step = SIDE + GAP
    sheet = Image.new("RGB", (len(ROWS[0]) * step + GAP, len(ROWS) * step + GAP), (128, 128, 128))
    with pochade.load(arguments.model) as pipe:
        for y, row in enumerate(ROWS):
            for x, prompt in enumerate(row):
                picture = pipe(prompt, seed=arguments.seed).images[0]
                sheet.paste(picture, (GAP + x * step, GAP + y * step))
    sheet.save(arguments.target)


if __name__ == "__main__":
    main()
