"""The sampler graph: recorded steps, the law of its draw, and its edges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy import stats

from pochade.export.sampler import CHUNK, build_sampler
from pochade.export.trace import save
from pochade.runtime.ort import ort
from pochade.runtime.schedulers.masked import MaskedSchedule, MaskingSchedule
from tests.golden import GOLDEN, softmax, uniform_for

STEPS = load_file(GOLDEN / "scheduler" / "steps.safetensors")
FACTS = json.loads((GOLDEN / "scheduler" / "steps.json").read_text())
CODES, MASK = int(FACTS["V"]), int(FACTS["mask_token_id"])


def open_sampler(folder: Path, head: torch.Tensor, mask: int) -> Any:
    path = folder / "sampler.onnx"
    save(build_sampler(head.shape[1], head.shape[0], mask, lambda: head), path)
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Sampler whose features are the logits."""
    return open_sampler(tmp_path_factory.mktemp("sampler"), torch.eye(CODES), MASK)


def run(session: Any, tokens: NDArray[Any], logits: NDArray[Any], **changes: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    batch, cells = tokens.shape[0], tokens[0].size
    feeds = {
        "tokens": tokens.astype(np.int64),
        "features": logits,
        "negative_features": logits,
        "guidance_scale": np.ones(1, np.float32),
        "draw_noise": np.full((batch, cells), 0.5, np.float32),
        "keep_noise": np.full((batch, cells), 0.5, np.float32),
        "temperature": np.ones(1, np.float32),
        "num_masked": np.zeros(1, np.int64),
    } | changes
    following, codes = session.run(["next_tokens", "codes"], feeds)
    return following, codes


def recorded(key: str, temperature: float, num_masked: int) -> tuple[NDArray[Any], dict[str, Any]]:
    """Tokens and feeds of a recorded step; the draw noise repeats the outcome of its exponential race."""
    logits = STEPS[f"{key}.logits"]
    rows = logits.reshape(*logits.shape[:2], -1).transpose(0, 2, 1).copy()
    p = softmax(rows)
    race = (p / STEPS[f"{key}.exp_noise"].reshape(p.shape)).argmax(-1)
    changes = {
        "draw_noise": uniform_for(p, race),
        "temperature": np.array([temperature], np.float32),
        "num_masked": np.array([num_masked], np.int64),
    }
    if f"{key}.uniform_noise" in STEPS:
        changes["keep_noise"] = STEPS[f"{key}.uniform_noise"]
    return STEPS[f"{key}.sample_in"], {"logits": rows, **changes}


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("start", ["1", "0.375"])
@pytest.mark.parametrize("step", range(8))
def test_recorded_steps(sampler: Any, schedule: MaskingSchedule, start: str, step: int) -> None:
    key = f"sched.{schedule}.smr{start}.step{step}"
    plan = MaskedSchedule.create(8, 64, (2.0, 0.0), schedule, float(start))
    tokens, changes = recorded(key, plan.temperatures[step], int(plan.num_masked[step]))
    following, codes = run(sampler, tokens, **changes)
    assert (following == STEPS[f"{key}.sample_out"]).all()
    drawn = np.where(tokens == MASK, STEPS[f"{key}.pred_tokens"].reshape(tokens.shape), tokens)
    assert (codes == drawn).all()


@pytest.mark.parametrize("case", ["none", "one", "two"])
def test_recorded_edges_with_few_masked_cells(sampler: Any, case: str) -> None:
    step = FACTS["edge_timestep_index"]
    plan = MaskedSchedule.create(8, 64, (2.0, 0.0), "cosine")
    key = f"sched.edge.{case}_masked"
    tokens, changes = recorded(key, plan.temperatures[step], int(plan.num_masked[step]))
    following, _ = run(sampler, tokens, **changes)
    assert (following == STEPS[f"{key}.sample_out"]).all()


@pytest.mark.parametrize(("codes", "spread"), [(32, 1.0), (96, 3.0), (97, 1.5)])
def test_draw_follows_the_categorical_law(tmp_path: Path, codes: int, spread: float) -> None:
    """Chi-square over all codes expected at least five times; 97 is prime, so it has one block only."""
    session = open_sampler(tmp_path, torch.eye(codes), codes)
    rng = np.random.default_rng(5)
    logits = (spread * rng.normal(size=codes)).astype(np.float32)
    side = 200
    tokens = np.full((1, side, side), codes)
    rows = np.broadcast_to(logits, (1, side * side, codes)).copy()
    noise = rng.random((1, side * side), dtype=np.float32)
    drawn = run(session, tokens, rows, draw_noise=noise)[1]
    expected = softmax(logits) * side * side
    counts = np.bincount(drawn.ravel(), minlength=codes)
    often = expected >= 5
    observed = np.append(counts[often], counts[~often].sum())
    wanted = np.append(expected[often], expected[~often].sum())
    assert stats.chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue > 1e-3


@pytest.mark.parametrize("u", [0.0, np.nextafter(np.float32(1), np.float32(0))])
def test_impossible_codes_are_never_drawn(sampler: Any, u: float) -> None:
    """The ends of [0, 1) meet codes of probability zero at both ends of the code book."""
    logits = np.full((1, 4, CODES), -200.0, np.float32)
    logits[..., 5:9] = 0.0
    drawn = run(sampler, np.full((1, 2, 2), MASK), logits, draw_noise=np.full((1, 4), u, np.float32))[1]
    assert ((drawn >= 5) & (drawn < 9)).all()


def test_rows_beyond_a_chunk_are_drawn_alike(sampler: Any) -> None:
    side = int(np.ceil(np.sqrt(CHUNK))) + 5
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(1, side * side, CODES)).astype(np.float32)
    tokens = np.full((1, side, side), MASK)
    # Some cells are known, so chunks do not coincide with the grid.
    tokens[0, ::3, ::2] = 7
    noise = rng.random((1, side * side), dtype=np.float32)
    drawn = run(sampler, tokens, logits, draw_noise=noise)[1].ravel()
    upto = softmax(logits[0]).cumsum(-1)
    expected = (upto <= noise[0][:, None]).sum(-1)
    unknown = tokens.ravel() == MASK
    assert (drawn[~unknown] == 7).all()
    # float32 against float64 sums may differ where a number falls on a boundary.
    assert (drawn[unknown] == expected[unknown]).mean() > 0.995


def test_guidance_mixes_before_the_draw(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    head = torch.from_numpy(rng.normal(size=(CODES, 8)).astype(np.float32))
    session = open_sampler(tmp_path, head, MASK)
    with_text, without = (rng.normal(size=(2, 16, 8)).astype(np.float32) for _ in range(2))
    noise = rng.random((2, 16), dtype=np.float32)
    tokens = np.full((2, 4, 4), MASK)
    guidance = np.array([4.5], np.float32)
    changes = {"negative_features": without, "guidance_scale": guidance, "draw_noise": noise}
    drawn = run(session, tokens, with_text, **changes)[1].reshape(2, 16)
    logits = (without + 4.5 * (with_text - without)) @ head.numpy().T
    assert (drawn == (softmax(logits).cumsum(-1) <= noise[..., None]).sum(-1)).all()


def test_no_masked_cell_left_to_draw(sampler: Any) -> None:
    tokens = np.arange(16).reshape(1, 4, 4)
    following, codes = run(sampler, tokens, np.zeros((1, 16, CODES), np.float32))
    assert (following == tokens).all() and (codes == tokens).all()
