"""What quantization measures on and calibrates with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pochade.bundle import Bundle
from pochade.errors import UsageError
from pochade.quant.trial import record_calibration, small_settings
from pochade.runtime.locate import BUILT_IN

STARTER = Bundle.open(BUILT_IN / "starter")


def with_defaults(**defaults: Any) -> Bundle:
    manifest = replace(STARTER.manifest, defaults={**STARTER.manifest.defaults, **defaults})
    return replace(STARTER, manifest=manifest)


@pytest.mark.parametrize(
    ("width", "height", "steps", "expected"),
    [
        (128, 128, 12, (128, 128, 12)),
        (256, 256, 64, (256, 256, 64)),
        (512, 128, 9, (512, 128, 9)),
        (512, 256, 64, (512, 256, 4)),
        (1024, 768, 64, (512, 512, 4)),
        (1024, 1024, 2, (512, 512, 2)),
    ],
)
def test_only_small_pictures_get_all_their_steps(
    width: int, height: int, steps: int, expected: tuple[int, int, int]
) -> None:
    settings = small_settings(with_defaults(width=width, height=height, num_inference_steps=steps))
    assert (settings["width"], settings["height"], settings["num_inference_steps"]) == expected


def test_a_calibration_shows_every_step_and_not_the_measured_prompt() -> None:
    told: list[int] = []
    calls = record_calibration(STARTER, ["a red square", "two green moons"], lambda what, i, n: told.append(n))
    assert told == [2, 2]
    steps = STARTER.manifest.defaults["num_inference_steps"]
    assert len(calls["transformer"]) == 2 * steps
    shown = {int(step) for call in calls["condition"] for step in call.inputs["timesteps"]}
    assert shown == set(range(steps))


def test_an_empty_calibration_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        record_calibration(STARTER, ["a red square", " "], lambda *_: None)
