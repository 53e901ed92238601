"""Limits of memory, held against what a process takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pochade.benchmarks import budgets


def test_a_limit_is_kept_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "budgets.json"
    arguments = ["starter", "--sizes", "32x32", "--steps", "2", "--ram", "none", "1G", "20M", "--json", str(report)]
    assert budgets.main(arguments) == 0
    free, kept, refused = json.loads(report.read_text())["rows"]
    for row in (free, kept):
        # The process itself is most of it.
        assert row["peak_rss"] <= row["planned_peak"] < 2 * row["peak_rss"]
        assert {line.split()[0] for line in row["plan"]} == {"text", "condition", "denoise", "decode"}
    assert (free["ram"], kept["ram"]) == (None, 10**9)
    assert "allow" in refused["refused"] and "planned_peak" not in refused
    assert capsys.readouterr().out.count("\n| starter |") == 3


@pytest.mark.parametrize(
    ("row", "exceeded"),
    [
        ({"refused": "too small"}, False),
        ({"peak_rss": 90, "planned_peak": 100, "ram": None}, False),
        ({"peak_rss": 101, "planned_peak": 100, "ram": None}, True),
        ({"peak_rss": 99, "planned_peak": 100, "ram": 98}, True),
    ],
)
def test_predictions_and_limits_are_bounds(row: dict[str, Any], exceeded: bool) -> None:
    assert budgets._exceeded(row) is exceeded
