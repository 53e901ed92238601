"""Inputs of a component, checked before it runs."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest

from pochade.bundle import Component, TensorSpec
from pochade.errors import UsageError
from pochade.runtime.session import check_inputs

INPUTS = (
    TensorSpec("latent", "float32", ("batch", 4)),
    TensorSpec("controls", "float32", (2, "control_batch"), optional=True),
)
COMPONENT = Component("transformer", "t.onnx", (), INPUTS, (), "fp32", None, 0)
ARRAYS = {"latent": np.zeros((1, 4)), "controls": np.zeros((2, 1)), "other": np.zeros(1)}


@pytest.mark.parametrize("names", [{"latent"}, {"latent", "controls"}])
def test_optional_inputs_may_be_left_out(names: Collection[str]) -> None:
    checked = check_inputs(COMPONENT, {name: ARRAYS[name] for name in names})
    assert checked.keys() == set(names)
    assert all(array.dtype == np.float32 for array in checked.values())


@pytest.mark.parametrize("names", [{"controls"}, {"latent", "controls", "other"}])
def test_others_are_needed_and_unknown_ones_refused(names: Collection[str]) -> None:
    with pytest.raises(UsageError, match="transformer takes latent, controls, not "):
        check_inputs(COMPONENT, {name: ARRAYS[name] for name in names})


def test_an_optional_input_has_its_shape() -> None:
    with pytest.raises(UsageError, match=r"controls has shape \(3, 1\)"):
        check_inputs(COMPONENT, {"latent": np.zeros((1, 4)), "controls": np.zeros((3, 1))})
