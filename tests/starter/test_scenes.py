"""Scenes, their pictures, the checker and the captions agree with one another."""

from __future__ import annotations

import numpy as np
import pytest

from starter.bpe import Tokenizer
from starter.captions import LANGUAGES, caption, plain_caption
from starter.checker import check
from starter.codes import USED, code_vectors, mosaic, scene_codes
from starter.data import starter_tokenizer
from starter.evaluate import CATEGORIES, Share, adherence, cases
from starter.scenes import (
    BACKGROUNDS,
    SHAPES,
    SIDE,
    Scene,
    Thing,
    all_pairs,
    count,
    random_scene,
    relation,
    render,
    single,
)


def scenes(n: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng) for _ in range(n)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return starter_tokenizer()


def test_true_pictures_pass_and_others_fail() -> None:
    drawn = scenes(60)
    pictures = [render(scene) for scene in drawn]
    assert [check(p, s).reasons for p, s in zip(pictures, drawn, strict=True)] == [()] * 60
    wrong = [check(p, s).passed for p, s in zip(pictures, drawn[1:] + drawn[:1], strict=True)]
    assert not any(wrong)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_told_from_every_other(shape: str) -> None:
    picture = render(Scene("single", (Thing("red", shape, "large", 64, 64),)))
    passed = [s for s in SHAPES if check(picture, Scene("single", (Thing("red", s, "large", 64, 64),))).passed]
    assert passed == [shape]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda p: p[:10, :10].fill(0), "objects, not 1"),
        (lambda p: p[40:46, 40:46].fill(255), "stray pixels"),
        (lambda p: p[20:64].fill(255), "no large red circle"),
        (lambda p: np.copyto(p, 255 - p), "background"),
    ],
)
def test_a_spoilt_picture_fails_with_its_reason(spoil, reason: str) -> None:  # type: ignore[no-untyped-def]
    scene = Scene("single", (Thing("red", "circle", "large", 64, 64),))
    picture = render(scene)
    spoil(picture)
    assert reason in "; ".join(check(picture, scene).reasons)
    assert not check(picture, scene).passed


def test_relations_have_a_direction() -> None:
    rng = np.random.default_rng(0)
    first, second = ("red", "circle"), ("blue", "star")
    for axis in "xy":
        picture = render(relation(first, second, axis, rng))
        assert check(picture, relation(first, second, axis, rng)).passed
        assert not check(picture, relation(second, first, axis, rng)).passed
        assert not check(picture, relation(first, second, "yx"["xy".index(axis)], rng)).passed


def test_counts_differ() -> None:
    pair = ("green", "heart")
    assert check(render(count(pair, 3)), count(pair, 3)).passed
    assert not check(render(count(pair, 2)), count(pair, 3)).passed


def test_held_out_pairs_never_appear() -> None:
    held_out = set(all_pairs()[::3])
    rng = np.random.default_rng(0)
    drawn = [random_scene(rng, held_out=held_out) for _ in range(200)]
    assert not held_out & {(t.colour, t.shape) for scene in drawn for t in scene.things}


def test_codes_are_patch_local_and_repeat() -> None:
    rng = np.random.default_rng(0)
    scene = single(("red", "heart"), rng)
    thing = scene.things[0]
    moved = Scene("single", (Thing(thing.colour, thing.shape, thing.size, 64, 64),))
    here, there = scene_codes(scene), scene_codes(moved)
    shift = ((64 - thing.y) // 8, (64 - thing.x) // 8)
    assert np.array_equal(np.roll(here, shift, (0, 1)), there)
    assert here.max() < USED


def test_codes_hold_enough_of_the_picture() -> None:
    assert all(check(mosaic(scene_codes(scene)), scene).passed for scene in scenes(40, seed=1))


def test_code_vectors_are_far_apart() -> None:
    book = code_vectors()[:USED].astype(np.float64)
    squares = (book**2).sum(1)
    distance = squares[:, None] + squares - 2 * book @ book.T + 1e9 * np.eye(USED)
    assert distance.min() > 0.2


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_name_one_scene_only(language: str) -> None:
    rng = np.random.default_rng(0)
    seen: dict[str, tuple[object, ...]] = {}
    for scene in scenes(3000):
        what = (scene.kind, scene.background, scene.axis, *((t.colour, t.shape, t.size) for t in scene.things))
        assert seen.setdefault(caption(scene, rng, language), what) == what


def test_plain_captions() -> None:
    thing = Thing("orange", "star", "large", 64, 64)
    assert plain_caption(Scene("single", (thing,))) == "an orange star"
    assert plain_caption(Scene("single", (thing,)), "zh") == "一个橙色的星星"


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_caption_word_is_one_token(tokenizer: Tokenizer, language: str) -> None:
    rng = np.random.default_rng(0)
    names = {i: name for name, i in tokenizer.ids.items()}
    byte_of = {name: b for b, name in enumerate(_byte_names())}
    for scene in scenes(300):
        text = caption(scene, rng, language)
        ids = tokenizer.pieces(text)
        assert len(ids) <= tokenizer.length - 2
        if language == "en":
            assert len(ids) == len(text.replace(",", " ,").split())
        joined = "".join(names[i].replace("</w>", " ") for i in ids)
        back = b"".join(b" " if c == " " else bytes([byte_of[c]]) for c in joined).decode("utf-8")
        assert back.replace(" ", "") == text.replace(" ", "")


def _byte_names() -> list[str]:
    from starter.bpe import byte_characters

    return byte_characters()


def test_the_tokenizer_agrees_with_the_usual_library(tokenizer: Tokenizer) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.BPE(
        dict(tokenizer.ids.items()), tokenizer.merges, end_of_word_suffix="</w>", fuse_unk=False
    )
    other = tokenizers.Tokenizer(model)
    other.normalizer = tokenizers.normalizers.Sequence(
        [
            tokenizers.normalizers.NFC(),
            tokenizers.normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            tokenizers.normalizers.Lowercase(),
        ]
    )
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    other.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="removed", invert=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    rng = np.random.default_rng(0)
    texts = [caption(scene, rng, LANGUAGES[i % 2]) for i, scene in enumerate(scenes(200))]
    texts += ["Two  CATS, 19 dogs; it's_fine", "café naïve 雪山 and 城堡", "一个 red 圆形。"]
    for text in texts:
        assert tokenizer.pieces(text) == other.encode(text).ids


def test_wilson_interval() -> None:
    low, high = Share(8, 10).interval()
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_perfect_painter_scores_all(category: str) -> None:
    chosen = cases(category, 12, np.random.default_rng(3))
    by_prompt = {prompt: render(scene) for scene, prompt in chosen}
    share, reasons = adherence(lambda prompts, _: [by_prompt[p] for p in prompts], category, 12, seed=3)
    assert (share.right, reasons) == (12, {})


def test_pictures_have_the_stated_size() -> None:
    picture = render(single(("blue", "ring"), np.random.default_rng(0), background="brown"))
    assert picture.shape == (SIDE, SIDE, 3)
    assert tuple(picture[0, 0]) == BACKGROUNDS["brown"]
