"""HunyuanDiT from checkpoint to picture, against the reference pipeline with the same noise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import pochade
from pochade.cli import main
from pochade.errors import UsageError
from pochade.quant.fidelity import Recorder
from pochade.runtime.families.hunyuandit import HunyuanDiTPipeline
from pochade.runtime.pipeline import Result, StepEvent, Tiling
from pochade.runtime.rng import PhiloxGaussianNoise
from tests import hunyuan, hunyuan_checkpoint
from tests.hunyuan_reference import NEGATIVE, PROMPT, SCHEDULERS, reference

SQUARE, WIDE = (64, 64), (96, 64)
TOLERANCE = 2e-4
"""Of latents whose deviation is about 1, after a whole run."""


@pytest.fixture(params=hunyuan.VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pipe(hunyuan_bundles: dict[str, tuple[Path, Path]], version: str) -> Iterator[HunyuanDiTPipeline]:
    with pochade.load(hunyuan_bundles[version][1], device="cpu", threads=1) as opened:
        assert isinstance(opened, HunyuanDiTPipeline)
        yield opened


def paint(pipe: HunyuanDiTPipeline, size: tuple[int, int], **given: Any) -> tuple[NDArray[np.float32], Result]:
    """Latents that the codec is given, and the result."""
    recorder = Recorder()
    pipe.observer = recorder
    result = pipe(PROMPT, negative_prompt=NEGATIVE, width=size[0], height=size[1], seed=3, **given)
    return recorder.calls[-1].inputs["latent"], result


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of the reference's own
@pytest.mark.parametrize(
    ("sampler", "steps", "size", "guidance", "rescale"),
    [
        ("ddpm", 4, SQUARE, 5.0, 0.0),
        ("ddpm", 20, WIDE, 5.0, 0.7),
        ("ddim", 20, SQUARE, 5.0, 0.0),
        ("ddim", 4, WIDE, 1.0, 0.0),
        ("dpm-solver", 4, SQUARE, 1.0, 0.0),
        ("dpm-solver", 20, WIDE, 7.5, 0.0),
    ],
)
def test_runs_equal_the_reference(
    hunyuan_bundles: dict[str, tuple[Path, Path]],
    version: str,
    pipe: HunyuanDiTPipeline,
    monkeypatch: pytest.MonkeyPatch,
    sampler: str,
    steps: int,
    size: tuple[int, int],
    guidance: float,
    rescale: float,
) -> None:
    given: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance, "guidance_rescale": rescale}
    found, result = paint(pipe, size, sampler=sampler, **given)
    expected = reference(hunyuan_bundles[version][0], version, sampler, size, monkeypatch, **given)
    scale = expected.std()
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=TOLERANCE)
    decoded = hunyuan_checkpoint.vae().decode(torch.from_numpy(expected) / 0.13025, return_dict=False)[0]
    picture = (decoded[0].detach() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).mul(255).round().numpy()
    assert np.abs(np.asarray(result.images[0], np.float64) - picture).max() <= 1
    assert result.settings["sampler"] == sampler


def test_painting_begins_with_a_picture(
    hunyuan_bundles: dict[str, tuple[Path, Path]],
    version: str,
    pipe: HunyuanDiTPipeline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = Image.effect_mandelbrot((96, 64), (-2, -1, 1, 1), 20).convert("RGB")
    found, result = paint(pipe, WIDE, num_inference_steps=10, sampler="ddim", image=image, strength=0.55)
    pixels = torch.from_numpy(np.asarray(image, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    latent = hunyuan_checkpoint.vae().encode(pixels).latent_dist.mode().detach() * 0.13025
    config = json.loads((hunyuan_bundles[version][0] / "scheduler" / "scheduler_config.json").read_text())
    scheduler: Any = SCHEDULERS["ddim"].from_config(config)
    scheduler.set_timesteps(10)
    noise = torch.from_numpy(PhiloxGaussianNoise(3).start(0, tuple(latent.shape)))
    begun = np.asarray(scheduler.add_noise(latent, noise, scheduler.timesteps[5:6]))
    given: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 5.0, "begun": (5, begun)}
    expected = reference(hunyuan_bundles[version][0], version, "ddim", WIDE, monkeypatch, **given)
    np.testing.assert_allclose(found / expected.std(), expected / expected.std(), rtol=0, atol=TOLERANCE)
    assert result.settings["strength"] == 0.55
    # The picture is cut to nothing: another size is brought to that of the result.
    assert pipe(PROMPT, width=64, height=64, image=image, strength=0.5, num_inference_steps=2).images[0].size == SQUARE


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"sampler": "euler"}, "sampler 'euler' is unknown; there are ddpm, ddim"),
        ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"num_inference_steps": 1000}, "1000 inference steps cannot be had"),
        ({"width": 1000}, "width 1000 is not a multiple of 16"),
        ({"image": Image.new("RGB", (8, 8)), "strength": 0.01}, "strength 0.01 of 4 steps is none"),
        ({"strength": -1}, "strength is -1"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"seed": -2}, "seed is -2"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    hunyuan_bundles: dict[str, tuple[Path, Path]], given: dict[str, Any], reason: str
) -> None:
    with pochade.load(hunyuan_bundles["v1.2"][1], device="cpu") as pipe, pytest.raises(UsageError, match=reason):
        arguments: dict[str, Any] = {"prompt": PROMPT, "width": 64, "height": 64, "num_inference_steps": 4}
        pipe(**(arguments | given))


def test_noise_of_a_caller_is_checked(hunyuan_bundles: dict[str, tuple[Path, Path]]) -> None:
    class Wrong(PhiloxGaussianNoise):
        def start(self, image: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
            return np.full(shape, np.nan, np.float32)

    with (
        pochade.load(hunyuan_bundles["v1.2"][1], device="cpu") as pipe,
        pytest.raises(UsageError, match="finite numbers"),
    ):
        pipe(PROMPT, width=64, height=64, num_inference_steps=1, noise=Wrong(0))


def test_pictures_of_a_call_are_those_of_their_seeds(hunyuan_bundles: dict[str, tuple[Path, Path]]) -> None:
    small: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 3}
    with pochade.load(hunyuan_bundles["v1.1"][1], device="cpu") as pipe:
        several = pipe(["a fox", "狐狸"], seed=7, num_images_per_prompt=2, **small)
        alone = pipe("狐狸", seed=8, **small)
        assert several.seeds == [7, 8, 9, 10]
        assert several.images[1].tobytes() == alone.images[0].tobytes() != several.images[3].tobytes()
        events = list(pipe.stream("狐狸", seed=8, **small))
        steps = [event for event in events if isinstance(event, StepEvent)]
        assert [step.index for step in steps] == [1, 2, 3] and steps[0].total == 3
        assert steps[1].preview().size == SQUARE
        assert isinstance(events[-1], Result)
        assert any("not trained on 64x64; nearest is 1024x1024" in note for note in events[-1].notes)


@pytest.mark.parametrize("tiling", ["on", "off"])
def test_tiling_does_not_change_the_picture(hunyuan_bundles: dict[str, tuple[Path, Path]], tiling: Tiling) -> None:
    arguments: dict[str, Any] = {"width": 64, "height": 128, "num_inference_steps": 1, "seed": 1}
    pictures = []
    ways: tuple[Tiling, ...] = ("auto", tiling)
    for way in ways:
        with pochade.load(hunyuan_bundles["v1.2"][1], device="cpu", tiling=way) as pipe:
            pictures.append(np.asarray(pipe(PROMPT, **arguments).images[0], np.int16))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_commands(
    hunyuan_bundles: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, first, second = str(hunyuan_bundles["v1.1"][1]), str(tmp_path / "一.png"), str(tmp_path / "二.png")
    small = ["-m", bundle, "--size", "64x64", "--steps", "3", "--device", "cpu"]
    painted = ["generate", PROMPT, *small, "--sampler", "dpm-solver", "--guidance-rescale", "0.5", "-o", first, "-v"]
    assert main(painted) == 0
    assert "denoise" in capsys.readouterr().err
    assert main(["verify", first, "--model", bundle]) == 0
    assert "identical" in capsys.readouterr().out
    begun = ["generate", PROMPT, *small, "-o", second, "-i", first, "--strength", "0.7"]
    assert main(begun) == 0
    assert main(["verify", second, "--model", bundle]) == 6
    assert "begun with another picture" in capsys.readouterr().err
    assert main(["generate", PROMPT, *small, "-o", second, "--temperature", "2"]) == 2
    assert "--temperature means nothing to" in capsys.readouterr().err
    assert main(["generate", "a red star", "-o", second, "-i", first]) == 2
    assert "--init-image means nothing to starter, a model of meissonic; drop it" in capsys.readouterr().err
    assert main(["generate", PROMPT, *small, "-o", second, "--strength", "0.7"]) == 2
    assert "give that too" in capsys.readouterr().err
    assert main(["generate", PROMPT, *small, "-o", second, "-i", str(hunyuan_bundles["v1.1"][0] / "x.png")]) == 6
    assert "there is no such file" in capsys.readouterr().err
    assert main(["generate", PROMPT, *small, "-o", second, "-i", bundle + "/bundle.json"]) == 6
    assert "Traceback" not in capsys.readouterr().err


def test_a_limit_of_memory_is_planned_for(hunyuan_bundles: dict[str, tuple[Path, Path]]) -> None:
    with pochade.load(hunyuan_bundles["v1.2"][1], device="cpu", ram="4G") as pipe:
        pipe(PROMPT, width=64, height=64, num_inference_steps=1)
        assert pipe.plan is not None
        assert list(pipe.plan.phases) == ["text", "condition", "denoise", "decode"]
