"""Limits of memory, held against what a process takes."""

from __future__ import annotations

import json
import sys
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
        assert row["planned_peaks"].keys() == {"text", "condition", "denoise", "decode"}
        if sys.platform == "linux":
            assert row["phase_peaks"].keys() == row["planned_peaks"].keys()
            assert max(row["phase_peaks"].values()) <= row["peak_rss"]
    assert (free["ram"], kept["ram"]) == (None, 10**9)
    assert "allow" in refused["refused"] and "planned_peak" not in refused
    printed = capsys.readouterr().out
    assert printed.count("\n| starter |") == 3
    assert printed.count("| decode |") == (2 if sys.platform == "linux" else 0)


@pytest.mark.parametrize(
    ("row", "exceeded"),
    [
        ({"refused": "too small"}, False),
        ({"peak_rss": 90, "planned_peak": 100, "ram": None}, False),
        ({"peak_rss": 101, "planned_peak": 100, "ram": None}, True),
        ({"peak_rss": 99, "planned_peak": 100, "ram": 98}, True),
        ({"peak_rss": 90, "planned_peak": 100, "ram": None, "phase_peaks": {"text": 81, "decode": 90}}, True),
    ],
)
def test_predictions_and_limits_are_bounds(row: dict[str, Any], exceeded: bool) -> None:
    phases: dict[str, Any] = {"planned_peaks": {"text": 80, "decode": 100}, "phase_peaks": {}}
    assert budgets._exceeded(phases | row) is exceeded
