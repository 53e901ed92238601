"""Scenes, their pictures, the checker and the captions agree with one another."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pochade.starter.bpe import Tokenizer
from pochade.starter.captions import LANGUAGES, caption, plain_caption
from pochade.starter.checker import check
from pochade.starter.codes import USED, code_vectors, factors, scene_codes
from pochade.starter.data import starter_tokenizer
from pochade.starter.draw import (
    HELD_OUT_PAIRS,
    HELD_OUT_RELATIONS,
    all_pairs,
    backdrop,
    count,
    face,
    house,
    is_held_out,
    random_scene,
    relation,
    single,
    three,
)
from pochade.starter.evaluate import CATEGORIES, Share, cases, checker_shares, judge, share_of
from pochade.starter.scenes import KINDS, MOODS, Scene, Thing, render
from pochade.starter.shapes import BACKGROUNDS, CELL, COLOURS, DECORATIONS, SHAPES, SIDE


def scenes(n: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng, held_out=True) for _ in range(n)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return starter_tokenizer()


def test_true_pictures_pass_and_others_fail() -> None:
    true, wrong = checker_shares(120)
    assert true.right == 120
    assert wrong.right == 0


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
    first, second = ("red", "circle"), ("blue", "star")
    for axis in "xy":
        picture = render(relation(first, second, axis))
        assert check(picture, relation(first, second, axis)).passed
        assert not check(picture, relation(second, first, axis)).passed
        assert not check(picture, relation(first, second, "yx"["xy".index(axis)])).passed


def test_counts_differ() -> None:
    pair = ("green", "heart")
    assert check(render(count(pair, 3)), count(pair, 3)).passed
    assert not check(render(count(pair, 2)), count(pair, 3)).passed


def test_places_differ() -> None:
    here, there = (single(("red", "circle"), "small", place) for place in ((-1, 0), (-1, 1)))
    assert check(render(here), here).passed
    assert not check(render(here), there).passed


def test_faces_have_moods_and_colours() -> None:
    drawn = [face(colour, mood) for colour in COLOURS for mood in MOODS]
    for scene in drawn:
        passed = [other for other in drawn if check(render(scene), other).passed]
        assert passed == [scene]


@pytest.mark.parametrize(
    "change",
    [{"wall": "pink"}, {"roof": "pink"}, {"time": "night"}, {"ground": "snow"}, {"tree": True}],
    ids=lambda change: next(iter(change)),
)
def test_every_part_of_a_house_is_judged(change: dict[str, str]) -> None:
    rng = np.random.default_rng(0)
    usual = {"wall": "yellow", "roof": "red"}
    scene, other = house(rng, **usual), house(rng, **(usual | change))  # type: ignore[arg-type]
    assert check(render(scene), scene).passed
    assert check(render(other), other).passed
    assert not check(render(other), scene).passed


def test_flowers_and_stars_lie_anywhere_but_on_objects() -> None:
    scene = single(("red", "heart"))
    one, two = (backdrop(scene, "meadow", np.random.default_rng(seed)) for seed in (0, 1))
    assert one.decorations
    assert not np.array_equal(render(one), render(two))
    assert check(render(one), two).passed
    heart = (render(scene) != BACKGROUNDS["white"]).any(-1)
    assert np.array_equal(render(one)[heart], render(two)[heart])


def test_a_flower_elsewhere_is_wrong() -> None:
    scene = single(("red", "heart"))
    picture = render(scene)
    flower = backdrop(scene, "meadow", np.random.default_rng(0))
    _, row, column = flower.decorations[0]
    place = (slice(row * CELL, (row + 1) * CELL), slice(column * CELL, (column + 1) * CELL))
    picture[place] = render(flower)[place]
    assert not check(picture, scene).passed


def test_training_never_sees_what_is_held_out() -> None:
    rng = np.random.default_rng(0)
    drawn = [random_scene(rng) for _ in range(2000)]
    assert {scene.kind for scene in drawn} == set(KINDS)
    assert not HELD_OUT_PAIRS & {(t.colour, t.shape) for scene in drawn for t in scene.things}
    relations = {(s.things[0].shape, s.axis, s.things[1].shape) for s in drawn if s.kind == "relation"}
    assert not HELD_OUT_RELATIONS & relations
    assert any(is_held_out(scene) for scene in scenes(200))


def test_every_code_but_the_unused_is_made_of_named_parts() -> None:
    numbers, sizes = factors()
    used = numbers[:USED]
    assert len(np.unique(used, axis=0)) == USED
    assert (numbers < sizes).all()
    assert (numbers[USED:] == np.array(sizes) - 1).all()


def test_codes_are_patch_local_and_repeat() -> None:
    here, there = (scene_codes(single(("red", "heart"), "large", place)) for place in ((-1, 1), (0, 0)))
    assert np.array_equal(np.roll(here, (-2, 2), (0, 1)), there)
    assert here.max() < USED


def test_equal_cells_have_equal_codes_and_decorations_their_own() -> None:
    scene = backdrop(single(("red", "heart")), "night sky", np.random.default_rng(0))
    codes, picture = scene_codes(scene), render(scene)
    by_code: dict[int, bytes] = {}
    for _, row, column in scene.decorations:
        cell = picture[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL].tobytes()
        assert by_code.setdefault(int(codes[row, column]), cell) == cell
    assert len(by_code) == len(DECORATIONS["dark blue"])


def test_code_vectors_are_far_apart() -> None:
    book = code_vectors()[:USED].astype(np.float64)
    squares = (book**2).sum(1)
    distance = squares[:, None] + squares - 2 * book @ book.T + 1e9 * np.eye(USED)
    assert distance.min() > 0.4


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_name_one_scene_only(language: str) -> None:
    rng = np.random.default_rng(0)
    seen: dict[str, Scene] = {}
    for i, scene in enumerate(scenes(4000)):
        text = caption(scene, rng, language, held_out=bool(i % 2))
        assert seen.setdefault(text, scene.undecorated()) == scene.undecorated()


def test_plain_captions() -> None:
    star = single(("orange", "star"))
    assert plain_caption(star) == "an orange star"
    assert plain_caption(star, "zh") == "一个橙色星星"
    corner = single(("red", "ring"), "small", (1, -1))
    assert plain_caption(corner) == "a small red ring at the top right"
    pairs = (("red", "star"), ("blue", "circle"), ("green", "heart"))
    assert plain_caption(three(pairs)) == "a red star, a blue circle and a green heart"
    assert plain_caption(face("yellow", "sad")) == "a sad face"
    winter = house(np.random.default_rng(0), "red", "blue", "night", "snow", tree=True)
    assert plain_caption(winter) == "a red house with a blue roof and a tree in the snow at night"


def test_held_out_templates_are_new() -> None:
    rng = np.random.default_rng(0)
    scene = single(("orange", "star"))
    trained = {caption(scene, rng) for _ in range(500)}
    new = {caption(scene, rng, held_out=True) for _ in range(500)}
    assert not trained & new


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
    from pochade.starter.bpe import byte_characters

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


class PerfectPainter:
    """Paints the scene that belongs to a prompt."""

    def __init__(self, chosen: list[tuple[Scene, str]]) -> None:
        self.scenes = {prompt: scene for scene, prompt in chosen}

    def __call__(self, prompts: list[str], seed: int) -> SimpleNamespace:
        return SimpleNamespace(images=[Image.fromarray(render(self.scenes[prompt])) for prompt in prompts])


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_perfect_painter_scores_all(category: str) -> None:
    chosen = cases(category, 12, 3)
    share = share_of(judge(PerfectPainter(chosen), chosen))  # type: ignore[arg-type]
    assert (share.right, share.n) == (12, 12)
    assert cases(category, 5, 3) == chosen[:5]


def test_both_languages_are_asked_for_the_same_scenes() -> None:
    english, chinese = (cases(language, 20) for language in ("english", "chinese"))
    assert [scene for scene, _ in english] == [scene for scene, _ in chinese]


def test_held_out_categories_hold_what_training_never_sees() -> None:
    for category in ("held-out pair", "held-out relation"):
        assert all(is_held_out(scene) for scene, _ in cases(category, 16))
    for category in ("single", "binding", "relation", "count", "three", "house", "english"):
        assert not any(is_held_out(scene) for scene, _ in cases(category, 40))


def test_pictures_have_the_stated_size() -> None:
    picture = render(backdrop(single(("blue", "ring")), "beige", np.random.default_rng(0)))
    assert picture.shape == (SIDE, SIDE, 3)
    assert tuple(picture[0, 0]) == BACKGROUNDS["beige"]
    assert len(all_pairs()) == len(COLOURS) * len(SHAPES)
