"""int8 layers that know what they are given: smoothed inputs, and ranges measured beforehand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pochade.errors import UsageError
from pochade.quant.component import quantize_component
from pochade.quant.fidelity import Call
from pochade.quant.moments import Moment
from pochade.quant.scheme import SCHEMES, STATIC, Scheme
from pochade.quant.smooth import smoothing_factors
from tests.quant.graphs import initializers, operators, relative_error, run, save_linear

RNG = np.random.default_rng(4)
WEIGHT = RNG.standard_normal((128, 96)).astype(np.float32)
OUTLIERS = np.ones(128, np.float32)
OUTLIERS[[3, 40]] = 60.0
INT8 = SCHEMES["int8"]
SMOOTH = replace(INT8, smoothing=0.5)
MEASURED = replace(INT8, linear=STATIC, sensitive=STATIC)


def inputs(n: int, seed: int) -> NDArray[np.float32]:
    """Two inputs of 128 are far larger than the others."""
    return (np.random.default_rng(seed).standard_normal((n, 128)) * OUTLIERS).astype(np.float32)


def quantized(folder: Path, scheme: Scheme, calls: list[Call]) -> Path:
    folder.mkdir()
    source = save_linear(folder / "in.onnx", WEIGHT)
    quantize_component(source, folder / "out.onnx", "transformer", scheme, calls=calls)
    return folder / "out.onnx"


CALLS = [Call("transformer", {"x": inputs(200, 1)}, {})]


def test_smoothing_takes_outliers_out_of_the_activations(tmp_path: Path) -> None:
    x = inputs(100, 2)
    # Without them the others would be rounded to a few levels.
    small = np.where(OUTLIERS > 1, 0, x).astype(np.float32)
    mixed = np.concatenate([x, small])
    errors = {}
    for name, scheme in (("plain", INT8), ("smooth", SMOOTH)):
        path = quantized(tmp_path / name, scheme, CALLS)
        errors[name] = relative_error(run(path, x=mixed)[100:], small @ WEIGHT)
    assert errors["smooth"] < 0.5 * errors["plain"]
    assert operators(tmp_path / "smooth" / "out.onnx") == ["Mul", "DynamicQuantizeMatMul"]


def test_factors_share_the_range_between_input_and_weight() -> None:
    moment = Moment.of(inputs(200, 1))
    peaks = np.abs(WEIGHT).max(1)
    factors = smoothing_factors(moment, peaks, 0.5)
    assert np.exp(np.log(factors).mean()) == pytest.approx(1, rel=1e-4)
    assert factors[3] > 5 * factors[4]
    # All of it to the weights' side makes them all equally large.
    levelled = smoothing_factors(moment, peaks, 0.0) * peaks
    np.testing.assert_allclose(levelled, levelled[0], rtol=1e-3)


def test_static_ranges_are_those_that_were_measured(tmp_path: Path) -> None:
    x = inputs(100, 3)
    path = quantized(tmp_path / "static", MEASURED, CALLS)
    assert operators(path) == ["QuantizeLinear", "MatMulIntegerToFloat"]
    seen = CALLS[0].inputs["x"]
    held = initializers(path)
    assert held["w.weight.input_scale"] == pytest.approx((seen.max() - seen.min()) / 255, rel=1e-5)
    clipped = np.clip(x, seen.min(), seen.max())
    # Steps of 1.4 beside two inputs of size 60 and 126 of size 1: sqrt(128 * 1.4^2 / 12 / 7326) is 0.054.
    assert relative_error(run(path, x=x), clipped @ WEIGHT) < 0.065


def test_layers_nobody_watched_are_dynamic(tmp_path: Path) -> None:
    for name, scheme in (("smooth", SMOOTH), ("static", MEASURED)):
        assert operators(quantized(tmp_path / name, scheme, [])) == ["DynamicQuantizeMatMul"]


def test_schemes_say_what_they_need() -> None:
    assert SCHEMES["int4"].is_calibrated
    assert SMOOTH.is_calibrated
    assert MEASURED.is_calibrated
    # The ranges of a decoder's convolutions are measured, its weights are not fitted to them.
    assert INT8.is_calibrated and not INT8.is_fitted
    assert not replace(INT8, int8_codec=False).is_calibrated
    assert not replace(SCHEMES["int4"], rounding="hqq").is_fitted
    assert replace(SCHEMES["int4"], rounding="hqq", low_rank=4).is_fitted
    with pytest.raises(UsageError, match="smoothing of strength 2"):
        replace(INT8, smoothing=2.0)
    with pytest.raises(UsageError, match="rounding 'best' is unknown"):
        replace(INT8, rounding="best")
