"""The search for bits: choices on paper, and whole bundles of a size or a fidelity."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pochade.bundle import Bundle
from pochade.cli import main
from pochade.errors import InputRefusedError, UsageError
from pochade.quant import bundle as quant_bundle
from pochade.quant import search
from pochade.quant.allocate import hull, within_bytes, within_noise
from pochade.quant.bundle import quantize_bundle
from pochade.quant.scheme import CHANNELS, FLOAT, HALF, SCHEMES, Keep, Storage, blocks
from pochade.quant.search import RECIPE, Goal, Search, read_recipe
from pochade.quant.sensitivity import Journal, Option, layers_noise
from pochade.quant.trial import record_calibration
from pochade.runtime.locate import BUILT_IN

FOUR, EIGHT = blocks(4), blocks(8)

INT4 = SCHEMES["int4"]

SHORT: dict[str, Any] = {"prompts": ["a cat", "a house by a lake", "two dogs", "red"]}
"""A few small pictures to calibrate with."""


def weight(*points: tuple[int, float]) -> tuple[Option, ...]:
    return tuple(Option(storage, *point) for storage, point in zip((FOUR, EIGHT, HALF), points, strict=False))


OPTIONS = {
    "a": weight((10, 8.0), (20, 1.0), (40, 0.0)),
    "b": weight((10, 2.0), (20, 1.5), (40, 0.0)),
    "c": weight((4, 0.5), (8, 0.25), (16, 0.0)),
}


def test_bytes_buy_the_least_noise() -> None:
    for budget in range(24, 100, 4):
        choice = within_bytes(OPTIONS, budget)
        assert choice is not None
        assert sum(option.bytes for option in choice.values()) <= budget
        combinations = itertools.product(*OPTIONS.values())
        best = min(sum(o.noise for o in c) for c in combinations if sum(o.bytes for o in c) <= budget)
        # Greedy along convex hulls misses at most the last step.
        assert sum(option.noise for option in choice.values()) <= best + 0.5
    assert within_bytes(OPTIONS, 23) is None


def test_a_budget_may_begin_with_a_choice() -> None:
    start = within_noise({"b": OPTIONS["b"]}, 1.5)
    assert start is not None
    begun = {"a": OPTIONS["a"][0], "c": OPTIONS["c"][0]} | start
    # 1.5 is reached by the largest form alone: the middle one is no bargain.
    assert start["b"].bytes == 40
    choice = within_bytes(OPTIONS, 66, begun)
    assert choice is not None
    assert [choice[name].bytes for name in "abc"] == [20, 40, 4]
    assert within_bytes(OPTIONS, 53, begun) is None


def test_noise_is_kept_for_the_fewest_bytes() -> None:
    choice = within_noise(OPTIONS, 4.0)
    assert choice is not None
    assert [choice[name].bytes for name in "abc"] == [20, 10, 4]
    everything = within_noise(OPTIONS, 0.0)
    assert everything is not None
    assert {option.noise for option in everything.values()} == {0.0}
    assert within_noise({"a": weight((1, 1.0), (2, 0.5))}, 0.1) is None


def test_options_that_are_no_bargain_are_passed_over() -> None:
    # The middle one costs more per noise than both steps at once.
    assert [o.bytes for o in hull(weight((10, 4.0), (20, 3.9), (30, 0.0)))] == [10, 30]
    # A larger form that is no better is none.
    assert [o.bytes for o in hull(weight((10, 4.0), (20, 4.0)))] == [10]
    assert [o.bytes for o in hull(weight((10, 4.0), (20, 1.0), (30, 0.5)))] == [10, 20, 30]


def test_what_costs_no_byte_is_taken() -> None:
    padded = {"a": weight((10, 4.0), (10, 1.0), (20, 0.5)), "b": weight((10, 9.0), (20, 1.0))}
    for budget, bytes_of_a, bytes_of_b in ((20, 10, 10), (30, 10, 20), (40, 20, 20)):
        choice = within_bytes(padded, budget)
        assert choice is not None
        assert (choice["a"].bytes, choice["b"].bytes) == (bytes_of_a, bytes_of_b)
        assert choice["a"].noise <= 1.0
    assert within_noise({"a": padded["a"][:2]}, 1.0) == {"a": padded["a"][1]}


@pytest.mark.parametrize("storage", [FLOAT, HALF, CHANNELS, FOUR, EIGHT, blocks(4, 32)])
def test_storages_survive_a_recipe(storage: Storage) -> None:
    assert Storage.from_manifest(storage.to_manifest()) == storage


def test_journals_go_on_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    first = Journal(path, {"bundle": "x"})
    first.put("a", {"blocks int4/128": 0.5})
    first.put("b", {"blocks int4/128": 0.25})
    path.write_text(path.read_text("utf-8") + '{"weight": "c", "noi', "utf-8")
    again = Journal(path, {"bundle": "x"})
    assert again.get("b") == {"blocks int4/128": 0.25}
    assert again.get("c") is None
    assert Journal(path, {"bundle": "y"}).get("a") is None
    again.remove()
    assert not path.exists()


@pytest.mark.parametrize(
    "arguments",
    [{}, {"target_size": 1, "min_snr": 20.0}, {"target_size": 0}, {"min_snr": 0.0}, {"min_snr": float("nan")}],
)
def test_goals_that_cannot_be_meant(arguments: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Goal(**arguments)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def uniform(small_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """int4 by the fixed rule."""
    return quantize_bundle(small_bundles["meissonic-tiny"], tmp_path_factory.mktemp("uniform") / "int4", INT4, **SHORT)


def test_a_size_is_kept_and_the_recipe_repeats_it(
    small_bundles: dict[str, Path], uniform: Bundle, tmp_path: Path
) -> None:
    source, size = small_bundles["meissonic-tiny"], uniform.size + 150_000
    found = quantize_bundle(source, tmp_path / "found", INT4, **SHORT, goal=Goal(target_size=size))
    assert found.size <= size
    assert not list(tmp_path.glob("*.jsonl"))
    assert {c.precision for c in found.manifest.components.values()} <= {"mixed", "fp32"}
    found.verify()
    recipe = json.loads((found.path / RECIPE).read_text("utf-8"))
    assert recipe["goal"] == {"target_size": size}
    bits = {row["bits"] for row in recipe["weights"].values()}
    assert {4, 8} <= bits
    again = quantize_bundle(source, tmp_path / "again", INT4, **SHORT, recipe=found.path)
    for name in found.manifest.components:
        data = f"{name}.onnx.data"
        assert (found.path / data).read_bytes() == (again.path / data).read_bytes()
    assert read_recipe(found.path / RECIPE, INT4)[1] == recipe


def test_a_fidelity_is_kept_by_every_component(small_bundles: dict[str, Path], tmp_path: Path) -> None:
    source = small_bundles["meissonic-tiny"]
    sizes = []
    for snr in (20.0, 36.0):
        found = quantize_bundle(source, tmp_path / f"{snr}", INT4, **SHORT, goal=Goal(min_snr=snr))
        assert found.manifest.scorecard is not None
        measured = [row["snr_db"] for row in found.manifest.scorecard["components"].values() if "snr_db" in row]
        assert min(measured) >= snr
        sizes.append(found.size)
    assert sizes[0] < sizes[1]


def test_the_users_rules_come_first(small_bundles: dict[str, Path], tmp_path: Path) -> None:
    scheme = INT4.keeping([Keep("^condition/", 32)])
    found = quantize_bundle(small_bundles["monetico-tiny"], tmp_path / "kept", scheme, **SHORT, goal=Goal(min_snr=20.0))
    assert found.manifest.components["condition"].precision == "fp32"


def test_an_interrupted_search_goes_on(
    small_bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pochade.quant import sensitivity

    original, tried = sensitivity._noise, list[Any]()

    def failing(*arguments: object) -> dict[str, float]:
        if len(tried) == 5:
            raise KeyboardInterrupt
        tried.append(arguments[1])
        return original(*arguments)  # type: ignore[arg-type]

    def build() -> Bundle:
        return quantize_bundle(small_bundles["monetico-tiny"], tmp_path / "b", INT4, **SHORT, goal=Goal(min_snr=20.0))

    monkeypatch.setattr(sensitivity, "_noise", failing)
    with pytest.raises(KeyboardInterrupt):
        build()
    assert [path.name for path in tmp_path.iterdir()] == ["b.search.jsonl"]
    names = {weight.name for weight in tried}

    def counting(*arguments: object) -> dict[str, float]:
        assert arguments[1].name not in names  # type: ignore[attr-defined]
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(sensitivity, "_noise", counting)
    build()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize(
    ("goal", "reason"),
    [
        (Goal(target_size=10_000), "cannot be as small as 10000 bytes"),
        (Goal(min_snr=99.0), "cannot keep 99 dB"),
    ],
)
def test_goals_out_of_reach(goal: Goal, reason: str, small_bundles: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=reason):
        quantize_bundle(small_bundles["monetico-tiny"], tmp_path / "b", INT4, **SHORT, goal=goal)
    assert not (tmp_path / "b").exists()


def test_layers_in_float16_are_named_where_they_are_the_reason(
    small_bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Bundle.open(small_bundles["monetico-tiny"])
    calls = record_calibration(source, ["a cat"], lambda *_: None)
    noise = {name: layers_noise(source.component_path(name), calls[name]) for name in ("vq_decoder", "transformer")}
    assert 0 < noise["vq_decoder"] < 1e-4
    assert noise["transformer"] == 0
    alone = -10 * math.log10(noise["vq_decoder"])

    def refusal(min_snr: float, half: bool) -> str:
        # One small weight has a choice.
        scheme = replace(
            INT4, half_layers=half, min_elements=1000, keep=(Keep(r"^(?!vq_decoder/decoder\.conv_in\b)", 32),)
        )
        journal = Journal(tmp_path / f"{min_snr} {half}.jsonl", {})
        with pytest.raises(UsageError) as caught:
            Search(source, scheme, Goal(min_snr=min_snr), calls, journal, lambda *_: None).choose()
        return str(caught.value)

    # More than the layers leave; more than they and 16-bit weights leave together; more than the weights leave.
    assert "--codec-layers 32" in refusal(alone + 1, True)
    assert f"{alone:.1f} dB" in refusal(alone - 1e-6, True)
    assert "--keep '^vq_decoder/=32'" in refusal(99.0, False)
    monkeypatch.setattr(search, "layers_noise", lambda *_: 1e-12)
    assert "--codec-layers" not in refusal(99.0, True)


def test_a_goal_that_measuring_never_meets_ends(
    small_bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quant_bundle, "folder_size", lambda _: 10**9)
    with pytest.raises(UsageError):
        quantize_bundle(small_bundles["monetico-tiny"], tmp_path / "b", INT4, **SHORT, goal=Goal(target_size=2_000_000))


@pytest.mark.parametrize("text", ["", "[]", '{"weights": 3}', '{"rounding": "x", "weights": {"a": {"kind": "odd"}}}'])
def test_files_that_are_no_recipe(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(text, "utf-8")
    with pytest.raises(InputRefusedError, match="it is no recipe"):
        read_recipe(path, INT4)


def test_the_verb_searches(small_bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\na cat\n\n", "utf-8")
    source, target = str(small_bundles["monetico-tiny"]), tmp_path / "out"
    assert main(["quantize", source, "-o", str(target), "--min-snr", "20", "--calibration", str(prompts)]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    again = tmp_path / "again"
    assert main(["quantize", source, "-o", str(again), "--bits", str(target / RECIPE), "--rounding", "rtn"]) == 0
    assert (again / RECIPE).read_bytes() == (target / RECIPE).read_bytes()


def test_nothing_is_quantized_without_saying_how(
    small_bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(small_bundles["monetico-tiny"]), "-o", "x"]) == 2
    assert "--target-size SIZE, --min-snr DB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "holds no prompt"), (b"\xff\xfe\x00", "cannot be read as UTF-8")]
)
def test_prompt_files_that_are_none(
    content: bytes, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    assert main(["quantize", "starter", "-o", "x", "--scheme", "int4", "--calibration", str(path)]) == 6
    assert reason in capsys.readouterr().err


def test_the_starter_says_what_it_is_asked_for() -> None:
    prompts = Bundle.open(BUILT_IN / "starter").manifest.source["prompts"]
    assert len(prompts) > 8
    assert np.all([isinstance(prompt, str) for prompt in prompts])
