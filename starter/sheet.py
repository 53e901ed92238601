"""Paints the sheet of pictures that the README shows: `python -m pochade.starter.sheet docs/starter.png`."""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

import pochade
from pochade.starter.shapes import SIDE

ROWS = (
    ("a large red star", "一个开心的脸", "a yellow house with a red roof and a tree", "a pink heart in the night sky"),
    (
        "a blue circle to the left of an orange cross",
        "a red square, a green moon and a purple triangle",
        "a red house with a blue roof and a tree in the snow at night",
        "三个绿色星星",
    ),
    (
        "a winking pink face on a meadow",
        "a small black ring at the top right on a beige background",
        "一个紫色房子，橙色屋顶，有树，沙滩上",
        "a surprised blue face in the night sky",
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
