"""The masking schedule against the recorded tables."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from pochade.runtime.schedulers.masked import MaskedSchedule, MaskingSchedule, mask_count
from tests.golden import GOLDEN

TABLES = load_file(GOLDEN / "scheduler" / "tables.safetensors")


@pytest.mark.parametrize("name", [name for name in TABLES if name.startswith("mask_len.")])
def test_recorded_mask_counts(name: str) -> None:
    _, schedule, steps, cells = name.split(".")
    kind: MaskingSchedule = "cosine" if schedule == "cosine" else "linear"
    num_steps = int(steps[1:])
    found = [mask_count(i, num_steps, int(cells[1:]), kind, 1.0) for i in range(num_steps - 1)]
    # The table's last entry is unused: the last step masks nothing.
    assert found == TABLES[name][:-1].tolist()


@pytest.mark.parametrize("name", [name for name in TABLES if name.startswith(("temperatures.", "timesteps."))])
def test_recorded_temperatures_and_timesteps(name: str) -> None:
    temperature = 1.5 if name.startswith("temperatures.1.5") else (2.0, 0.0)
    schedule = MaskedSchedule.create(len(TABLES[name]), 64, temperature, "cosine")
    found = schedule.temperatures if name.startswith("temperatures") else schedule.timesteps
    np.testing.assert_allclose(found, TABLES[name], rtol=0, atol=1e-6)


def test_some_recorded_counts_differ_from_exact_arithmetic() -> None:
    """So that the float32 order above is really put to the test; in-painting depends on the linear counts."""
    differing = 0
    for name in (name for name in TABLES if name.startswith("mask_len.linear.")):
        steps, cells = (int(part[1:]) for part in name.split(".")[2:])
        exact = [cells * (steps - i - 1) // steps for i in range(steps - 1)]
        differing += exact != TABLES[name][:-1].tolist()
    assert differing


def test_last_step_masks_nothing_and_others_at_least_one() -> None:
    counts = MaskedSchedule.create(64, 4, (2.0, 0.0), "cosine").num_masked
    assert counts[-1] == 0 and counts[:-1].min() == 1
    assert MaskedSchedule.create(1, 4, (2.0, 0.0), "cosine").num_masked.tolist() == [0]
