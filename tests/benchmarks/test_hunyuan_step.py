"""A pass of HunyuanDiT's transformer beside diffusers, at a size of kilobytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pochade.benchmarks import hunyuan_step
from pochade.bundle import BundleWriter
from pochade.export.trace import build
from pochade.export.write import write_component
from tests import hunyuan


def test_bundle_and_reference_are_measured_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "checkpoint"
    reference = hunyuan.transformer("v1.2")
    reference.save_pretrained(checkpoint / "transformer")
    with BundleWriter(tmp_path / "tiny") as writer:
        graph = build(hunyuan.plans(reference)["transformer"])
        components = {"transformer": write_component(graph, writer.path, "transformer", "fp32", None, {})}
        rest: dict[str, Any] = {"tokenizer": None, "scheduler": {}, "defaults": {}, "source": {}}
        writer.finish(name="tiny", family="hunyuandit", family_revision=1, task="test", components=components, **rest)
    report = tmp_path / "step.json"
    monkeypatch.setattr("subprocess.run", _in_this_process)
    monkeypatch.setattr(hunyuan_step, "TEXT", (77, 64))
    monkeypatch.setattr(hunyuan_step, "TEXT_T5", (256, 64))
    arguments = [str(checkpoint), str(tmp_path / "tiny"), "--size", "64x32", "--threads", "1", "--json", str(report)]
    hunyuan_step.main(arguments)
    printed = capsys.readouterr().out
    assert "| tiny |" in printed and "| diffusers float32 |" in printed
    kept = json.loads(report.read_text("utf-8"))
    assert [row["transformer"] for row in kept["rows"]] == ["tiny", "diffusers float32"]
    for row in kept["rows"]:
        assert (row["height"], row["width"], len(row["seconds"])) == (4, 8, 2)
        assert row["peak_rss"] > 0


class _Done:
    def __init__(self, stdout: str) -> None:
        self.stdout = stdout


def _in_this_process(command: list[str], **options: Any) -> _Done:
    assert command[1:] == ["-m", "pochade.benchmarks.hunyuan_step", "--job"]
    return _Done(json.dumps(hunyuan_step.measure(json.loads(options["input"]))))


def test_one_pass_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        hunyuan_step.main(["checkpoint", "bundle", "--passes", "1"])
    assert "the first warms up" in capsys.readouterr().err
