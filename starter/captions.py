"""Captions of scenes in English and Chinese, and the words they are made of.

Every caption names its scene without ambiguity, given the defaults: a background that is not
named is white, a single object whose size is not named is large, and two objects joined by
"and" (or 和) stand left to right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from starter.scenes import Scene, Thing

LANGUAGES = ("en", "zh")

Words = dict[str, tuple[str, ...]]
"""A name used in scenes and the words for it, the usual one first."""

EN_COLOURS: Words = {
    "red": ("red",),
    "green": ("green",),
    "blue": ("blue",),
    "yellow": ("yellow",),
    "orange": ("orange",),
    "purple": ("purple", "violet"),
    "black": ("black",),
    "pink": ("pink",),
}
EN_SHAPES: Words = {
    "circle": ("circle", "disc"),
    "square": ("square",),
    "triangle": ("triangle",),
    "star": ("star",),
    "heart": ("heart",),
    "moon": ("moon", "crescent"),
    "ring": ("ring",),
    "cross": ("cross",),
}
EN_SIZES: Words = {"large": ("large", "big"), "small": ("small", "little", "tiny")}
EN_BACKGROUNDS: Words = {
    "white": ("white",),
    "gray": ("gray", "grey"),
    "light blue": ("light blue", "sky blue"),
    "light green": ("light green", "mint green"),
    "beige": ("beige", "cream"),
    "brown": ("brown",),
}
EN_NUMBERS = {2: ("two", "2", "a pair of"), 3: ("three", "3")}
EN_FRAMES = ("{}", "a picture of {}", "an image of {}", "a drawing of {}", "a photo of {}", "draw {}", "there is {}")
EN_ON = ("{} on a {} background", "{} against a {} background", "{}, {} background", "{} on {}")
EN_RELATIONS = {
    "x": (
        "{a} to the left of {b}",
        "{a} left of {b}",
        "{b} to the right of {a}",
        "{b} right of {a}",
        "{a} on the left and {b} on the right",
        "{a} and {b}",
        "{a} next to {b}",
    ),
    "y": (
        "{a} above {b}",
        "{a} over {b}",
        "{b} below {a}",
        "{b} under {a}",
        "{a} at the top and {b} at the bottom",
    ),
}

ZH_COLOURS: Words = {
    "red": ("红色",),
    "green": ("绿色",),
    "blue": ("蓝色",),
    "yellow": ("黄色",),
    "orange": ("橙色", "橘色"),
    "purple": ("紫色",),
    "black": ("黑色",),
    "pink": ("粉色", "粉红色"),
}
ZH_SHAPES: Words = {
    "circle": ("圆形", "圆"),
    "square": ("正方形", "方块"),
    "triangle": ("三角形",),
    "star": ("星星", "五角星"),
    "heart": ("爱心", "心形"),
    "moon": ("月亮", "月牙"),
    "ring": ("圆环", "环形"),
    "cross": ("十字", "十字形"),
}
ZH_SIZES: Words = {"large": ("大",), "small": ("小",)}
ZH_BACKGROUNDS: Words = {
    "white": ("白色",),
    "gray": ("灰色",),
    "light blue": ("浅蓝色", "天蓝色"),
    "light green": ("浅绿色",),
    "beige": ("米色",),
    "brown": ("棕色", "褐色"),
}
ZH_NUMBERS = {2: ("两", "2"), 3: ("三", "3")}
ZH_FRAMES = ("{}", "画{}", "画面中有{}", "一幅画,{}")
ZH_ON = ("{}在{}背景上", "{},{}背景", "{},背景是{}")
ZH_RELATIONS = {
    "x": ("{a}在{b}的左边", "{a}在{b}左边", "{b}在{a}的右边", "{b}在{a}右边", "左边是{a},右边是{b}", "{a}和{b}"),
    "y": ("{a}在{b}的上面", "{a}在{b}上方", "{b}在{a}的下面", "{b}在{a}下方", "上面是{a},下面是{b}"),
}
ZH_PARTICLES = ("一", "个", "的", "在", "和", "是", "有", "画", "画面", "中", "一幅", "背景", "上", "，", "。", "一个")
ZH_PLACES = ("左边", "右边", "上面", "下面", "上方", "下方")


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    """The first option half of the time, otherwise any: common wordings are learned first."""
    return options[0] if rng.random() < 0.5 else options[int(rng.integers(len(options)))]


def _a(phrase: str) -> str:
    """The phrase with its indefinite article."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _plural(noun: str) -> str:
    """The regular plural of one of the shape nouns."""
    return noun + ("es" if noun.endswith("s") else "s")


def _says_size(scene: Scene, rng: np.random.Generator) -> bool:
    """Whether the caption names the size: only singles vary in size, and large is the default."""
    if scene.kind != "single":
        return False
    return scene.things[0].size == "small" or rng.random() < 0.3


def _says_background(scene: Scene, rng: np.random.Generator) -> bool:
    """Whether the caption names the background: white is the default."""
    return scene.background != "white" or rng.random() < 0.3


def _english(scene: Scene, rng: np.random.Generator) -> str:
    """An English caption."""
    sized = _says_size(scene, rng)

    def noun(thing: Thing) -> str:
        words = [_pick(EN_SIZES[thing.size], rng)] if sized else []
        return " ".join([*words, _pick(EN_COLOURS[thing.colour], rng), _pick(EN_SHAPES[thing.shape], rng)])

    nouns = [noun(thing) for thing in scene.things]
    match scene.kind:
        case "single":
            text = _a(nouns[0])
        case "count":
            text = f"{_pick(EN_NUMBERS[len(nouns)], rng)} {_plural(nouns[0])}"
        case _:
            a, b = map(_a, nouns)
            text = _pick(EN_RELATIONS[scene.axis], rng).format(a=a, b=b)
    if _says_background(scene, rng):
        text = _pick(EN_ON, rng).format(text, _pick(EN_BACKGROUNDS[scene.background], rng))
    return _pick(EN_FRAMES, rng).format(text)


def _chinese(scene: Scene, rng: np.random.Generator) -> str:
    """A Chinese caption."""
    sized = _says_size(scene, rng)
    one = "一个" if rng.random() < 0.8 else ""

    def noun(thing: Thing, number: str) -> str:
        colour, shape = _pick(ZH_COLOURS[thing.colour], rng), _pick(ZH_SHAPES[thing.shape], rng)
        size = _pick(ZH_SIZES[thing.size], rng) if sized else ""
        if size and rng.random() < 0.5:
            return f"{number}{size}的{colour}{shape}"
        return f"{number}{colour}{'的' if size or rng.random() < 0.5 else ''}{size}{shape}"

    match scene.kind:
        case "single":
            text = noun(scene.things[0], one)
        case "count":
            text = noun(scene.things[0], _pick(ZH_NUMBERS[len(scene.things)], rng) + "个")
        case _:
            a, b = (noun(thing, one) for thing in scene.things)
            text = _pick(ZH_RELATIONS[scene.axis], rng).format(a=a, b=b)
    if _says_background(scene, rng):
        text = _pick(ZH_ON, rng).format(text, _pick(ZH_BACKGROUNDS[scene.background], rng))
    text = _pick(ZH_FRAMES, rng).format(text)
    return text.replace(",", "，") if rng.random() < 0.7 else text


def caption(scene: Scene, rng: np.random.Generator, language: str = "en") -> str:
    """A random caption of the scene in one of LANGUAGES."""
    return _english(scene, rng) if language == "en" else _chinese(scene, rng)


def plain_caption(scene: Scene, language: str = "en") -> str:
    """The most usual caption of the scene, naming only what differs from the defaults."""

    class Usual(np.random.Generator):
        """Takes the first option everywhere and says nothing that may be left out."""

        def random(self, *_: object, **__: object) -> float:  # type: ignore[override]
            return 0.4

    return caption(scene, Usual(np.random.PCG64(0)), language)


def english_words() -> list[str]:
    """Every English word (and number, and comma) that a caption can hold, without duplicates."""
    texts = [w for table in (EN_COLOURS, EN_SIZES, EN_BACKGROUNDS) for words in table.values() for w in words]
    shapes = [w for words in EN_SHAPES.values() for w in words]
    texts += shapes + [_plural(w) for w in shapes] + [w for words in EN_NUMBERS.values() for w in words]
    texts += [*EN_FRAMES, *EN_ON, *EN_RELATIONS["x"], *EN_RELATIONS["y"], "a an , ."]
    for mark in ("{}", "{a}", "{b}", ","):
        texts = [text.replace(mark, f" {mark[0]} " if mark == "," else " ") for text in texts]
    return sorted({word for text in texts for word in text.split()})


def chinese_words() -> list[str]:
    """Every Chinese word that a caption can hold, without duplicates."""
    tables = (ZH_COLOURS, ZH_SHAPES, ZH_SIZES, ZH_BACKGROUNDS)
    words = [w for table in tables for options in table.values() for w in options]
    words += [w for options in ZH_NUMBERS.values() for w in options]
    return sorted({*words, *ZH_PARTICLES, *ZH_PLACES} - {"2", "3"})
