"""Samplers and guidance against the reference library, over whole runs with the same noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import rescale_noise_cfg
from numpy.typing import NDArray

from pochade.errors import UsageError
from pochade.export.diffusion_sampler import build_diffusion_sampler
from pochade.runtime.schedulers import SAMPLERS
from pochade.runtime.schedulers.diffusion import DiffusionConfig, DiffusionScheduler

PUBLISHED: dict[str, Any] = {
    "beta_end": 0.018,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "thresholding": False,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "variance_type": "fixed_small",
}
REFERENCES: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "dpm-solver": (DPMSolverMultistepScheduler, {}),
    "ddim-original": (DDIMScheduler, {"set_alpha_to_one": True}),
    "dpm-solver-original": (
        DPMSolverMultistepScheduler,
        {"timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"},
    ),
}
SHAPE = (2, 4, 6, 10)
TOLERANCE = 1e-5
"""Of samples of size one; the reference computes coefficients in float32."""


def velocity(sample: NDArray[np.float32], timestep: float) -> NDArray[np.float32]:
    """Stands in for a network: bends and mixes samples, differently at every step."""
    bent: NDArray[np.float32] = np.tanh(np.roll(sample, 1, axis=2) + np.float32(timestep / 700))
    return bent - np.float32(0.3) * sample


@pytest.fixture(scope="module")
def graph() -> ort.InferenceSession:
    return ort.InferenceSession(ir.to_proto(build_diffusion_sampler(SHAPE[1])).SerializeToString())


class Run:
    """A sampler's steps, one after another, through the graph."""

    def __init__(self, graph: ort.InferenceSession, scheduler: DiffusionScheduler) -> None:
        self._graph, self._scheduler = graph, scheduler
        self._picture: NDArray[np.float32] | None = None

    def step(
        self, index: int, output: NDArray[np.float32], sample: NDArray[np.float32], noise: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        weights = self._scheduler.step_weights(index, self._picture is None)
        assert bool(weights.noise) <= self._scheduler.needs_noise
        before = sample if self._picture is None else self._picture
        found = guide(self._graph, output, output, 1.0, 0.0, sample, before, noise, np.array(weights, np.float32))
        self._picture = found[1]
        return found[0]


def guide(
    graph: ort.InferenceSession,
    wanted: NDArray[np.float32],
    away: NDArray[np.float32],
    scale: float,
    rescale: float,
    sample: NDArray[np.float32],
    before: NDArray[np.float32],
    noise: NDArray[np.float32],
    weights: NDArray[np.float32],
) -> list[NDArray[np.float32]]:
    found: list[NDArray[np.float32]] = graph.run(
        ["next_latent", "picture"],
        {
            "latent": sample,
            "noise_pred": wanted,
            "negative_noise_pred": away,
            "picture_before": before,
            "noise": noise,
            "guidance_scale": np.array([scale], np.float32),
            "guidance_rescale": np.array([rescale], np.float32),
            "step_weights": weights,
        },
    )
    return found


def normal(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(SHAPE, dtype=np.float32)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of the reference's own
@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("steps", [1, 2, 4, 14, 15, 20, 50])
@pytest.mark.parametrize("beta_end", [0.018, 0.03])
@pytest.mark.parametrize("name", REFERENCES)
def test_runs_equal_the_reference(
    graph: ort.InferenceSession,
    name: str,
    beta_end: float,
    steps: int,
    strength: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind, other = REFERENCES[name]
    reference = kind.from_config({**PUBLISHED, "beta_end": beta_end, **other})
    scheduler = SAMPLERS[name].create(steps, DiffusionConfig.from_dict({**PUBLISHED, "beta_end": beta_end}))
    reference.set_timesteps(steps)
    np.testing.assert_array_equal(scheduler.timesteps, reference.timesteps.numpy())
    start = scheduler.start(strength)
    assert start == max(steps - min(int(steps * strength), steps), 0)
    sample = normal(0)
    if strength < 1 and start < steps:
        if hasattr(reference, "set_begin_index"):
            reference.set_begin_index(start)
        noised = reference.add_noise(
            torch.tensor(sample), torch.tensor(normal(1)), reference.timesteps[start : start + 1]
        )
        sample = scheduler.add_noise(start, sample, normal(1))
        np.testing.assert_allclose(sample, noised.numpy(), rtol=0, atol=TOLERANCE)
    expected = torch.tensor(sample)
    drawn = {"value": torch.zeros(SHAPE)}
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: drawn["value"])
    run = Run(graph, scheduler)
    for index in range(start, steps):
        noise = normal(10 + index)
        drawn["value"] = torch.tensor(noise)
        t = reference.timesteps[index]
        expected = reference.step(torch.tensor(velocity(expected.numpy(), float(t))), t, expected).prev_sample
        output = velocity(sample, float(scheduler.timesteps[index]))
        sample = run.step(index, output, sample, noise)
        assert sample.dtype == np.float32
    np.testing.assert_allclose(sample, expected.numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_count_of_steps_is_taken_or_refused(name: str) -> None:
    config = DiffusionConfig(beta_end=0.018)
    for steps in (-1, 0, 1001):
        with pytest.raises(UsageError, match=f"^{steps} inference steps"):
            SAMPLERS[name].create(steps, config)
    for steps in (997, 998, 999, 1000):
        try:
            scheduler = SAMPLERS[name].create(steps, config)
        except UsageError:
            continue
        assert scheduler.timesteps[-1] >= 0 and scheduler.timesteps[0] < 1000
        assert len(scheduler.timesteps) == steps


def test_another_strength_is_refused() -> None:
    with pytest.raises(UsageError, match=r"strength 1\.5"):
        SAMPLERS["ddim"].create(4, DiffusionConfig(beta_end=0.018)).start(1.5)


def test_only_noisy_samplers_weigh_noise() -> None:
    for name, kind in SAMPLERS.items():
        scheduler = kind.create(4, DiffusionConfig(beta_end=0.018))
        assert any(scheduler.step_weights(index, index == 0).noise for index in range(4)) is (name == "ddpm")
        assert scheduler.needs_noise is (name == "ddpm")


@pytest.mark.parametrize(
    ("name", "value"), [("prediction_type", "epsilon"), ("beta_schedule", "linear"), ("timestep_spacing", "trailing")]
)
def test_other_training_is_refused(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is '{value}'"):
        DiffusionConfig.from_dict({**PUBLISHED, name: value})


@pytest.mark.parametrize("rescale", [0.0, 0.4, 1.0])
def test_guidance_equals_the_reference(graph: ort.InferenceSession, rescale: float) -> None:
    conditional, unconditional = normal(0), 2 * normal(1) + np.float32(0.5)
    only_velocity = np.array([0, 1, 0, 0, 0, 1], np.float32)
    unused = np.zeros(SHAPE, np.float32)
    found, picture = guide(graph, conditional, unconditional, 5.0, rescale, unused, unused, unused, only_velocity)
    c, u = torch.tensor(conditional), torch.tensor(unconditional)
    expected = rescale_noise_cfg(  # type: ignore[no-untyped-call]
        u + 5.0 * (c - u), c, guidance_rescale=rescale
    )
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(picture, found)


def test_a_constant_prediction_stays_finite(graph: ort.InferenceSession) -> None:
    same, unused = np.ones(SHAPE, np.float32), np.zeros(SHAPE, np.float32)
    for rescale in (0.0, 1.0):
        found = guide(graph, same, same, 5.0, rescale, unused, unused, unused, np.ones(6, np.float32))[0]
        assert np.isfinite(found).all()
