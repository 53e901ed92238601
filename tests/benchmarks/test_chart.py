"""The chart of a comparison."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pochade.benchmarks.speed import Case, Report, Settings

pytest.importorskip("matplotlib")


def test_a_report_becomes_a_chart(tmp_path: Path) -> None:
    ran = {
        "text_encoder": [1.0],
        "condition": [0.0],
        "transformer": [2.0] * 4,
        "vq_decoder": [3.0],
        "sampler": [0.1] * 2,
    }
    run: dict[str, Any] = {"cold": False, "picture": 10.0, "peak_rss": 2_000_000_000}
    run["components"] = {name: {"opened": [0.5], "ran": values} for name, values in ran.items()}
    cases = [Case(name, tmp_path, name, 1, None, [run, run]) for name in ("int8", "PyTorch fp32")]
    report = tmp_path / "peers.json"
    Report(Settings("a cat", 64, 64, 2, 9.0, 7, "cpu", None), 1, cases, machine={}).save(report)
    chart = tmp_path / "chart.png"
    command = [sys.executable, "-m", "pochade.benchmarks.chart", str(report), str(chart), "--names", "int8=ours"]
    subprocess.run(command, check=True)
    with Image.open(chart) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or []}
    # One bar is ours and one is not, in each panel.
    assert {(0xD1, 0x49, 0x5B), (0x7F, 0x8C, 0x9A)} <= colours
