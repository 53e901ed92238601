"""Memory after closing, told for every time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pochade.benchmarks import closed_memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells of a process")
def test_each_time_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "closed.json"
    closed_memory.main(["starter", "--size", "128x128", "--times", "2", "--json", str(target)])
    found = json.loads(target.read_text("utf-8"))["bytes"]
    assert len(found) == 2
    assert capsys.readouterr().out.split(": ")[1].split() == [f"{more / 1e6:.1f}" for more in found]
