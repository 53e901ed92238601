"""Memory is planned before anything is loaded; limits are kept or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pochade
from pochade.bundle import Bundle
from pochade.errors import BundleInvalidError, OutOfBudgetError, UsageError
from pochade.runtime.codec_memory import CUDNN_WORK_SPACE
from pochade.runtime.families.hunyuandit_memory import MemoryModel as HunyuanMemory
from pochade.runtime.families.meissonic_memory import HEAD_CHUNK, MemoryModel
from pochade.runtime.memory import resident_memory
from pochade.runtime.plan import Way, Workload, choose
from pochade.runtime.providers import Device

GIGA = 10**9


def test_the_first_way_that_fits_is_taken() -> None:
    phases = {"denoise": [Way(5 * GIGA)], "decode": [Way(9 * GIGA), Way(6 * GIGA, recompute=True)]}
    free, roomy, tight = (choose(phases, budget) for budget in (None, 9 * GIGA, 6 * GIGA))
    assert [plan.phases["decode"].recompute for plan in (free, roomy, tight)] == [False, False, True]
    assert [plan.peak for plan in (free, roomy, tight)] == [9 * GIGA, 9 * GIGA, 6 * GIGA]
    assert "twice" in tight.lines()[2] and "twice" not in "".join(roomy.lines())


def test_what_cannot_fit_is_refused_with_what_would_do() -> None:
    phases = {"denoise": [Way(2_345_000_000)], "decode": [Way(3 * GIGA), Way(1 * GIGA, recompute=True)]}
    with pytest.raises(OutOfBudgetError, match=r"2.00 GB, and denoise alone takes 2.35 GB; allow 2.35G or more"):
        choose(phases, 2 * GIGA)
    choose(phases, 2_350_000_000)


def test_a_limit_changes_the_plan_and_not_the_picture(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bool] = []

    def watch(name: str, inputs: Any, _: Any) -> None:
        if name == "vq_decoder":
            decoded.append(bool(inputs["recompute"]))

    # A tiny codec is nothing beside the process and the holes in its heap; only its own part is looked at.
    monkeypatch.setattr("pochade.runtime.families.meissonic_memory.HOLES", 0)
    monkeypatch.setattr("pochade.runtime.pipeline.resident_memory", lambda: 1)
    call: dict[str, Any] = {"width": 512, "height": 512, "num_inference_steps": 1, "seed": 1}
    pictures = []
    needed: dict[str, Way] = {}
    for tiling in ("auto", "on", "off"):
        with pochade.load(bundles["monetico-tiny"], device="cpu", tiling=tiling, threads=1) as pipe:
            pipe.observer = watch
            pictures.append(np.asarray(pipe("a fox", **call).images[0]))
            assert pipe.plan is not None
            needed[tiling] = pipe.plan.phases["decode"]
    assert decoded == [False, True, False]
    assert needed["on"].peak < needed["auto"].peak < needed["off"].peak
    for picture in pictures[1:]:
        assert np.abs(picture.astype(int) - pictures[0]).max() <= 1
    limit = needed["auto"].peak - 1
    assert pipe.plan is not None
    assert limit > max(way.peak for name, way in pipe.plan.phases.items() if name != "decode")
    with pochade.load(bundles["monetico-tiny"], device="cpu", ram=limit, threads=1) as pipe:
        pipe.observer = watch
        pipe("a fox", **call)
    assert decoded[3:] == [True]
    # Two strips at a time take more, and are what a limit costs first.
    with pochade.load(bundles["monetico-tiny"], device="cpu", threads=2) as pipe:
        pictures.append(np.asarray(pipe("a fox", **call).images[0]))
        assert pipe.plan is not None
        both = pipe.plan.phases["decode"]
    assert both.at_once == 2 and both.peak > needed["auto"].peak
    with pochade.load(bundles["monetico-tiny"], device="cpu", ram=both.peak - 1, threads=2) as pipe:
        pictures.append(np.asarray(pipe("a fox", **call).images[0]))
        assert pipe.plan is not None and pipe.plan.phases["decode"] == needed["auto"]
    assert np.array_equal(pictures[-1], pictures[0]) and np.array_equal(pictures[-2], pictures[0])


def test_a_limit_below_the_process_is_refused_before_anything_runs(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # That of the tests holds whatever libraries earlier ones imported, over a gigabyte.
    monkeypatch.setattr("pochade.runtime.pipeline.resident_memory", lambda: 100_000_000)
    with pochade.load(bundles["monetico-tiny"], device="cpu", ram="10M") as pipe:
        pipe.observer = lambda *_: pytest.fail("a component ran")
        with pytest.raises(OutOfBudgetError, match=r"allow 0\.[0-9]+G or more"):
            pipe("a fox", width=64, height=64)


def test_phases_grow_with_what_is_asked_for(bundles: dict[str, Path]) -> None:
    with pochade.load(bundles["monetico-tiny"], device="cpu") as pipe:
        model = MemoryModel.of(pipe.bundle, 8)
    assert model is not None
    small, large = (model.ways(Workload(n, n, n, 2, 1), "auto", 0) for n in (8, 64))
    assert small["text"][0].peak <= large["text"][0].peak
    for phase in ("condition", "denoise", "decode"):
        assert small[phase][0].peak < large[phase][0].peak
    many = model.ways(Workload(8, 8, 8, 2, 500), "auto", 0)
    assert many["decode"][0].peak > small["decode"][0].peak


def test_hunyuandit_is_planned_on_a_card_by_what_it_takes_there(hunyuan_bundles: dict[str, tuple[Path, Path]]) -> None:
    bundle = Bundle.open(hunyuan_bundles["v1.2"][1])
    on_cpu, on_card = (HunyuanMemory.of(bundle, 8, (), on_gpu) for on_gpu in (False, True))
    assert on_cpu is not None and on_card is not None
    small, large = (on_card.ways(Workload(n, n, 2, 2, 1), "auto", 0) for n in (16, 128))
    assert small["denoise"][0].peak < large["denoise"][0].peak
    # Tokenizers stay on the host; the text's keys and values are there in float16.
    host = on_cpu.ways(Workload(16, 16, 2, 2, 1), "auto", 0)
    assert small["denoise"][0].peak < host["denoise"][0].peak
    assert small["text"][0].peak > host["text"][0].peak


def test_the_sampler_takes_as_many_cells_at_a_time_as_the_model_says() -> None:
    sampler = pytest.importorskip("pochade.export.sampler")
    assert sampler.CHUNK == HEAD_CHUNK


@pytest.mark.parametrize("memory", [None, {}, {"weights": 5}])
def test_bundles_that_tell_too_little_paint_without_a_limit_only(
    bundles: dict[str, Path], tmp_path: Path, memory: dict[str, int] | None
) -> None:
    folder = tmp_path / "old"
    shutil.copytree(bundles["monetico-tiny"], folder)
    manifest = json.loads((folder / "bundle.json").read_text())
    for component in manifest["components"].values():
        component.pop("memory")
        if memory is not None:
            component["memory"] = memory
    (folder / "bundle.json").write_text(json.dumps(manifest))
    with pochade.load(folder, device="cpu") as pipe:
        assert pipe("a fox", width=64, height=64, num_inference_steps=1).images
        assert pipe.plan is None
    with (
        pochade.load(folder, device="cpu", ram="4G") as pipe,
        pytest.raises(BundleInvalidError, match="export it again"),
    ):
        pipe("a fox", width=64, height=64)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ram": "much"}, "ram 'much' is not a size"),
        ({"ram": 0}, "ram is 0"),
        ({"ram": "0"}, "ram is 0"),
        ({"ram": "9" * 400}, "is not a size"),
        ({"ram": True}, "ram is True"),
        ({"tiling": "maybe"}, "tiling is 'maybe'; choose auto, on, off"),
    ],
)
def test_limits_that_cannot_be_meant(bundles: dict[str, Path], options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        pochade.load(bundles["monetico-tiny"], device="cpu", **options)


def test_a_card_has_memory_of_its_own(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pochade.runtime.loading.choose", lambda _: Device("cuda", required=False))
    with pytest.raises(UsageError, match="ram limits a memory that device cuda does not use; give vram"):
        pochade.load(bundles["monetico-tiny"], ram="4G")
    with pochade.load(bundles["monetico-tiny"], vram="4G") as pipe:
        steps = pipe.stream("a fox", width=64, height=64)
        # Opens nothing yet: what is planned are the sessions, with nothing taken before them.
        assert pipe.plan is not None and pipe.plan.budget == 4 * 10**9
        peaks = {phase: way.peak for phase, way in pipe.plan.phases.items()}
        peaks["decode"] -= CUDNN_WORK_SPACE
        assert max(peaks.values()) < 50_000_000
        cuda, behind = pipe.device._provider_list(captures=False)
        assert isinstance(cuda, tuple) and (cuda[0], behind) == ("CUDAExecutionProvider", "CPUExecutionProvider")
        assert cuda[1]["gpu_mem_limit"] == "4000000000" and cuda[1]["cudnn_conv_use_max_workspace"] == "0"
        steps.close()  # type: ignore[attr-defined]
    with pochade.load(bundles["monetico-tiny"], vram="1M") as pipe, pytest.raises(OutOfBudgetError, match="or more"):
        pipe.stream("a fox", width=64, height=64)


def test_a_limit_of_a_card_means_nothing_without_one(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="vram limits a memory that device cpu does not use; give ram"):
        pochade.load(bundles["monetico-tiny"], device="cpu", vram="4G")
    monkeypatch.setattr("pochade.runtime.loading.choose", lambda _: Device("cpu", required=False))
    with pochade.load(bundles["monetico-tiny"], vram="4G") as pipe:
        result = pipe("a fox", width=64, height=64, num_inference_steps=1)
    assert any("no card that vram" in note for note in result.notes)


def test_the_process_knows_what_it_takes() -> None:
    resident = resident_memory()
    if resident is not None:  # Linux
        assert 10_000_000 < resident < 100 * GIGA
