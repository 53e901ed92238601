"""Whole recorded runs: same tokens on every step, same picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import pochade
from pochade.export.families.meissonic import Meissonic
from pochade.export.modules.masked_transformer import MaskedTransformer
from pochade.runtime.pipeline import Result, StepEvent
from tests.golden import GOLDEN, GUIDED_TOLERANCE, TOLERANCE, arrays, facts, softmax, uniform_for

TRACES = [("meissonic-tiny", "t2i"), ("monetico-tiny", "t2i"), ("monetico-tiny", "t2i_b2_noneg")]


def guided_logits(model: str, trace: str, step: int, guidance: float) -> NDArray[Any]:
    """Recorded where the file has them, else from the PyTorch module (which gives recorded logits bit for bit)."""
    recorded = arrays(model)
    if f"{trace}.step{step}.guided_logits" in recorded:
        return recorded[f"{trace}.step{step}.guided_logits"]
    checkpoint = Meissonic.open(GOLDEN / model)
    module = MaskedTransformer(checkpoint.transformer)
    checkpoint.transformer_weights.load_into(module)
    tokens = torch.from_numpy(recorded[f"{trace}.step{step}.sample_in"]).long()
    names = ("encoder_hidden_states", "pooled_projections", "micro_conds")
    given = [torch.from_numpy(recorded[f"{trace}.model_in.{name}"]) for name in names]
    timestep = torch.tensor([facts(model)["traces"][trace]["timesteps"][step]])
    with torch.no_grad():
        without, with_text = module(torch.cat((tokens, tokens)), *given, timestep).chunk(2)
    mixed: NDArray[Any] = (without + guidance * (with_text - without)).numpy()
    return mixed


class RecordedNoise:
    """Repeats the draws of a recorded run."""

    def __init__(self, model: str, trace: str) -> None:
        recorded, run = arrays(model), facts(model)["traces"][trace]
        self._draw, self._keep = [], []
        for step in range(run["n_steps"]):
            logits = guided_logits(model, trace, step, run["args"]["guidance_scale"])
            p = softmax(logits.reshape(*logits.shape[:2], -1).transpose(0, 2, 1))
            codes = recorded[f"{trace}.step{step}.pred_tokens"].reshape(p.shape[:2])
            # The code that the race takes may be one that the caller keeps anyway; its interval still exists.
            race = (p / recorded[f"{trace}.step{step}.exp_noise"].reshape(p.shape)).argmax(-1)
            masked = (recorded[f"{trace}.step{step}.sample_in"] >= p.shape[-1]).reshape(codes.shape)
            assert (race[masked] == codes[masked]).all()
            self._draw.append(uniform_for(p, race))
            self._keep.append(recorded.get(f"{trace}.step{step}.uniform_noise"))

    def draw(self, image: int, step: int, cells: int) -> NDArray[np.float32]:
        row: NDArray[np.float32] = self._draw[step][image]
        return row

    def keep(self, image: int, step: int, cells: int) -> NDArray[np.float32]:
        keep = self._keep[step]
        assert keep is not None
        row: NDArray[np.float32] = keep[image]
        return row


@pytest.mark.parametrize(("model", "trace"), TRACES)
def test_recorded_run(bundles: dict[str, Path], model: str, trace: str) -> None:
    recorded, run = arrays(model), facts(model)["traces"][trace]
    arguments = dict(run["args"])
    negative = arguments.pop("negative_prompt", "")
    seen: list[NDArray[Any]] = []

    def observe(name: str, inputs: Any, outputs: Any) -> None:
        if name == "sampler":
            seen.append(outputs["next_tokens"][0])

    with pochade.load(bundles[model], device="cpu") as pipe:
        pipe.observer = observe
        result = pipe(**arguments, negative_prompt=negative, noise=RecordedNoise(model, trace))
    steps = run["n_steps"]
    for image in range(len(result.images)):
        for step in range(steps):
            expected = recorded[f"{trace}.step{step}.sample_out"][image]
            assert (seen[image * steps + step] == expected).all(), f"image {image}, step {step}"
        pixels = np.asarray(result.images[image]).astype(int)
        if f"{trace}.image_u8" in recorded:
            difference = pixels - recorded[f"{trace}.image_u8"][image]
        else:
            difference = pixels[::8, ::8] - recorded[f"{trace}.image_u8_stride8"][image]
        assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(("model", "trace"), TRACES)
def test_what_the_transformer_receives(bundles: dict[str, Path], model: str, trace: str) -> None:
    """Text states, pooled vectors and micro conditions of the first step, unconditional rows first."""
    recorded, run = arrays(model), facts(model)["traces"][trace]
    arguments = dict(run["args"]) | {"num_inference_steps": 1}
    negative = arguments.pop("negative_prompt", "")
    given: list[Any] = []
    with pochade.load(bundles[model], device="cpu") as pipe:
        pipe.observer = lambda name, inputs, _: given.append(inputs) if name == "condition" else None
        pipe(**arguments, negative_prompt=negative, seed=1)
    found = {round(float(inputs["pooled"].sum()), 4): inputs for inputs in given}
    for row in range(len(recorded[f"{trace}.model_in.pooled_projections"])):
        expected = recorded[f"{trace}.model_in.pooled_projections"][row]
        inputs = min(found.values(), key=lambda value: float(np.abs(value["pooled"][0] - expected).max()))
        np.testing.assert_allclose(inputs["pooled"][0], expected, rtol=0, atol=TOLERANCE)
        states = recorded[f"{trace}.model_in.encoder_hidden_states"][row]
        np.testing.assert_allclose(inputs["text_states"][0], states, rtol=0, atol=TOLERANCE)
        assert (inputs["micro_conds"][0] == recorded[f"{trace}.model_in.micro_conds"][row]).all()


def test_guided_logits_of_the_first_step(bundles: dict[str, Path]) -> None:
    """Guidance in front of the last linear layer, as the sampler does it, is the recorded guidance behind it."""
    model, trace = "monetico-tiny", "t2i"
    recorded, run = arrays(model), facts(model)["traces"][trace]
    features: list[NDArray[Any]] = []
    with pochade.load(bundles[model], device="cpu") as pipe:
        pipe.observer = lambda name, _, out: features.append(out["features"][0]) if name == "transformer" else None
        pipe(**run["args"], noise=RecordedNoise(model, trace))
    with_text, without = features[:2]
    head = Meissonic.open(GOLDEN / model).transformer_weights["mlm_layer.conv2.weight"].flatten(1).numpy()
    guided = (without + 9.0 * (with_text - without)) @ head.T
    expected = recorded[f"{trace}.step0.guided_logits"][0].reshape(guided.shape[1], -1).T
    np.testing.assert_allclose(guided, expected, rtol=0, atol=GUIDED_TOLERANCE)


def test_events_of_a_run(bundles: dict[str, Path]) -> None:
    with pochade.load(bundles["monetico-tiny"], device="cpu") as pipe:
        events = list(pipe.stream(["a", "b"], width=64, height=64, num_inference_steps=3, seed=4))
    steps, last = events[:-1], events[-1]
    assert isinstance(last, Result) and len(last.images) == 2
    assert [e.index for e in steps if isinstance(e, StepEvent)] == [1, 2, 3, 4, 5, 6]
    assert [e.image_index for e in steps if isinstance(e, StepEvent)] == [0, 0, 0, 1, 1, 1]
