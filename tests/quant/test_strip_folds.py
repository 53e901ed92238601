"""Factors of strips folded into what comes next: the same picture, by fewer operators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from pochade.quant import strip_folds
from tests.quant.graphs import needs_vnni, relative_error
from tests.quant.test_int8_conv import IN_HALF, ROWS, picture, quantized, recorded

WAYS = [
    {"strips": np.array([count]), "recompute": np.array(small)} for small in (False, True) for count in (1, 3, ROWS)
]


def made(decoder: Path, folder: Path, eight_bits: bool = True) -> Path:
    path, _ = quantized(decoder, folder, recorded() if eight_bits else (), IN_HALF)
    return path


def unfolded(decoder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: bool) -> Path:
    with monkeypatch.context() as context:
        context.setattr(strip_folds, "rewrite", lambda model: None)
        return made(decoder, folder, *arguments)


def pictures(path: Path) -> list[NDArray[np.float32]]:
    return [picture(path, **way) for way in WAYS]


def products_of_strips(path: Path) -> tuple[int, int]:
    """Products with one number: of strips, not rows of them, as they are read, and of strips before they are kept."""
    read = given = 0
    for node in ir.load(path).graph.all_nodes():
        x, factor = (node.inputs[0], node.inputs[1]) if node.op_type == "Mul" else (None, None)
        if x is not None and factor is not None and factor.const_value is not None:
            read += made_by(made_by(x, "Cast"), "Unsqueeze") is not None
            given += {use.node.op_type for use in node.outputs[0].uses()} == {"Cast"}
    return read, given


def made_by(value: ir.Value | None, op_type: str) -> ir.Value | None:
    """What a value was made of, if by this operator."""
    maker = None if value is None else value.producer()
    return maker.inputs[0] if maker is not None and maker.op_type == op_type else None


@needs_vnni
def test_powers_of_two_change_nothing(decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = unfolded(decoder, tmp_path / "before", monkeypatch)
    monkeypatch.setattr(strip_folds._Folds, "widen_normalized", lambda *_: None)
    after = made(decoder, tmp_path / "after")
    for expected, found in zip(pictures(before), pictures(after), strict=True):
        assert np.array_equal(expected, found)
    (read, given), (read_after, given_after) = products_of_strips(before), products_of_strips(after)
    assert read_after == 0 < read
    # Left are layers with nothing of those before them in their sums.
    assert given_after < given / 2


def test_float_layers_pass_factors_on_as_well(decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = unfolded(decoder, tmp_path / "before", monkeypatch, False), made(decoder, tmp_path / "after", False)
    for expected, found in zip(pictures(before), pictures(after), strict=True):
        assert relative_error(found, expected) < 1e-5
    assert sum(products_of_strips(after)) < sum(products_of_strips(before))


@needs_vnni
def test_codes_are_widened_normalized(decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def normalized_codes(path: Path) -> int:
        norms = [node for node in ir.load(path).graph.all_nodes() if node.op_type == "BatchNormalization"]
        makers = [x.producer() for node in norms if (x := node.inputs[0]) is not None]
        return sum(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)

    before, after = unfolded(decoder, tmp_path / "before", monkeypatch), made(decoder, tmp_path / "after")
    assert normalized_codes(before) > 10
    assert normalized_codes(after) == 0
    for expected, found in zip(pictures(before), pictures(after), strict=True):
        # Only a number on the edge between two codes can differ.
        assert relative_error(found, expected) < 0.02
