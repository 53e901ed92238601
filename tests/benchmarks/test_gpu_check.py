"""The check of graphics cards, tried on the CPU: the same way, other numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pochade
from pochade.benchmarks import card, gpu_check
from pochade.runtime.ort import ort
from pochade.runtime.providers import CPU
from tests.cards import pretend

HAS_CUDA = "CUDAExecutionProvider" in ort.get_available_providers()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("check") / "out.json"
    options = ["--steps", "2", "--vram", "20M", "20G", "--side", "256", "--json", str(path)]
    assert gpu_check.main(["--device", "cpu", *options]) == 0
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def test_every_component_is_compared(report: dict[str, Any]) -> None:
    names = {row["component"] for row in report["parity"]}
    assert names == {"text_encoder", "condition", "transformer", "sampler", "vq_decoder"} == report["providers"].keys()
    assert report["token_agreement"] == 1.0 and report["failures"] == []
    assert report["machine"]["cpu"] and report["settings"]["num_inference_steps"] == 2


def test_limits_are_refused_or_kept(report: dict[str, Any]) -> None:
    refused, kept = report["budgets"]
    assert "0.02 GB" in refused["refused"]
    assert kept["kept"] is True and 0 < kept["planned"] < 20 * 10**9
    assert 0 < kept["measured"] < 500 * 10**6, "a process of its own"


def test_the_rate_of_products_is_what_a_pass_is_held_against(report: dict[str, Any]) -> None:
    speed = report["speed"]
    assert speed["pass_operations"] > 10**8 and speed["product_rate"] > 10**8
    reached = speed["pass_operations"] / speed["pass_seconds"]
    assert speed["fraction"] == pytest.approx(reached / speed["product_rate"])
    assert report["peers"] is None


def test_graphs_of_cuda_are_tried_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"seed": 4, "num_inference_steps": 2}
    card = pretend(monkeypatch, "cuda", {})
    with pochade.load("starter") as pipe:
        there, result = gpu_check._paint(pipe, settings)
        found = gpu_check._captured(pipe, settings, result, there["transformer"][0])
    assert found is not None and found["token_agreement"] == 1.0 and found["same_picture"]
    assert found["pass_seconds"] > 0 and found["seconds"]["total"] > 0 and gpu_check._faults(found) == []
    assert len(card.captured) == 2, "a picture, and passes by themselves"


def test_what_is_wrong_with_graphs_of_cuda_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_check._faults({"token_agreement": 0.5}) == ["with CUDA graphs 50.0% of the tokens agree"]
    assert gpu_check._faults({"token_agreement": None, "same_picture": True}) == []
    pretend(monkeypatch, "cuda", {})
    with pochade.load("starter") as pipe:
        monkeypatch.setattr(CPU.__class__, "open", lambda *_: 1 / 0)
        broken = gpu_check._captured(pipe, {}, None, {})  # type: ignore[arg-type]
    assert broken is not None and "zero" in gpu_check._faults(broken)[0]


def test_a_component_that_differs_is_a_failure() -> None:
    x = np.ones((4, 4), np.float32)
    row = gpu_check._compare("c", {"y": x, "i": np.arange(4)}, {"y": x * 1.1, "i": np.array([0, 1, 2, 9])})
    assert row == {"component": "c", "snr_db": 20.0, "equal": [0.75]}


def test_what_the_driver_says_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [["1", "77"], [str(os.getpid()), "512"]]
    monkeypatch.setattr(card, "query_card", lambda *_: rows)
    assert card.card_memory() == 512 * 1024**2
    with card.watched_card("cuda", 0.001) as peak:
        while peak.bytes is None:
            pass
    assert peak.bytes == 512 * 1024**2
    monkeypatch.setattr(card, "query_card", lambda *_: [[str(os.getpid()), "[N/A]"]])
    assert card.card_memory() is None
    with card.watched_card("cuda", 0.001) as peak:
        pass
    assert peak.bytes is None


@pytest.mark.skipif(HAS_CUDA, reason="the GPU flavour is installed")
def test_no_card_ends_with_four(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--json", str(tmp_path / "out.json")]) == 4
    assert "device cuda cannot be had" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
