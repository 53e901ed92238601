"""Comparing bundles: a bundle against itself, against a quantized one, and against one that is no relative."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pochade.benchmarks.quality import PairedShares, compare, ssim
from pochade.bundle import Bundle
from pochade.cli import main
from pochade.quant.bundle import quantize_bundle
from pochade.quant.fidelity import CEILING_DB, Difference, Recorder, digest, open_pipeline, record, replay
from pochade.quant.scheme import SCHEMES
from pochade.runtime.locate import BUILT_IN

STARTER = BUILT_IN / "starter"


@pytest.fixture(scope="module")
def pair(small_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A float bundle and its int4 form."""
    small = tmp_path_factory.mktemp("quality") / "int4"
    quantize_bundle(small_bundles["monetico-tiny"], small, SCHEMES["int4"])
    return small_bundles["monetico-tiny"], small


def test_a_bundle_equals_itself(small_bundles: dict[str, Path]) -> None:
    bundle = Bundle.open(small_bundles["monetico-tiny"])
    (quality,) = compare(bundle, [bundle], pictures=2, steps=3, progress=lambda *_: None).bundles
    assert {d.snr_db for d in quality.components.values() if d.signal} == {CEILING_DB}
    assert quality.forced.agreement == quality.token_agreement == 1.0
    assert quality.pictures.psnr_db == CEILING_DB
    assert quality.pictures.ssim == pytest.approx(1.0)
    assert quality.pictures.other_seed_psnr_db < 30


def test_forced_tokens_come_from_the_chain(pair: tuple[Path, Path]) -> None:
    reference, other = map(Bundle.open, pair)
    told: list[tuple[int, int]] = []
    compared = compare(reference, [other, reference], pictures=1, steps=4, progress=lambda _, i, n: told.append((i, n)))
    quality, itself = compared.bundles
    # The sampler alone draws from exact features, the chain from rounded ones.
    assert quality.components["sampler"].agreement > quality.forced.agreement
    assert 0.3 < quality.forced.agreement < 1.0
    assert quality.token_agreement is not None
    assert quality.components["transformer"].snr_db < quality.components["condition"].snr_db < CEILING_DB
    assert itself.forced.agreement == 1.0
    assert told == [(0, 2), (1, 2)]


def test_a_replay_counts_only_what_another_component_fed(small_bundles: dict[str, Path]) -> None:
    pipe = open_pipeline(Bundle.open(small_bundles["meissonic-tiny"]))
    calls, result = record(pipe, "a cat", 1, num_inference_steps=2)
    names = [call.component for call in calls]
    assert names[-1] == "vq_encoder"
    assert names.count("sampler") == 2
    replayed = replay(pipe, calls, lambda *_: None)
    cells = result.tokens[0].size
    # Two steps of draws and kept tokens; what the encoder reads from the picture is not among them.
    assert replayed.forced.counted == 2 * 2 * cells
    assert replayed.components["vq_encoder"].counted == cells


def test_equal_arrays_are_kept_once() -> None:
    recorder = Recorder()
    array = np.arange(4.0)
    recorder("a", {"x": array}, {"y": array + 1})
    recorder("b", {"x": array + 1}, {"y": array})
    first, second = recorder.calls
    assert first.inputs["x"] is second.outputs["y"]
    assert digest(array) != digest(array.reshape(2, 2))
    assert digest(array) != digest(array.astype(np.float32))


def test_differences_add_up() -> None:
    one, two = Difference(), Difference()
    one.add({"x": np.array([3.0]), "n": np.array([1, 2])}, {"x": np.array([3.3]), "n": np.array([1, 3])})
    assert one.snr_db == pytest.approx(20.0)
    assert one.agreement == 0.5
    two.merge(one)
    two.merge(one)
    assert two.to_json() == {"snr_db": 20.0, "agreement": 0.5}


def test_mcnemar_counts_what_changed() -> None:
    noise = PairedShares.of([True] * 8 + [False] * 2, [True] * 7 + [False, True, False])
    assert (noise.only_reference, noise.only_other, noise.difference) == (1, 1, 0.0)
    assert (noise.p_value, noise.verdict) == (1.0, "noise")
    worse = PairedShares.of([True] * 20, [True] * 10 + [False] * 10)
    # Ten changes all to one side: 2 / 2^10.
    assert worse.p_value == pytest.approx(2 / 1024)
    assert worse.verdict == "worse"
    assert PairedShares.of([False] * 9, [True] * 9).verdict == "better"
    assert PairedShares.of([True], [True]).p_value == 1.0


def test_ssim_falls_with_structure() -> None:
    rng = np.random.default_rng(0)
    picture = np.zeros((64, 64), np.uint8)
    picture[16:48, 16:48] = 200
    noisy = np.clip(picture + rng.normal(0, 20, picture.shape), 0, 255).astype(np.uint8)
    one, other, opposite = map(Image.fromarray, (picture, noisy, 200 - picture.clip(0, 200)))
    assert ssim(one, one) == pytest.approx(1.0)
    assert ssim(one, opposite) < ssim(one, other) < 0.9


def test_bundles_of_two_sources_are_refused(small_bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "quality", str(small_bundles["monetico-tiny"]), str(small_bundles["meissonic-tiny"])]) == 2
    assert "do not come from one source: they differ in" in capsys.readouterr().err


def test_only_the_starter_is_judged(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "quality", *map(str, pair), "--adherence", "3"]) == 2
    assert "only starter bundles can be judged" in capsys.readouterr().err


def test_the_verb_prints_tables_and_writes_files(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"--json": tmp_path / "quality.json", "--plot": tmp_path / "quality.png"}
    options = [part for name, path in files.items() for part in (name, str(path))]
    assert main(["bench", "quality", *map(str, pair), "--pictures", "1", "--steps", "2", *options]) == 0
    out = capsys.readouterr().out
    assert "int4" in out.splitlines()[0]
    assert "tokens drawn, every step from the reference's grid" in out
    values = json.loads(files["--json"].read_text("utf-8"))
    assert values["bundles"][0]["components"]["transformer"]["snr_db"] > 5
    with Image.open(files["--plot"]) as plot:
        assert plot.width > 400


def test_the_starter_is_judged_by_category(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "quality.json"
    plot = tmp_path / "quality.svg"
    arguments = ["bench", "quality", *[str(STARTER)] * 3, "--pictures", "1", "--steps", "4"]
    assert main([*arguments, "--adherence", "1", "--json", str(path), "--plot", str(plot)]) == 0
    bundles = json.loads(path.read_text("utf-8"))["bundles"]
    assert len(bundles) == 2
    for values in (bundle["adherence"] for bundle in bundles):
        assert values["all"]["n"] == len(values) - 1
        assert all(row["verdict"] == "noise" for row in values.values())
    assert "exact McNemar test" in capsys.readouterr().out
    assert "<svg" in plot.read_text("utf-8")


@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [
        (["--pictures", "0"], 2, "--pictures must be at least 1"),
        (["--plot", "x.gif"], 2, "must end in .png"),
        (["--json", "no/such/folder.json"], 1, "there is no folder no/such"),
    ],
)
def test_bad_options(
    options: list[str], code: int, reason: str, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "quality", *map(str, pair), *options]) == code
    assert reason in capsys.readouterr().err
