"""The words and templates of captions, English and Chinese, the usual one first."""

from __future__ import annotations

import re
from collections.abc import Iterator

Words = dict[str, tuple[str, ...]]
"""A name used in scenes and the words for it."""

Templates = tuple[str, ...]

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
    "dark blue": ("dark blue", "navy blue", "navy"),
}
EN_NUMBERS = {2: ("two", "2", "a pair of"), 3: ("three", "3")}
EN_PLACES = {
    (-1, -1): ("at the top left", "in the top left corner"),
    (0, -1): ("at the top",),
    (1, -1): ("at the top right", "in the top right corner"),
    (-1, 0): ("on the left", "on the left side"),
    (0, 0): ("in the middle", "in the center"),
    (1, 0): ("on the right", "on the right side"),
    (-1, 1): ("at the bottom left", "in the bottom left corner"),
    (0, 1): ("at the bottom",),
    (1, 1): ("at the bottom right", "in the bottom right corner"),
}
EN_FACE = ("face", "smiley")
EN_MOODS: Words = {
    "happy": ("happy", "smiling", "laughing"),
    "sad": ("sad", "unhappy"),
    "surprised": ("surprised", "amazed"),
    "winking": ("winking",),
}
EN_GROUNDS: Words = {
    "grass": ("on the grass", "on a meadow"),
    "snow": ("in the snow", "in winter"),
    "sand": ("on the sand", "on the beach"),
}
EN_TIMES: Words = {"day": ("by day", "in the sun"), "night": ("at night", "in the moonlight")}

EN_FRAMES = ("{}", "a picture of {}", "an image of {}", "a drawing of {}", "a photo of {}", "draw {}", "there is {}")
EN_HELD_OUT_FRAMES = ("there is a drawing of {}", "draw an image of {}")
EN_ON = ("{} on a {} background", "{} against a {} background", "{}, {} background", "{} on {}")
EN_SETTINGS: dict[str, Templates] = {
    "night sky": ("{} in the night sky", "{} among the stars", "{} at night"),
    "meadow": ("{} on a meadow", "{} among flowers", "{} in a garden"),
}
EN_RELATIONS: dict[str, Templates] = {
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
EN_HELD_OUT_RELATIONS: dict[str, Templates] = {
    "x": ("{b} on the right and {a} on the left",),
    "y": ("{b} at the bottom and {a} at the top",),
}
EN_THREES = ("{}, {} and {}", "{}, {}, {}", "{} above {} and {}")
EN_HELD_OUT_THREES = ("{} and {} and {}",)

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
    "dark blue": ("深蓝色",),
}
ZH_NUMBERS = {2: ("两", "2"), 3: ("三", "3")}
ZH_PLACES = {
    (-1, -1): ("左上角",),
    (0, -1): ("上面", "上方"),
    (1, -1): ("右上角",),
    (-1, 0): ("左边",),
    (0, 0): ("中间",),
    (1, 0): ("右边",),
    (-1, 1): ("左下角",),
    (0, 1): ("下面", "下方"),
    (1, 1): ("右下角",),
}
ZH_AT = ("{0}在{1}", "{1}有{0}")
ZH_FACE = ("脸",)
ZH_HAPPY_FACE = ("笑脸", "脸")
ZH_MOODS: Words = {
    "happy": ("开心的", "高兴的"),
    "sad": ("伤心的", "难过的"),
    "surprised": ("惊讶的",),
    "winking": ("眨眼的",),
}
ZH_GROUNDS: Words = {"grass": ("草地上",), "snow": ("雪地上", "冬天"), "sand": ("沙滩上",)}
ZH_TIMES: Words = {"day": ("白天",), "night": ("晚上", "夜里")}

ZH_FRAMES = ("{}", "画{}", "画面中有{}", "一幅画,{}")
ZH_HELD_OUT_FRAMES = ("画一幅画,{}", "画面中,{}")
ZH_ON = ("{}在{}背景上", "{},{}背景", "{},背景是{}")
ZH_SETTINGS: dict[str, Templates] = {
    "night sky": ("{}在夜空中", "夜空中有{}"),
    "meadow": ("{}在草地上", "花园里有{}"),
}
ZH_RELATIONS: dict[str, Templates] = {
    "x": ("{a}在{b}的左边", "{a}在{b}左边", "{b}在{a}的右边", "{b}在{a}右边", "左边是{a},右边是{b}", "{a}和{b}"),
    "y": ("{a}在{b}的上面", "{a}在{b}上方", "{b}在{a}的下面", "{b}在{a}下方", "上面是{a},下面是{b}"),
}
ZH_HELD_OUT_RELATIONS: dict[str, Templates] = {"x": ("右边是{b},左边是{a}",), "y": ("下面是{b},上面是{a}",)}
ZH_THREES = ("{}、{}和{}", "{},{}和{}", "{}、{}、{}")
ZH_HELD_OUT_THREES = ("{}和{}和{}",)
ZH_PARTICLES = ("一", "个", "一个", "的", "在", "和", "是", "有", "画", "画面", "中", "一幅", "背景", "上", "里")
ZH_MORE = ("夜空", "草地", "花园", "房子", "屋顶", "树", "，", "。", "、")


def _strings(value: object) -> Iterator[str]:
    """Every string in nested tables."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, tuple):
        for inner in value:
            yield from _strings(inner)


def english_words() -> list[str]:
    """Every English word (and number, and comma) that a caption can hold, without duplicates."""
    shapes = list(_strings(EN_SHAPES))
    texts = [text for name, table in globals().items() if name.startswith("EN_") for text in _strings(table)]
    texts += [word + ("es" if word.endswith("s") else "s") for word in shapes]
    texts.append("a an , . house roof tree with and")
    return sorted({word for text in texts for word in re.sub(r"{\w*}", " ", text).replace(",", " , ").split()})


def chinese_words() -> list[str]:
    """Every Chinese word that a caption can hold, without duplicates."""
    tables = (ZH_COLOURS, ZH_SHAPES, ZH_SIZES, ZH_BACKGROUNDS, ZH_PLACES, ZH_HAPPY_FACE, ZH_TIMES)
    found = {word for table in tables for word in _strings(table)}
    found |= {word for word in _strings(ZH_NUMBERS) if not word.isdigit()}
    # Adjectives and places come apart before their particle.
    found |= {word[:-1] for table in (ZH_MOODS, ZH_GROUNDS) for word in _strings(table)} | {"冬天"}
    return sorted({*found, *ZH_PARTICLES, *ZH_MORE} - {"冬"})
