"""Judges whether a picture shows exactly the scene it should, with reasons when it does not.

The checker knows nothing of the model. It segments the picture, names every object by template
matching, and compares with the scene: positions are free where the caption leaves them free.
Faces and houses, which have one right picture, are compared with it. Flowers and stars where
they may be are ignored.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pochade.starter.scenes import GROUND_ROW, GROUNDS, Scene, Thing, render
from pochade.starter.shapes import (
    BACKGROUNDS,
    CELL,
    COLOURS,
    DECORATIONS,
    GRID,
    LATTICE,
    SHAPES,
    SIDE,
    SIZES,
    coverage,
    marks,
)

COLOUR_LIMIT = 40.0
"""Largest RGB distance of a background or an object's inside from its palette colour."""

IOU_LIMIT = 0.85
"""Smallest overlap (intersection over union) of an object with its template."""

STRAY_LIMIT = 24
"""Most pixels, of 16 384, that may belong neither to background, objects nor their edges."""

EDGE = 3
"""Pixels by which an outline may be off without counting as stray; the overlap limit still holds."""

_BLUR = 5
"""Width in pixels of the neighbourhood whose colours a pixel of a face or house may have."""

_SCATTERED = 26.0
"""Largest mean RGB distance of a cell from the flower or star it is taken for."""

_STEP = 45.0
"""RGB distance from the background above which a pixel is foreground; edges are half covered there."""


@dataclass(frozen=True)
class Found:
    """One object found in a picture."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    """Centre of its template in pixels."""
    iou: float
    colour_error: float
    stray: int
    """Pixels of a colour that is no mixture of the object's and the background's, and pixels missing
    or too many farther than EDGE from the template's outline."""


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a picture; nothing when it is right."""

    reasons: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the picture shows the scene."""
        return not self.reasons


def _nearest(colour: NDArray[np.float64], palette: dict[str, tuple[int, int, int]]) -> tuple[str, float]:
    """Name and RGB distance of the nearest palette colour."""
    distance = {name: float(np.linalg.norm(colour - np.array(rgb))) for name, rgb in palette.items()}
    name = min(distance, key=distance.__getitem__)
    return name, distance[name]


def _iou(mask: NDArray[np.bool_], template: NDArray[np.bool_], x: int, y: int) -> float:
    """Overlap of a full-size mask with a template centred at (x, y)."""
    r = len(template) // 2
    if not (r <= x <= SIDE - r and r <= y <= SIDE - r):
        return 0.0
    both = int((mask[y - r : y + r, x - r : x + r] & template).sum())
    return both / (int(mask.sum()) + int(template.sum()) - both)


def _match(mask: NDArray[np.bool_]) -> tuple[float, str, str, int, int]:
    """The best (overlap, shape, size, x, y) of all templates at lattice places around the mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    mid_x, mid_y = (int(columns[0] + columns[-1] + 1) // 2, int(rows[0] + rows[-1] + 1) // 2)
    # A moon's box lies up to 14 pixels beside its centre; no shape's lies as far above or below.
    places = [
        (x, y)
        for x in range(0, SIDE, CELL)
        for y in range(0, SIDE, CELL)
        if abs(x - mid_x) <= LATTICE and abs(y - mid_y) <= CELL
    ]
    tries = [
        (_iou(mask, coverage(shape, size) > 0.5, x, y), shape, size, x, y)
        for shape in SHAPES
        for size in SIZES
        for x, y in places
    ]
    return max(tries)


def _misplaced(mask: NDArray[np.bool_], shape: str, size: str, x: int, y: int) -> int:
    """Pixels that the mask lacks or has too many, more than EDGE pixels from the template's outline."""
    template = np.zeros_like(mask)
    r = SIZES[size]
    template[y - r : y + r, x - r : x + r] = coverage(shape, size) > 0.5
    square = np.ones((2 * EDGE + 1, 2 * EDGE + 1))
    lacking = ndimage.binary_erosion(template, square) & ~mask
    excess = mask & ~ndimage.binary_dilation(template, square)
    return int(lacking.sum() + excess.sum())


def _edge_error(
    pixels: NDArray[np.float64], front: NDArray[np.float64], behind: NDArray[np.float64]
) -> NDArray[np.float64]:
    """RGB distance of pixels (n, 3) from the straight line between two colours."""
    line = front - behind
    share = np.clip((pixels - behind) @ line / (line @ line), 0, 1)
    distance: NDArray[np.float64] = np.linalg.norm(pixels - behind - share[:, None] * line, axis=1)
    return distance


def find_objects(picture: NDArray[np.uint8]) -> tuple[str, float, list[Found], int]:
    """Background name, its colour error, the objects, and the number of stray pixels outside them."""
    pixels = picture.astype(np.float64)
    frame = np.concatenate(
        [
            pixels[:4].reshape(-1, 3),
            pixels[-4:].reshape(-1, 3),
            pixels[:, :4].reshape(-1, 3),
            pixels[:, -4:].reshape(-1, 3),
        ]
    )
    background, error = _nearest(np.median(frame, axis=0), BACKGROUNDS)
    behind = np.array(BACKGROUNDS[background], np.float64)
    foreground = np.linalg.norm(pixels - behind, axis=-1) > _STEP
    labels, n = ndimage.label(foreground, np.ones((3, 3)))
    found: list[Found] = []
    stray = 0
    for label in range(1, n + 1):
        region = labels == label
        if region.sum() <= STRAY_LIMIT:
            stray += int(region.sum())
            continue
        inside = ndimage.binary_erosion(region, iterations=2)
        values = pixels[inside if inside.any() else region]
        colour, colour_error = _nearest(np.median(values, axis=0), COLOURS)
        front = np.array(COLOURS[colour], np.float64)
        odd = int((_edge_error(pixels[region], front, behind) > COLOUR_LIMIT).sum())
        # Half covered is where a pixel is nearer to the object than to the background.
        mask = region & (np.linalg.norm(pixels - front, axis=-1) < np.linalg.norm(pixels - behind, axis=-1))
        if not mask.any():
            stray += int(region.sum())
            continue
        iou, shape, size, x, y = _match(mask)
        odd += _misplaced(mask, shape, size, x, y) if iou > 0 else 0
        found.append(Found(colour, shape, size, x, y, iou, colour_error, odd))
    return background, error, found, stray


def _place_reasons(scene: Scene, found: list[Found]) -> list[str]:
    """What is wrong with the places of objects that are otherwise right."""
    if scene.kind == "single":
        thing = scene.things[0]
        off = max(abs(found[0].x - thing.x), abs(found[0].y - thing.y))
        return [f"object is {off:.0f} px off its place"] if off > CELL else []
    if scene.kind != "relation":
        return []

    def place(thing: Thing) -> Found:
        return next(f for f in found if (f.colour, f.shape) == (thing.colour, thing.shape))

    first, second = map(place, scene.things)
    along, across = second.x - first.x, second.y - first.y
    if scene.axis == "y":
        along, across = across, along
    word = "left of" if scene.axis == "x" else "above"
    right = along >= 2 * LATTICE and abs(across) <= along / 2
    return [] if right else [f"the first object is not {word} the second"]


def without_decorations(picture: NDArray[np.uint8], grounds: NDArray[np.object_]) -> NDArray[np.uint8]:
    """The picture with flowers and stars painted over.

    Args:
        picture: uint8 RGB (SIDE, SIDE, 3).
        grounds: name of the background that each cell may show, object (GRID, GRID).
    """
    out = picture.copy()
    for row in range(GRID):
        for column in range(GRID):
            table = DECORATIONS.get(grounds[row, column], {})
            if not table:
                continue
            cell = out[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
            behind = np.array(BACKGROUNDS[grounds[row, column]], np.float64)
            for name, ink in table.values():
                drawn = behind + marks()[name][..., None] * (np.array(ink, np.float64) - behind)
                if np.linalg.norm(cell - drawn, axis=-1).mean() <= _SCATTERED:
                    cell[:] = BACKGROUNDS[grounds[row, column]]
                    break
    return out


def _grounds(scene: Scene) -> NDArray[np.object_]:
    """The background that each cell of a scene's picture may show, object (GRID, GRID)."""
    out = np.full((GRID, GRID), scene.background, object)
    if scene.house:
        out[GROUND_ROW:] = GROUNDS[scene.house.ground]
    return out


def _differences(picture: NDArray[np.uint8], truth: NDArray[np.uint8]) -> int:
    """Pixels with a colour that the true picture does not have within a few pixels."""
    size = (_BLUR, _BLUR, 1)
    low = ndimage.minimum_filter(truth, size).astype(np.float64) - COLOUR_LIMIT
    high = ndimage.maximum_filter(truth, size).astype(np.float64) + COLOUR_LIMIT
    return int(((picture < low) | (picture > high)).any(-1).sum())


def check(picture: NDArray[np.uint8], scene: Scene) -> Verdict:
    """The verdict on a picture, uint8 RGB (SIDE, SIDE, 3), that should show the scene."""
    if scene.face or scene.house or scene.setting:
        picture = without_decorations(picture, _grounds(scene))
    if scene.face or scene.house:
        wrong = _differences(picture, render(scene.undecorated()))
        return Verdict((f"{wrong} pixels are not the {scene.kind}'s",) if wrong > STRAY_LIMIT else ())
    background, error, found, stray = find_objects(picture)
    reasons = []
    if background != scene.background or error > COLOUR_LIMIT:
        reasons.append(f"background is {background} (error {error:.0f}), not {scene.background}")
    if len(found) != len(scene.things):
        reasons.append(f"{len(found)} objects, not {len(scene.things)}")
    got = Counter((f.colour, f.shape, f.size) for f in found)
    wanted = Counter((t.colour, t.shape, t.size) for t in scene.things)
    for name in sorted((wanted - got).elements()):
        reasons.append("no {2} {0} {1}".format(*name))
    reasons += [f"{f.colour} {f.shape} overlaps its template only {f.iou:.2f}" for f in found if f.iou < IOU_LIMIT]
    reasons += [
        f"{f.colour} {f.shape} is off its colour by {f.colour_error:.0f}"
        for f in found
        if f.colour_error > COLOUR_LIMIT
    ]
    stray += sum(f.stray for f in found)
    if stray > STRAY_LIMIT:
        reasons.append(f"{stray} stray pixels")
    if not reasons:
        reasons += _place_reasons(scene, found)
    return Verdict(tuple(reasons))
