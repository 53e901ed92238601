"""The phases of a search, cut short: which weights they try, and what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from pochade.benchmarks import search_memory
from pochade.quant import sensitivity
from pochade.quant.scheme import Use
from pochade.quant.select import find_weights


def test_the_widest_weights_are_tried(
    small_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, tried = sensitivity._noise, list[Any]()

    def noting(*arguments: Any) -> dict[str, float]:
        tried.append(arguments[1])
        return original(*arguments)

    monkeypatch.setattr(sensitivity, "_noise", noting)
    search_memory.main([str(small_bundles["monetico-tiny"]), "--trials", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0].rstrip(",:") for line in lines[1:]] == [
        "recording",
        "text_encoder",
        "condition",
        "transformer",
        "vq_decoder",
    ]
    assert "transformer, 2 weights tried: peak so far " in "\n".join(lines)
    model = ir.load(small_bundles["monetico-tiny"] / "transformer.onnx")
    widest = max(weight.width for weight in find_weights(model) if weight.use is Use.LINEAR)
    assert [weight.width for weight in tried[-2:]] == [widest, widest]
