"""What an adapter costs, measured on a tiny bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pochade.benchmarks.lora_cost import measure
from pochade.bundle import Bundle
from pochade.errors import UsageError
from pochade.quant.fidelity import open_pipeline


def test_every_case_is_measured_in_every_round(bundles: dict[str, Path]) -> None:
    with open_pipeline(Bundle.open(bundles["monetico-tiny"])) as pipe:
        found = measure(pipe, (64, 64), 2, 3)
    assert list(found["cpu_seconds"]) == ["none", "rank 0", "rank 2"]
    assert all(len(seconds) == 3 for seconds in found["cpu_seconds"].values())
    assert found["ratio_to_none"]["none"] == 1


def test_bundles_of_before_are_refused(bundles: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundles["monetico-tiny"], tmp_path / "old"))
    manifest = json.loads((folder / "bundle.json").read_text("utf-8"))
    for component in manifest["components"].values():
        if lora := component.pop("lora", None):
            (folder / lora["file"]).unlink()
            manifest["files"] = [entry for entry in manifest["files"] if entry["path"] != lora["file"]]
    (folder / "bundle.json").write_text(json.dumps(manifest), "utf-8")
    with open_pipeline(Bundle.open(folder)) as pipe:
        with pytest.raises(UsageError, match="takes no LoRA; export it again"):
            measure(pipe, (64, 64), 2, 1)
        with pytest.raises(UsageError, match="takes no LoRA, being an old bundle; export it again"):
            pipe.load_lora(tmp_path / "x.safetensors")
