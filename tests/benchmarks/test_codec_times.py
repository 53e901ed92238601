"""Codecs of several bundles, run by turns on the same picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pochade.benchmarks import codec_times


def test_a_bundle_equals_itself_and_takes_its_time(
    small_bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, target = str(small_bundles["monetico-tiny"]), tmp_path / "times.json"
    codec_times.main([folder, folder, "--size", "64x96", "--rounds", "1", "--json", str(target)])
    report = json.loads(target.read_text("utf-8"))
    rows = {(i // 2, row["component"]): row for i, row in enumerate(report["rows"])}
    assert rows.keys() == {(i, name) for i in (0, 1) for name in ("vq_encoder", "vq_decoder")}
    assert rows[1, "vq_encoder"]["agreement"] == 1 and rows[1, "vq_decoder"]["snr_db"] == 200
    assert rows[0, "vq_decoder"]["ratio"] == 1
    assert all(len(row["seconds"]) == 1 and row["seconds"][0] > 0 for row in report["rows"])
    assert "100.00% equal" in capsys.readouterr().out
