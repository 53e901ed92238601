"""The Python API: values that cannot be meant, seeds, cancelling, and what a result tells."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pochade
from pochade.errors import BundleInvalidError, BundleNotFoundError, CancelledError, DeviceUnavailableError, UsageError
from pochade.runtime.families.meissonic import MeissonicPipeline
from pochade.runtime.locate import resolve
from pochade.runtime.pipeline import Result, StepEvent
from pochade.runtime.rng import PhiloxNoise

SMALL: dict[str, Any] = {"width": 64, "height": 96, "num_inference_steps": 3}


@pytest.fixture
def pipe(bundles: dict[str, Path]) -> Iterator[MeissonicPipeline]:
    with pochade.load(bundles["monetico-tiny"], device="cpu", threads=1) as pipeline:
        assert isinstance(pipeline, MeissonicPipeline)
        yield pipeline


def pixels(result: Result, index: int = 0) -> NDArray[np.uint8]:
    return np.asarray(result.images[index])


def test_result_tells_how_it_was_made(pipe: MeissonicPipeline) -> None:
    result = pipe("a red fox", seed=5, **SMALL)
    assert result.images[0].size == (64, 96)
    assert result.seeds == [5]
    assert set(result.timings) == {"text", "condition", "denoise", "decode", "total"}
    assert result.settings["guidance_scale"] == 9.0 and result.settings["num_inference_steps"] == 3
    assert result.peak_memory is None or result.peak_memory > 1 << 20
    used = {"text_encoder", "condition", "transformer", "sampler", "vq_decoder"}
    assert result.providers == dict.fromkeys(used, "CPUExecutionProvider")
    assert result.notes == ()
    assert (result.tokens[0] < 48).all()


def test_same_seed_same_picture_and_another_seed_another(pipe: MeissonicPipeline) -> None:
    first, again, other = (pipe("a red fox", seed=seed, **SMALL) for seed in (5, 5, 6))
    assert (pixels(first) == pixels(again)).all()
    assert (pixels(first) != pixels(other)).any()


def test_a_picture_of_a_batch_can_be_painted_alone(pipe: MeissonicPipeline) -> None:
    batch = pipe("a red fox", num_images_per_prompt=3, seed=5, **SMALL)
    assert batch.seeds == [5, 6, 7]
    alone = pipe("a red fox", seed=7, **SMALL)
    assert (pixels(batch, 2) == pixels(alone)).all()


def test_prompts_are_tiled_in_turn(pipe: MeissonicPipeline) -> None:
    both = pipe(["a cat", "a dog"], negative_prompt=["x", "y"], num_images_per_prompt=2, seed=1, **SMALL)
    assert len(both.images) == 4
    alone = pipe("a dog", negative_prompt="y", seed=4, **SMALL)
    assert (pixels(both, 3) == pixels(alone)).all()


def test_unseeded_pictures_differ_and_tell_their_seed(pipe: MeissonicPipeline) -> None:
    first, second = pipe("a red fox", **SMALL), pipe("a red fox", seed=-1, **SMALL)
    assert first.seeds != second.seeds
    assert (pixels(pipe("a red fox", seed=first.seeds[0], **SMALL)) == pixels(first)).all()


def test_guidance_of_one_needs_no_negative_pass(pipe: MeissonicPipeline) -> None:
    runs: list[str] = []
    pipe.observer = lambda name, *_: runs.append(name)
    result = pipe("a red fox", guidance_scale=1.0, negative_prompt="ignored", seed=1, **SMALL)
    assert runs.count("transformer") == 3 and runs.count("text_encoder") == 1
    assert result.settings["negative_prompt"] is None
    runs.clear()
    pipe("a red fox", guidance_scale=1.5, seed=1, **SMALL)
    assert runs.count("transformer") == 6 and runs.count("text_encoder") == 2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "   "}, "the prompt is empty"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": "a\0b"}, r"control character U\+0000 at position 1"),
        ({"prompt": "a\x1bb"}, r"control character U\+001B"),
        ({"prompt": "\ud800"}, r"lone surrogate U\+D800"),
        ({"prompt": "x" * 1_000_000}, "1000000 characters; at most 20000"),
        ({"negative_prompt": "a\0"}, "the negative prompt holds"),
        ({"prompt": ["a", "b", "c"], "negative_prompt": ["x", "y"]}, "2 negative prompts for 3 prompts"),
        ({"width": 0}, "width is 0"),
        ({"height": -64}, "height is -64"),
        ({"width": 65}, "width 65 is not a multiple of 8; use 64 or 72"),
        ({"width": 1 << 40}, "width is 1099511627776"),
        ({"width": 64.0}, "width is 64.0"),
        ({"width": True}, "width is True"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": 10**9}, "num_inference_steps is 1000000000"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"guidance_scale": "9"}, "guidance_scale is '9'"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": (1.0, -1.0)}, "temperature is -1.0"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"seed": -2}, "seed is -2"),
        ({"seed": 2**64}, "seed is"),
        ({"micro_conditioning_aesthetic_score": float("nan")}, "micro condition is nan"),
    ],
)
def test_values_that_cannot_be_meant(pipe: MeissonicPipeline, arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        pipe(**{"prompt": "a red fox", "seed": 1, **SMALL, **arguments})
    assert "\n" not in str(caught.value)


def test_emoji_and_chinese_are_prompts(pipe: MeissonicPipeline) -> None:
    result = pipe("一只红狐狸 🦊", seed=1, **SMALL)
    assert result.settings["prompt"] == "一只红狐狸 🦊"


def test_long_prompt_says_where_it_was_cut(pipe: MeissonicPipeline) -> None:
    prompt = "dog " * 30 + "here " * 60
    result = pipe(prompt, seed=1, **SMALL)
    (note,) = result.notes
    cut = int(note.split("the first ")[1].split()[0])
    assert f"of {len(prompt)} characters" in note and "77 tokens" in note
    # Cutting there by hand loses nothing more and paints the same picture.
    assert (pixels(pipe(prompt[:cut], seed=1, **SMALL)) == pixels(result)).all()


@pytest.mark.parametrize(
    "row", [np.zeros(5, np.float32), np.full(96, 1.0, np.float32), np.full(96, np.nan, np.float32)]
)
def test_noise_must_be_what_it_promises(pipe: MeissonicPipeline, row: NDArray[np.float32]) -> None:
    class Bad(PhiloxNoise):
        def draw(self, image: int, step: int, cells: int) -> NDArray[np.float32]:
            return row

    with pytest.raises(UsageError, match=r"noise must be 96 numbers in \[0, 1\)"):
        pipe("a red fox", noise=Bad(0), **SMALL)


def test_closing_the_generator_ends_the_call(pipe: MeissonicPipeline) -> None:
    stream = pipe.stream("a red fox", seed=1, **SMALL)
    event = next(stream)
    assert isinstance(event, StepEvent) and event.preview().size == (64, 96)
    stream.close()  # type: ignore[attr-defined]
    assert pipe("a red fox", seed=1, **SMALL).images


def test_callback_sees_every_step_and_its_error_ends_the_call(pipe: MeissonicPipeline) -> None:
    seen: list[int] = []

    def on_step(event: StepEvent) -> None:
        seen.append(event.index)
        if event.index == 2:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        pipe("a red fox", seed=1, callback_on_step_end=on_step, **SMALL)
    assert seen == [1, 2]


def test_cancel_from_another_thread(pipe: MeissonicPipeline) -> None:
    timer = threading.Timer(0.3, pipe.cancel)
    timer.start()
    with pytest.raises(CancelledError):
        pipe("a red fox", seed=1, width=256, height=256, num_inference_steps=1000)
    timer.join()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("pochade")]
    # The pipeline is usable afterwards.
    assert pipe("a red fox", seed=1, **SMALL).images


def test_closed_pipeline_says_so(bundles: dict[str, Path]) -> None:
    pipeline = pochade.load(bundles["monetico-tiny"], device="cpu")
    pipeline.close()
    with pytest.raises(UsageError, match="the pipeline is closed"):
        pipeline("a red fox", **SMALL)
    with pytest.raises(UsageError, match="the pipeline is closed"):
        pipeline.run_component("vq_decoder", {"tokens": np.zeros((1, 2, 2), np.int64), "strips": np.ones(1, np.int64)})


@pytest.mark.parametrize(
    ("name", "inputs", "reason"),
    [
        ("unet", {}, "there is no component 'unet'; there are text_encoder"),
        ("vq_decoder", {}, "vq_decoder takes tokens, strips, recompute, not nothing"),
        ("vq_decoder", {"token": np.zeros((1, 2, 2))}, "vq_decoder takes tokens, strips, recompute, not token"),
        ("vq_decoder", {"tokens": np.zeros((2, 2)), "strips": np.ones(1), "recompute": np.False_}, "tokens has shape"),
        ("text_encoder", {"input_ids": np.zeros((1, 5))}, "input_ids has shape"),
    ],
)
def test_run_component_refusals(pipe: MeissonicPipeline, name: str, inputs: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        pipe.run_component(name, inputs)


def test_unknown_model_family_revision_and_device(bundles: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BundleNotFoundError, match="there is no bundle 'nothing'"):
        pochade.load("nothing")
    with pytest.raises(UsageError, match="device 'tpu' is unknown"):
        pochade.load(bundles["monetico-tiny"], device="tpu")
    with pytest.raises(UsageError, match="threads is 0"):
        pochade.load(bundles["monetico-tiny"], threads=0)
    target = tmp_path / "other"
    shutil.copytree(bundles["monetico-tiny"], target)
    manifest = json.loads((target / "bundle.json").read_text())
    for changes, reason in (
        ({"family": "dall-e"}, "family 'dall-e' is unknown here; known are"),
        ({"family_revision": 99}, "revision 99 of family meissonic"),
        ({"tokenizer": None}, "no tokenizer is declared|tokenizer.json"),
        ({"scheduler": {}}, "lack a usable"),
    ):
        (target / "bundle.json").write_text(json.dumps(manifest | changes))
        with pytest.raises(BundleInvalidError, match=reason):
            pochade.load(target)


def test_a_folder_that_is_no_bundle_does_not_hide_an_installed_one(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkout has a folder starter/ at its top, where a newcomer types the first command."""
    home = tmp_path / "home"
    shutil.copytree(bundles["monetico-tiny"], home / "models" / "fox")
    (tmp_path / "fox").mkdir()
    monkeypatch.setenv("POCHADE_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    assert resolve("fox") == home / "models" / "fox"
    shutil.copytree(bundles["monetico-tiny"], tmp_path / "fox", dirs_exist_ok=True)
    assert resolve("fox") == Path("fox")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleNotFoundError, match=r"has no bundle\.json"):
        pochade.load("empty")


def test_device_asked_for_by_name_is_had_or_refused(bundles: dict[str, Path]) -> None:
    from pochade.runtime.ort import ort

    if "CUDAExecutionProvider" in ort.get_available_providers():
        with pochade.load(bundles["monetico-tiny"], device="cuda") as pipeline:
            assert set(pipeline("a", seed=1, **SMALL).providers.values()) == {"CUDAExecutionProvider"}
        return
    with pytest.raises(DeviceUnavailableError, match=r"pip install \"pochade\[gpu\]\""):
        pochade.load(bundles["monetico-tiny"], device="cuda")


def test_session_on_another_provider_than_asked_for_is_refused(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime falls back to the CPU without an error; the pipeline must notice."""
    with pochade.load(bundles["monetico-tiny"], device="cpu") as pipeline:
        pipeline.device = dataclasses.replace(pipeline.device, name="cuda")
        monkeypatch.setattr("pochade.runtime.providers.PROVIDERS", {"cpu": "CPUExecutionProvider", "cuda": "Elsewhere"})
        monkeypatch.setattr(type(pipeline.device), "_provider_list", lambda *_: ["CPUExecutionProvider"])
        with pytest.raises(DeviceUnavailableError, match="runs on CPUExecutionProvider instead of Elsewhere"):
            pipeline("a red fox", **SMALL)


def test_noise_is_the_same_wherever_it_is_drawn() -> None:
    """First numbers of a fixed seed; a change of generator would silently change every picture."""
    found = PhiloxNoise(7).draw(0, 0, 3)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, PhiloxNoise(5).draw(2, 0, 3))
    np.testing.assert_allclose(found, NOISE_OF_SEED_7, rtol=0, atol=1e-7)
    assert not np.array_equal(found, PhiloxNoise(7).keep(0, 0, 3))
    assert not np.array_equal(found, PhiloxNoise(7).draw(0, 1, 3))


NOISE_OF_SEED_7 = [0.16372650861740112, 0.8720734119415283, 0.9722633361816406]
