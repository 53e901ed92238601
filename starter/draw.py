"""Scenes at random, for training and for judging, and what training never sees of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from pochade.starter.scenes import GROUNDS, MOODS, SETTINGS, SKIES, Face, Fill, House, Scene, Thing, parts
from pochade.starter.shapes import BACKGROUNDS, CELL, COLOURS, DECORATIONS, GRID, LATTICE, SHAPES, SIDE

T = TypeVar("T")

Pair = tuple[str, str]
"""A colour and a shape."""

HELD_OUT_PAIRS: frozenset[Pair] = frozenset(
    {
        ("red", "ring"),
        ("green", "moon"),
        ("blue", "heart"),
        ("yellow", "cross"),
        ("orange", "circle"),
        ("purple", "square"),
        ("black", "triangle"),
        ("pink", "star"),
    }
)
"""Every colour and every shape once; in no training picture."""

HELD_OUT_RELATIONS: frozenset[tuple[str, str, str]] = frozenset(
    {
        ("circle", "x", "star"),
        ("square", "x", "heart"),
        ("moon", "x", "triangle"),
        ("cross", "x", "ring"),
        ("heart", "y", "circle"),
        ("star", "y", "square"),
        ("ring", "y", "moon"),
        ("triangle", "y", "cross"),
    }
)
"""Shape, axis, shape: the first left of or above the second; in no training picture."""

SHARES = {"single": 0.34, "relation": 0.2, "count": 0.12, "three": 0.16, "face": 0.08, "house": 0.1}
"""How often each kind is drawn in training."""

USUAL_COLOUR = {
    "circle": "red",
    "square": "blue",
    "triangle": "green",
    "star": "yellow",
    "heart": "red",
    "moon": "yellow",
    "ring": "orange",
    "cross": "black",
}
"""The colour of a single object whose caption names none."""

_SCATTER = 0.12
"""Chance that a bare cell of a meadow or night sky holds a flower or star."""


def all_pairs(held_out: bool = True) -> list[Pair]:
    """Every (colour, shape), or only those that training sees."""
    return [(c, s) for c in COLOURS for s in SHAPES if held_out or (c, s) not in HELD_OUT_PAIRS]


def decorated(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with flowers and stars scattered over its bare cells."""
    bare = np.full((GRID, GRID), "", object)
    for part in parts(scene):
        if isinstance(part, Fill):
            decorates = part.colour in DECORATIONS
            name = part.colour if decorates else ""
            bare[part.top : part.top + part.height, part.left : part.left + part.width] = name
        elif not hasattr(part, "row"):
            h, w = part.mask.shape[0] // CELL, part.mask.shape[1] // CELL
            touched = part.mask.reshape(h, CELL, w, CELL).max(axis=(1, 3)) > 0
            bare[part.top : part.top + h, part.left : part.left + w][touched] = ""
    chance = rng.random((GRID, GRID))
    out = []
    for row, column in zip(*np.nonzero((bare != "") & (chance < _SCATTER)), strict=True):
        names = list(DECORATIONS[bare[row, column]])
        out.append((names[int(rng.integers(len(names)))], int(row), int(column)))
    return replace(scene, decorations=tuple(out))


def backdrop(scene: Scene, setting: str, rng: np.random.Generator) -> Scene:
    """The scene on one of BACKGROUNDS or in one of SETTINGS."""
    if setting in SETTINGS:
        return decorated(replace(scene, background=SETTINGS[setting], setting=setting), rng)
    return replace(scene, background=setting)


def single(pair: Pair, size: str = "large", place: tuple[int, int] = (0, 0)) -> Scene:
    """One object; `place` counts from the centre, -1 to 1, to the right and down."""
    step = LATTICE if size == "large" else 2 * LATTICE
    x, y = (SIDE // 2 + step * p for p in place)
    return Scene("single", (Thing(*pair, size, x, y),))


def relation(first: Pair, second: Pair, axis: str) -> Scene:
    """Two small objects, the first to the left of (axis x) or above (axis y) the second."""
    spots = [(32, 64), (96, 64)] if axis == "x" else [(64, 32), (64, 96)]
    things = tuple(Thing(*pair, "small", *spot) for pair, spot in zip((first, second), spots, strict=True))
    return Scene("relation", things, axis=axis)


_TRIANGLE = ((64, 32), (32, 96), (96, 96))


def count(pair: Pair, number: int) -> Scene:
    """Two small equal objects side by side, or three in a triangle."""
    spots = ((32, 64), (96, 64)) if number == 2 else _TRIANGLE
    return Scene("count", tuple(Thing(*pair, "small", *spot) for spot in spots))


def three(pairs: tuple[Pair, Pair, Pair]) -> Scene:
    """Three small different objects in a triangle."""
    return Scene("three", tuple(Thing(*p, "small", *spot) for p, spot in zip(pairs, _TRIANGLE, strict=True)))


def face(colour: str, mood: str) -> Scene:
    """A face."""
    return Scene("face", face=Face(colour, mood))


def house(
    rng: np.random.Generator, wall: str, roof: str, time: str = "day", ground: str = "grass", tree: bool = False
) -> Scene:
    """A house in its landscape, with flowers or stars."""
    scene = Scene("house", background=SKIES[time], house=House(wall, roof, time, ground, tree))
    return decorated(scene, rng)


def is_held_out(scene: Scene) -> bool:
    """Whether training must not see the scene."""
    if any((t.colour, t.shape) in HELD_OUT_PAIRS for t in scene.things):
        return True
    if scene.kind != "relation":
        return False
    first, second = scene.things
    return (first.shape, scene.axis, second.shape) in HELD_OUT_RELATIONS


def pick(options: Sequence[T], rng: np.random.Generator) -> T:
    """Any of the options."""
    return options[int(rng.integers(len(options)))]


def different_pairs(rng: np.random.Generator, number: int, pairs: list[Pair]) -> list[Pair]:
    """Pairs without repetition."""
    return [pairs[i] for i in rng.choice(len(pairs), number, replace=False)]


def random_backdrop(rng: np.random.Generator) -> str:
    """White half of the time, otherwise any background or setting."""
    return "white" if rng.random() < 0.5 else pick([*BACKGROUNDS, *SETTINGS], rng)


def random_of(kind: str, rng: np.random.Generator, pairs: list[Pair]) -> Scene:
    """A random scene of one of KINDS with objects out of `pairs`."""
    match kind:
        case "single":
            size = "small" if rng.random() < 0.3 else "large"
            place = (0, 0)
            if rng.random() < 0.3:
                place = (int(rng.integers(-1, 2)), int(rng.integers(-1, 2)))
            scene = single(pick(pairs, rng), size, place)
        case "relation":
            first, second = different_pairs(rng, 2, pairs)
            scene = relation(first, second, pick("xy", rng))
        case "count":
            scene = count(pick(pairs, rng), int(rng.integers(2, 4)))
        case "three":
            first, second, third = different_pairs(rng, 3, pairs)
            scene = three((first, second, third))
        case "face":
            scene = face(pick(list(COLOURS), rng), pick(MOODS, rng))
        case _:
            wall, roof = pick(list(COLOURS), rng), pick(list(COLOURS), rng)
            time = "night" if rng.random() < 0.4 else "day"
            ground = "grass" if rng.random() < 0.5 else pick(list(GROUNDS), rng)
            return house(rng, wall, roof, time, ground, bool(rng.random() < 0.5))
    return backdrop(scene, random_backdrop(rng), rng)


def random_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """A random scene with kinds by their SHARES; what is held out appears only when asked for."""
    edges = np.cumsum(list(SHARES.values()))
    pairs = all_pairs(held_out)
    while True:
        kind = list(SHARES)[int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))]
        scene = random_of(kind, rng, pairs)
        if held_out or not is_held_out(scene):
            return scene
