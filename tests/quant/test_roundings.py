"""Ways to round: what each promises, on matrices small enough to check, and in a layer with correlated inputs."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import helper

from pochade.quant.component import quantize_component
from pochade.quant.fidelity import Call
from pochade.quant.instrument import Instrument
from pochade.quant.low_rank import low_rank_correction
from pochade.quant.moments import DAMPING, Moment, input_moments
from pochade.quant.rounding import METHODS
from pochade.quant.rtn import pack_codes, unpack_blocks
from pochade.quant.scheme import CALIBRATED, ROUNDINGS, SCHEMES
from tests.quant.graphs import initializers, operators, port, run, save, save_linear

RNG = np.random.default_rng(3)
WIDTH, ROWS = 256, 96


def correlated(n: int, width: int = WIDTH, seed: int = 0) -> NDArray[np.float32]:
    """Inputs that live mostly in a few directions, as those of trained layers do."""
    mixing = np.random.default_rng(1).standard_normal((24, width))
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, 24)) @ mixing + 0.3 * rng.standard_normal((n, width))).astype(np.float32)


WEIGHT = RNG.standard_normal((ROWS, WIDTH)).astype(np.float32)
SEEN, UNSEEN = correlated(400), correlated(200, seed=9)
MOMENT = Moment.of(SEEN)


def kept(method: str, moment: Moment | None = MOMENT, block_size: int = 64) -> NDArray[np.float32]:
    """The weight after packing and unpacking."""
    scales, codes = METHODS[method](WEIGHT, 4, block_size, np.float32, moment)
    assert codes.min() >= -8
    assert codes.max() <= 7
    return unpack_blocks(pack_codes(codes, 4), scales, 4, WIDTH)


def output_error(weight: NDArray[np.float32], x: NDArray[np.float32] = UNSEEN) -> float:
    """Error power of the layer's output over its power, in dB."""
    return float(10 * np.log10(np.square(x @ (weight - WEIGHT).T).sum() / np.square(x @ WEIGHT.T).sum()))


def test_every_name_has_its_method() -> None:
    assert tuple(METHODS) == ROUNDINGS
    assert set(CALIBRATED) < set(ROUNDINGS)


def test_gptq_makes_up_for_errors_that_the_inputs_can_hide() -> None:
    errors = {method: output_error(kept(method)) for method in ROUNDINGS}
    assert errors["gptq"] < errors["search"] - 3 < errors["rtn"] - 3


def test_search_finds_better_scales_than_round_to_nearest() -> None:
    plain, searched = (np.square(kept(method, None) - WEIGHT).sum() for method in ("rtn", "search"))
    assert searched < 0.97 * plain


def test_hqq_leaves_more_errors_small_than_round_to_nearest() -> None:
    heavy = np.random.default_rng(0).standard_t(3, WEIGHT.shape).astype(np.float32)
    sparse = {}
    for method in ("rtn", "hqq"):
        scales, codes = METHODS[method](heavy, 4, 64, np.float32, None)
        error = np.abs(unpack_blocks(pack_codes(codes, 4), scales, 4, WIDTH) - heavy)
        sparse[method] = np.mean(error**0.7)
    assert sparse["hqq"] < 0.97 * sparse["rtn"]


def test_gptq_knows_nothing_without_a_moment() -> None:
    np.testing.assert_array_equal(kept("gptq", None), kept("search", None))


def test_gptq_on_independent_inputs_only_rounds() -> None:
    alone = Moment.of(np.eye(WIDTH, dtype=np.float32))
    np.testing.assert_allclose(kept("gptq", alone), kept("search", alone), atol=1e-6)


@pytest.mark.parametrize("method", ROUNDINGS)
def test_widths_that_fill_no_block(method: str) -> None:
    narrow, moment = WEIGHT[:, :100], Moment.of(SEEN[:, :100])
    scales, codes = METHODS[method](narrow, 4, 64, np.float32, moment)
    assert codes.shape == (ROWS, 2, 64)
    assert not codes[:, 1, 36:].any()
    back = unpack_blocks(pack_codes(codes, 4), scales, 4, 100)
    assert np.abs(back - narrow).mean() < 0.2


@pytest.mark.parametrize("method", ROUNDINGS)
def test_weights_that_are_not_finite(method: str) -> None:
    broken = WEIGHT.copy()
    broken[3, 5] = np.nan
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match="not finite"):
        METHODS[method](broken, 4, 64, np.float32, MOMENT)


def test_the_inverse_factor_is_one() -> None:
    factor = MOMENT.inverse_factor
    assert np.allclose(np.tril(factor, -1), 0)
    np.testing.assert_allclose(factor.T @ factor @ MOMENT.damped, np.eye(WIDTH), atol=1e-6)
    assert np.trace(MOMENT.damped) == pytest.approx(WIDTH * (1 + DAMPING))


def test_a_layer_that_is_given_nothing_is_still_rounded() -> None:
    silent = Moment.of(np.zeros((4, WIDTH), np.float32))
    assert np.isfinite(kept("gptq", silent)).all()


def test_the_low_rank_branch_is_the_best_of_its_rank() -> None:
    error = WEIGHT - kept("rtn")
    left = {}
    for name, moment in (("blind", None), ("seeing", MOMENT)):
        down, up = low_rank_correction(error, moment, 8)
        assert (down.shape, up.shape) == ((WIDTH, 8), (8, ROWS))
        left[name] = np.square(UNSEEN @ (error - (down @ up).T).T).sum() / np.square(UNSEEN @ error.T).sum()
    singular = np.linalg.svd(error, compute_uv=False)
    down, up = low_rank_correction(error, None, 8)
    assert np.square(error - (down @ up).T).sum() == pytest.approx(np.square(singular[8:]).sum(), rel=1e-4)
    assert left["seeing"] < 0.7 < left["blind"] < 1


def test_the_low_rank_branch_of_a_tall_layer() -> None:
    error = np.random.default_rng(0).standard_normal((128, 32)).astype(np.float32)
    down, up = low_rank_correction(error, None, 32)
    np.testing.assert_allclose((down @ up).T, error, atol=1e-4)


@pytest.fixture
def layer(tmp_path: Path) -> tuple[Path, list[Call]]:
    """A linear layer and recorded runs of it."""
    source = save_linear(tmp_path / "layer.onnx", np.ascontiguousarray(WEIGHT.T))
    calls = [Call("transformer", {"x": part}, {"y": part @ WEIGHT.T}) for part in np.split(SEEN, 4)]
    return source, calls


def test_moments_are_those_of_the_recorded_inputs(layer: tuple[Path, list[Call]]) -> None:
    source, calls = layer
    ((name, moment),) = input_moments(Instrument(source), ["w.weight"], calls)
    assert name == "w.weight"
    np.testing.assert_allclose(moment.second, SEEN.T @ SEEN, atol=0.01)


def test_an_instrument_runs_with_other_weights(layer: tuple[Path, list[Call]]) -> None:
    source, calls = layer
    instrument = Instrument(source)
    inputs = calls[0].inputs
    plain = instrument.run(inputs)["y"]
    np.testing.assert_allclose(plain, calls[0].outputs["y"], rtol=1e-4, atol=1e-3)
    doubled = instrument.run(inputs, {"w.weight": 2 * np.ascontiguousarray(WEIGHT.T)})["y"]
    np.testing.assert_allclose(doubled, 2 * plain, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(instrument.run(inputs)["y"], plain)


@pytest.mark.parametrize("low_rank", [0, 8])
def test_components_are_rounded_by_what_they_are_given(
    layer: tuple[Path, list[Call]], low_rank: int, tmp_path: Path
) -> None:
    source, calls = layer
    scheme = replace(SCHEMES["int4"], low_rank=low_rank)
    told: list[tuple[int, int]] = []
    errors = {}
    for name, recorded in (("calibrated", calls), ("blind", [])):
        target = tmp_path / name / "out.onnx"
        target.parent.mkdir()
        quantize_component(source, target, "transformer", scheme, lambda *p: told.append(p), recorded)
        found = run(target, x=UNSEEN)
        exact = UNSEEN @ WEIGHT.T
        errors[name] = float(np.square(found - exact).sum() / np.square(exact).sum())
        wanted = ["Cast", "Cast", "MatMulNBits", "MatMul", "MatMul", "Add"] if low_rank else ["MatMulNBits"]
        assert sorted(operators(target)) == sorted(wanted)
    assert errors["calibrated"] < 0.5 * errors["blind"]
    assert told[0] == (1, 1)
    if low_rank:
        assert initializers(tmp_path / "calibrated" / "out.onnx")["w.weight.down"].dtype == np.float16


def test_moments_go_once_the_next_is_asked_for(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", [f"x.{name}", name], [f"y.{name}"]) for name in ("first", "second")]
    square = np.eye(WIDTH, dtype=np.float32)
    inputs, outputs = ([port(f"{side}.{name}", ["n", WIDTH]) for name in ("first", "second")] for side in "xy")
    source = save(tmp_path / "two.onnx", nodes, inputs, outputs, {"first": square, "second": square})
    calls = [Call("transformer", {"x.first": SEEN, "x.second": UNSEEN}, {})]
    seen: list[tuple[str, weakref.ref[Moment]]] = []
    for name, moment in input_moments(Instrument(source), ["first", "second"], calls):
        assert moment.inverse_factor.shape == (WIDTH, WIDTH)
        assert all(earlier() is None for _, earlier in seen)
        seen.append((name, weakref.ref(moment)))
    assert [name for name, _ in seen] == ["first", "second"]
