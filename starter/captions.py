"""Captions of scenes in English and Chinese.

Every caption names its scene without ambiguity, given the defaults: a background that is not
named is white, a single object whose size is not named is large and lies in the middle, one whose
colour is not named has its usual colour, objects joined by "and" (or 和) stand left to right, three
of them in a triangle from the top; a face is yellow and happy; a house is yellow with a red roof,
by day, on grass, without a tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pochade.starter import words
from pochade.starter.draw import USUAL_COLOUR
from pochade.starter.scenes import Face, House, Scene, Thing
from pochade.starter.shapes import SIDE

LANGUAGES = ("en", "zh")


class Choices:
    """Random choices of a wording; held-out templates are offered only when asked for."""

    def __init__(self, rng: np.random.Generator, held_out: bool = False) -> None:
        self.rng = rng
        self.held_out = held_out

    def word(self, options: Sequence[str]) -> str:
        """The first option half of the time, otherwise any: common wordings are learned first."""
        return options[0] if self.rng.random() < 0.5 else options[int(self.rng.integers(len(options)))]

    def template(self, options: Sequence[str], held_out: Sequence[str]) -> str:
        """A template: one that training never sees if those are asked for, and there are any."""
        return self.word(held_out if self.held_out and held_out else options)

    def says(self, chance: float) -> bool:
        """Whether to say something that could be left out."""
        return bool(self.rng.random() < chance)


class Plain(Choices):
    """Takes the first wording everywhere and says nothing that may be left out."""

    def __init__(self) -> None:
        super().__init__(np.random.default_rng(0))

    def word(self, options: Sequence[str]) -> str:
        """The usual one."""
        return options[0]

    def says(self, chance: float) -> bool:  # noqa: ARG002 - as its base
        """No."""
        return False


def _a(phrase: str) -> str:
    """The phrase with its indefinite article."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _place(thing: Thing) -> tuple[int, int]:
    """Column and row of a single object, each -1, 0 or 1."""
    middle = SIDE // 2
    return int(np.sign(thing.x - middle)), int(np.sign(thing.y - middle))


def _says_size(scene: Scene, choose: Choices) -> bool:
    """Whether the caption names the size: only singles vary in size, and large is the default."""
    return scene.kind == "single" and (scene.things[0].size == "small" or choose.says(0.25))


def _says_colour(scene: Scene, choose: Choices) -> bool:
    """Whether the caption names a single object's colour: each shape has a usual one."""
    thing = scene.things[0]
    return scene.kind != "single" or thing.colour != USUAL_COLOUR[thing.shape] or not choose.says(0.3)


def _backdrop(scene: Scene, choose: Choices, plain: words.Words, settings: dict[str, words.Templates]) -> str:
    """The template that adds the background or setting, with `{}` for the text so far."""
    if scene.setting:
        return choose.word(settings[scene.setting])
    if scene.background == "white" and not choose.says(0.2):
        return "{}"
    on = words.EN_ON if plain is words.EN_BACKGROUNDS else words.ZH_ON
    return choose.word(on).format("{}", choose.word(plain[scene.background]))


def _english_house(house: House, choose: Choices) -> str:
    """A house in English."""
    wall = house.wall != "yellow" or not choose.says(0.5)
    text = _a(f"{choose.word(words.EN_COLOURS[house.wall])} house" if wall else "house")
    extras = []
    if house.roof != "red" or choose.says(0.5):
        extras.append(_a(choose.word(words.EN_COLOURS[house.roof]) + " roof"))
    if house.tree:
        extras.append("a tree")
    if extras:
        text += " with " + " and ".join(extras)
    if house.ground != "grass" or choose.says(0.3):
        text += " " + choose.word(words.EN_GROUNDS[house.ground])
    if house.time != "day" or choose.says(0.2):
        text += " " + choose.word(words.EN_TIMES[house.time])
    return text


def _english(scene: Scene, choose: Choices) -> str:
    """An English caption."""
    sized = _says_size(scene, choose)

    def noun(thing: Thing) -> str:
        out = [choose.word(words.EN_SIZES[thing.size])] if sized else []
        out += [choose.word(words.EN_COLOURS[thing.colour])] if _says_colour(scene, choose) else []
        return " ".join([*out, choose.word(words.EN_SHAPES[thing.shape])])

    nouns = [noun(thing) for thing in scene.things] if scene.things else []
    match scene.kind:
        case "single":
            text = _a(nouns[0])
            if (place := _place(scene.things[0])) != (0, 0) or choose.says(0.1):
                text += " " + choose.word(words.EN_PLACES[place])
        case "count":
            plural = nouns[0] + ("es" if nouns[0].endswith("s") else "s")
            text = f"{choose.word(words.EN_NUMBERS[len(nouns)])} {plural}"
        case "three":
            text = choose.template(words.EN_THREES, words.EN_HELD_OUT_THREES).format(*map(_a, nouns))
        case "relation":
            template = choose.template(words.EN_RELATIONS[scene.axis], words.EN_HELD_OUT_RELATIONS[scene.axis])
            text = template.format(a=_a(nouns[0]), b=_a(nouns[1]))
        case "face":
            face = scene.face or Face("yellow", "happy")
            said = [choose.word(words.EN_MOODS[face.mood])] if face.mood != "happy" or not choose.says(0.3) else []
            said += [choose.word(words.EN_COLOURS[face.colour])] if face.colour != "yellow" or choose.says(0.5) else []
            text = _a(" ".join([*said, choose.word(words.EN_FACE)]))
        case _:
            assert scene.house
            text = _english_house(scene.house, choose)
    if not scene.house:
        text = _backdrop(scene, choose, words.EN_BACKGROUNDS, words.EN_SETTINGS).format(text)
    return choose.template(words.EN_FRAMES, words.EN_HELD_OUT_FRAMES).format(text)


def _chinese_noun(number: str, size: str, colour: str, shape: str, choose: Choices) -> str:
    """Number, adjectives and noun in one of the two usual orders."""
    if size and choose.says(0.5):
        return f"{number}{size}的{colour}{shape}"
    return f"{number}{colour}{'的' if colour and (size or choose.says(0.5)) else ''}{size}{shape}"


def _chinese_house(house: House, choose: Choices) -> str:
    """A house in Chinese."""
    wall = choose.word(words.ZH_COLOURS[house.wall]) if house.wall != "yellow" or not choose.says(0.5) else ""
    text = f"一个{wall}{'的' if wall and choose.says(0.5) else ''}房子"
    if house.roof != "red" or choose.says(0.5):
        text += f",{choose.word(words.ZH_COLOURS[house.roof])}屋顶"
    if house.tree:
        text += choose.word((",有树", "和树"))
    if house.ground != "grass" or choose.says(0.3):
        text += "," + choose.word(words.ZH_GROUNDS[house.ground])
    if house.time != "day" or choose.says(0.2):
        text += "," + choose.word(words.ZH_TIMES[house.time])
    return text


def _chinese(scene: Scene, choose: Choices) -> str:
    """A Chinese caption."""
    sized = _says_size(scene, choose)
    one = "" if choose.says(0.2) else "一个"

    def noun(thing: Thing, number: str) -> str:
        colour = choose.word(words.ZH_COLOURS[thing.colour]) if _says_colour(scene, choose) else ""
        size = choose.word(words.ZH_SIZES[thing.size]) if sized else ""
        return _chinese_noun(number, size, colour, choose.word(words.ZH_SHAPES[thing.shape]), choose)

    match scene.kind:
        case "single":
            text = noun(scene.things[0], one)
            if (place := _place(scene.things[0])) != (0, 0) or choose.says(0.1):
                text = choose.word(words.ZH_AT).format(text, choose.word(words.ZH_PLACES[place]))
        case "count":
            text = noun(scene.things[0], choose.word(words.ZH_NUMBERS[len(scene.things)]) + "个")
        case "three":
            template = choose.template(words.ZH_THREES, words.ZH_HELD_OUT_THREES)
            text = template.format(*(noun(thing, one) for thing in scene.things))
        case "relation":
            a, b = (noun(thing, one) for thing in scene.things)
            template = choose.template(words.ZH_RELATIONS[scene.axis], words.ZH_HELD_OUT_RELATIONS[scene.axis])
            text = template.format(a=a, b=b)
        case "face":
            face = scene.face or Face("yellow", "happy")
            mood = choose.word(words.ZH_MOODS[face.mood]) if face.mood != "happy" or not choose.says(0.3) else ""
            colour = choose.word(words.ZH_COLOURS[face.colour]) if face.colour != "yellow" or choose.says(0.5) else ""
            noun_word = choose.word(words.ZH_HAPPY_FACE if face.mood == "happy" else words.ZH_FACE)
            text = _chinese_noun(one, "", f"{mood}{colour}", noun_word, choose)
        case _:
            assert scene.house
            text = _chinese_house(scene.house, choose)
    if not scene.house:
        text = _backdrop(scene, choose, words.ZH_BACKGROUNDS, words.ZH_SETTINGS).format(text)
    text = choose.template(words.ZH_FRAMES, words.ZH_HELD_OUT_FRAMES).format(text)
    return text.replace(",", "，") if not choose.says(0.3) else text


_BY_LANGUAGE: dict[str, Callable[[Scene, Choices], str]] = {"en": _english, "zh": _chinese}


def caption(scene: Scene, rng: np.random.Generator, language: str = "en", held_out: bool = False) -> str:
    """A random caption of the scene in one of LANGUAGES; `held_out` asks for templates training never sees."""
    return _BY_LANGUAGE[language](scene, Choices(rng, held_out))


def plain_caption(scene: Scene, language: str = "en") -> str:
    """The most usual caption of the scene, naming only what differs from the defaults."""
    return _BY_LANGUAGE[language](scene, Plain())
