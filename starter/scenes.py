"""Scenes: what a picture shows, the parts it is drawn from, and its exact pixels.

A scene is built so that its caption determines the picture: whatever the caption leaves out has
a fixed default. Only the flowers of a meadow and the stars of a night sky lie where they like.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pochade.starter.shapes import (
    CELL,
    DECORATIONS,
    FLATS,
    GRID,
    SIDE,
    SIZES,
    Mask,
    Rgb,
    coverage,
    face_ink,
    marks,
    roof,
)

KINDS = ("single", "relation", "count", "three", "face", "house")

SETTINGS = {"night sky": "dark blue", "meadow": "light green"}
"""Settings of objects with scattered decorations, and their background."""

GROUNDS = {"grass": "light green", "snow": "white", "sand": "beige"}
"""Grounds that a house can stand on, and their background."""

SKIES = {"day": "light blue", "night": "dark blue"}

MOODS = ("happy", "sad", "surprised", "winking")

GROUND_ROW = 13
"""First row of cells of the ground around a house."""


@dataclass(frozen=True)
class Fill:
    """Whole cells of one colour of FLATS."""

    colour: str
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Figure:
    """A mask of whole cells in one colour on a background."""

    colour: str
    behind: str
    top: int
    left: int
    mask: Mask


@dataclass(frozen=True)
class Mark:
    """A small drawing in one cell, of some ink on a colour of FLATS."""

    name: str
    ink: Rgb
    behind: str
    row: int
    column: int


Part = Fill | Figure | Mark
"""Parts are drawn one after the other; places and sizes are in cells from the top left."""


@dataclass(frozen=True)
class Thing:
    """One object: what it is and where its centre lies, in pixels from the top left."""

    colour: str
    shape: str
    size: str
    x: int
    y: int


@dataclass(frozen=True)
class Face:
    """A large round face."""

    colour: str
    mood: str


@dataclass(frozen=True)
class House:
    """A house in a landscape."""

    wall: str
    roof: str
    time: str
    """One of SKIES."""
    ground: str
    """One of GROUNDS."""
    tree: bool


@dataclass(frozen=True)
class Scene:
    """A background and objects, or a face, or a house."""

    kind: str
    """One of KINDS. Relations have two different objects, counts two or three equal ones,
    threes three different ones."""
    things: tuple[Thing, ...] = ()
    """For a relation, the left or upper object first; for threes the upper, the left, the right."""
    background: str = "white"
    axis: str = ""
    """For a relation, "x" (left to right) or "y" (top to bottom)."""
    setting: str = ""
    """One of SETTINGS, or empty for a plain background."""
    face: Face | None = None
    house: House | None = None
    decorations: tuple[tuple[str, int, int], ...] = ()
    """Name in DECORATIONS, row and column."""

    def undecorated(self) -> Scene:
        """The same without what lies scattered."""
        return replace(self, decorations=())


def _face(face: Face, behind: str) -> Iterator[Part]:
    """A face in the middle of the picture."""
    yield Figure(face.colour, behind, 3, 3, coverage("circle", "large"))
    drawn = [("eye", 5, 5)]
    drawn.append(("closed eye", 6, 9) if face.mood == "winking" else ("eye", 5, 10))
    drawn.append({"sad": ("frown", 9, 5), "surprised": ("o", 9, 7)}.get(face.mood, ("smile", 9, 5)))
    for feature, top, left in drawn:
        for name in marks():
            if name.startswith(feature + " "):
                row, column = map(int, name.split()[-2:])
                yield Mark(name, face_ink(face.colour), face.colour, top + row, left + column)


def _house(house: House) -> Iterator[Part]:
    """A house on the left, sun or moon on the right, and perhaps a tree below it."""
    sky = SKIES[house.time]
    yield Fill(GROUNDS[house.ground], GROUND_ROW, 0, GRID - GROUND_ROW, GRID)
    light = coverage("circle" if house.time == "day" else "moon", "small")
    yield Figure("yellow", sky, 1, 9, light)
    yield Figure(house.roof, sky, 4, 1, roof())
    yield Fill(house.wall, 8, 2, 6, 6)
    for column in (3, 6):
        yield Fill("white" if house.time == "day" else "yellow", 9, column, 1, 1)
    yield Fill("brown", 11, 4, 3, 2)
    if house.tree:
        yield Figure("green", sky, 7, 9, coverage("circle", "small"))
        yield Fill("brown", 13, 11, 2, 2)


def parts(scene: Scene) -> Iterator[Part]:
    """What to draw, in order; the first part fills the picture."""
    yield Fill(scene.background, 0, 0, GRID, GRID)
    for thing in scene.things:
        r = SIZES[thing.size]
        place = ((thing.y - r) // CELL, (thing.x - r) // CELL)
        yield Figure(thing.colour, scene.background, *place, coverage(thing.shape, thing.size))
    if scene.face:
        yield from _face(scene.face, scene.background)
    if scene.house:
        yield from _house(scene.house)
    for name, row, column in scene.decorations:
        behind = next(ground for ground, table in DECORATIONS.items() if name in table)
        mark, ink = DECORATIONS[behind][name]
        yield Mark(mark, ink, behind, row, column)


def render(scene: Scene) -> NDArray[np.uint8]:
    """The exact picture of a scene, uint8 RGB (SIDE, SIDE, 3)."""
    picture = np.empty((SIDE, SIDE, 3), np.float32)
    for part in parts(scene):
        match part:
            case Fill(colour, top, left, height, width):
                picture[top * CELL : (top + height) * CELL, left * CELL : (left + width) * CELL] = FLATS[colour]
            case Figure(colour, _, top, left, mask):
                box = picture[top * CELL :, left * CELL :][: mask.shape[0], : mask.shape[1]]
                box += mask[..., None] * (np.array(FLATS[colour], np.float32) - box)
            case Mark(name, ink, behind, row, column):
                box = picture[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
                below = np.array(FLATS[behind], np.float32)
                box[...] = below + marks()[name][..., None] * (np.array(ink, np.float32) - below)
    return np.rint(picture).astype(np.uint8)
