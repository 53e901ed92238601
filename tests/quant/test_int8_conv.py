"""Convolutions of 8-bit numbers: near the float picture at any number of strips, float where they would overflow."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

import pochade
from pochade.bundle import Bundle
from pochade.component import FREE_AXIS
from pochade.errors import UsageError
from pochade.gpu_graph import save_gpu_graph
from pochade.machine import saturates
from pochade.quant import int8_conv
from pochade.quant.bundle import quantize_bundle
from pochade.quant.component import ComponentReport, quantize_component
from pochade.quant.fidelity import Call, open_pipeline
from pochade.quant.int8_conv import measure_ranges
from pochade.quant.scheme import SCHEMES, STATIC, Scheme, Use
from pochade.quant.surgery import graphs_around
from pochade.runtime import opening
from pochade.runtime.codec_memory import CodecMemory
from pochade.runtime.ort import ort
from pochade.runtime.providers import choose
from tests.quant.graphs import needs_vnni, relative_error, session

ROWS, COLUMNS = 6, 4
SILU_MIN = -0.2785
"""Least value of x * sigmoid(x)."""

ALL = replace(SCHEMES["int8"], min_elements=1, half_layers=False)
IN_HALF = replace(ALL, half_layers=True)


def grids(count: int, seed: int) -> list[Mapping[str, NDArray[np.generic]]]:
    tokens = np.random.default_rng(seed).integers(0, 32, (count, 1, ROWS, COLUMNS))
    return [{"tokens": grid, "strips": np.array([2]), "recompute": np.array(False)} for grid in tokens]


def recorded() -> Sequence[Call]:
    return [Call("vq_decoder", inputs, {}) for inputs in grids(4, 0)]


def quantized(decoder: Path, folder: Path, calls: Sequence[Call], scheme: Scheme = ALL) -> tuple[Path, ComponentReport]:
    folder.mkdir(exist_ok=True)
    target = folder / "vq_decoder.onnx"
    return target, quantize_component(decoder, target, "vq_decoder", scheme, None, calls)


def picture(path: Path, **changed: NDArray[np.generic]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = session(path).run(None, {**grids(1, 1)[0], **changed})[0]
    return found


def kept_types(path: Path) -> Counter[ir.DataType | None]:
    """Types of the layers that Scans give."""
    scans = (node for node in ir.load(path).graph.all_nodes() if node.op_type == "Scan")
    return Counter(value.dtype for node in scans for value in node.outputs if value.shape and len(value.shape) == 4)


def rearranged(path: Path) -> list[ir.Node]:
    return [node for node in ir.load(path).graph.all_nodes() if node.op_type == "DepthToSpace"]


def free_axis_is_read(path: Path) -> bool:
    """Whether a graph asks at run time how long the axis of its free zero points is."""
    return any((node.name or "").startswith(FREE_AXIS) for node in ir.load(path).graph.all_nodes())


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(path).graph.all_nodes())


def test_ranges_are_those_of_the_float_graph(decoder: Path) -> None:
    ranges = measure_ranges(decoder, recorded())
    inner = ranges["decoder.mid_block.resnets.0.conv1.weight"]
    assert SILU_MIN <= inner.given[0] < 0 < inner.given[1]
    assert inner.result[0] < inner.result[1]
    # A part of the calls has a part of the range.
    fewer = measure_ranges(decoder, recorded()[:1])["decoder.mid_block.resnets.0.conv1.weight"]
    assert inner.given[0] <= fewer.given[0] and fewer.given[1] <= inner.given[1]
    last = ranges["decoder.conv_out.weight"].result
    shown = [session(decoder).run(None, dict(call.inputs))[0] for call in recorded()]
    assert last == pytest.approx((min(p.min() for p in shown), max(p.max() for p in shown)), rel=1e-3)


@needs_vnni
def test_pictures_stay_near_at_any_number_of_strips(decoder: Path, tmp_path: Path) -> None:
    path, report = quantized(decoder, tmp_path, recorded())
    assert report.convolutions == report.counts["static int8"] > 10
    exact = picture(decoder)
    ways = [(count, small) for small in (False, True) for count in (1, 3, ROWS)]
    found = [picture(path, strips=np.array([count]), recompute=np.array(small)) for count, small in ways]
    for each in found:
        assert 0 < relative_error(each, exact) < 0.1
        # Ranges are fixed: only a number on the edge between two codes can differ.
        assert relative_error(each, found[0]) < 0.02


def test_first_last_and_small_kernels_stay_float(decoder: Path, tmp_path: Path) -> None:
    _, report = quantized(decoder, tmp_path, recorded())
    kept = {weight.name: weight.storage for weight in report.weights if weight.use is Use.CONV}
    assert STATIC not in (kept["decoder.conv_in.weight"], kept["decoder.conv_out.weight"])
    assert {storage for name, storage in kept.items() if "conv_shortcut" in name} <= {ALL.conv}
    assert {storage for name, storage in kept.items() if "resnets" in name and "shortcut" not in name} == {STATIC}
    assert {storage for name, storage in kept.items() if "upsamplers" in name} == {STATIC}


def test_without_recorded_runs_convolutions_are_kept_like_others(decoder: Path, tmp_path: Path) -> None:
    path, report = quantized(decoder, tmp_path, ())
    assert report.convolutions == 0 and "QLinearConv" not in operators(path)
    assert {w.storage for w in report.weights if w.name.startswith("decoder.mid_block")} == {ALL.conv}


@pytest.mark.parametrize("scheme", [ALL, IN_HALF])
def test_the_second_graph_multiplies_float32_from_the_same_data(decoder: Path, tmp_path: Path, scheme: Scheme) -> None:
    path, report = quantized(decoder, tmp_path, recorded(), scheme)
    made = save_gpu_graph(path, "float16")
    assert made is not None and made.weights > report.weight_bytes
    expanded = path.with_name(made.file)
    found = operators(expanded)
    assert "QLinearConv" not in found and found["Conv"] == operators(decoder)["Conv"]
    # Cards rearrange no 8-bit numbers.
    assert {use.node.op_type for node in rearranged(expanded) for use in node.outputs[0].uses()} == {"Cast"}
    for small in (False, True):
        other = picture(expanded, recompute=np.array(small))
        assert 0 < relative_error(other, picture(decoder)) < 0.1
    if not saturates():
        # Only a number on the edge between two codes can differ.
        assert relative_error(picture(expanded), picture(path)) < 0.02


@needs_vnni
def test_what_convolutions_give_is_kept_in_8_bits(decoder: Path, tmp_path: Path) -> None:
    path, report = quantized(decoder, tmp_path, recorded(), IN_HALF)
    kept = kept_types(path)
    assert kept.pop(ir.DataType.FLOAT) == 1  # the picture
    assert report.half_layers == kept.total()
    # Inner convolutions of blocks and up-sampling ones; residual sums are too wide.
    assert kept[ir.DataType.UINT8] > 8 and kept[ir.DataType.FLOAT16] > 8
    wide, _ = quantized(decoder, tmp_path / "wide", recorded())
    for small in (False, True):
        for count in (1, 3, ROWS):
            way = {"strips": np.array([count]), "recompute": np.array(small)}
            # Codes are those that would have been widened, which leaves the rounding of sums.
            assert relative_error(picture(path, **way), picture(wide, **way)) < 0.04


def test_codes_move_in_place_of_numbers(decoder: Path, tmp_path: Path) -> None:
    path, _ = quantized(decoder, tmp_path, recorded())
    readers = [use.node for node in rearranged(path) for use in node.outputs[0].uses()]
    assert len(readers) > 1 and {node.op_type for node in readers} == {"DequantizeLinear"}
    for node in (node for graph in ir.load(path).graphs() for node in graph if node.op_type == "QuantizeLinear"):
        source = node.inputs[0]
        assert source is not None
        maker = source.producer()
        assert maker is None or maker.op_type not in ("Concat", "Slice")


@needs_vnni
def test_free_zero_points_are_constant_where_their_axis_is_given(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed, _ = quantized(decoder, tmp_path / "fixed", recorded())
    monkeypatch.setattr(int8_conv, "WIDE", 16)
    path, _ = quantized(decoder, tmp_path / "free", recorded())
    zeros = [node.inputs[2] for node in ir.load(path).graph.all_nodes() if node.op_type == "QLinearConv"]
    free = {zero.name for zero in zeros if zero is not None and not zero.is_initializer()}
    assert 0 < len(free) < len({zero.name for zero in zeros if zero is not None})
    assert np.array_equal(picture(path), picture(fixed))
    # What is left of them once ONNX Runtime has opened the graph.
    for has_tiles, sparing in ((False, False), (True, True), (True, False)):
        monkeypatch.setattr(opening, "has_tiles", lambda has_tiles=has_tiles: has_tiles)
        opened = tmp_path / f"opened{has_tiles}{sparing}.onnx"
        real = ort.SessionOptions

        def writing(opened: Path = opened, real: Any = real) -> Any:
            options = real()
            options.optimized_model_filepath = str(opened)
            return options

        monkeypatch.setattr(ort, "SessionOptions", writing)
        how = opening.Opening(1, {}, None, expanded=False, options=None, sparing=sparing)
        graph = opening._open(path, tmp_path, choose("cpu"), how, True)
        found = graph.run(None, dict(grids(1, 1)[0]))[0]
        monkeypatch.setattr(ort, "SessionOptions", real)
        assert np.array_equal(found, picture(fixed))
        assert free_axis_is_read(opened) is (has_tiles and not sparing)
    expanded = save_gpu_graph(path, "float32")
    assert expanded is not None and not free_axis_is_read(path.with_name(expanded.file))
    assert relative_error(picture(path.with_name(expanded.file)), picture(path)) < 0.02


def test_weights_are_packed_within_branches(decoder: Path, tmp_path: Path) -> None:
    # ONNX Runtime looks one graph around a body, and an If stands between the largest layers and the main graph.
    path, _ = quantized(decoder, tmp_path, recorded())
    model = ir.load(path)
    around = graphs_around(model.graph)
    convolutions = [node for node in model.graph.all_nodes() if node.op_type == "QLinearConv"]
    homes = {around[node.graph].graph for node in convolutions if isinstance(node.graph, ir.Graph)}
    assert len(homes) > 2
    for node in convolutions:
        assert isinstance(node.graph, ir.Graph) and node.inputs[3] is not None
        assert node.inputs[3].graph is around[node.graph].graph or node.inputs[3].is_initializer()


def test_processors_whose_products_overflow_take_the_second_graph(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = quantize_bundle(bundles["monetico-tiny"], tmp_path / "int8", IN_HALF)
    component = bundle.manifest.components["vq_decoder"]
    assert component.quantization is not None and component.quantization["int8_convolutions"] > 10
    assert component.gpu is not None and component.memory is not None
    opened: list[str] = []
    real = opening._open

    def watched(path: Path, *rest: Any, **more: Any) -> Any:
        opened.append(path.name)
        return real(path, *rest, **more)

    monkeypatch.setattr(opening, "_open", watched)
    weights = []
    for overflows in (False, True):
        monkeypatch.setattr(opening, "saturates", lambda overflows=overflows: overflows)
        weights.append(CodecMemory(component, 16)._weights)
        for threads in (1, 2):
            with pochade.load(bundle.path, device="cpu", threads=threads) as pipe:
                pipe("a red house", num_inference_steps=1, seed=1)
    first, second = component.file, component.gpu.file
    expected = [first, *(part.file for part in component.parts), second, second]
    assert [name for name in opened if name.startswith("vq_decoder")] == expected
    assert weights == [component.memory["weights"], component.gpu.weights]


def test_an_encoder_multiplies_8_bits_only_if_asked(small_bundles: dict[str, Path], tmp_path: Path) -> None:
    scheme = replace(SCHEMES["int8"], min_elements=1)
    made = {
        name: quantize_bundle(small_bundles["monetico-tiny"], tmp_path / name, replace(scheme, int8_encoder=wanted))
        for name, wanted in (("float", False), ("rounded", True))
    }
    counts = {
        name: {n: (c.quantization or {}).get("int8_convolutions", 0) for n, c in bundle.manifest.components.items()}
        for name, bundle in made.items()
    }
    assert counts["float"]["vq_encoder"] == 0 < counts["rounded"]["vq_encoder"]
    assert counts["float"]["vq_decoder"] == counts["rounded"]["vq_decoder"] > 0
    encoder = made["rounded"].manifest.components["vq_encoder"]
    kernels = Counter(node.op_type for node in ir.load(made["rounded"].path / encoder.file).graph.all_nodes())
    # What comes first and last, and what finds the nearest code, stays float.
    assert kernels["QLinearConv"] == counts["rounded"]["vq_encoder"] and kernels["Conv"] >= 3
    assert encoder.gpu is not None
    scorecard = made["rounded"].manifest.scorecard
    assert scorecard is not None and scorecard["components"]["vq_encoder"]["agreement"] > 0.5


@needs_vnni
def test_an_encoder_gives_the_same_codes_at_any_number_of_strips(
    small_bundles: dict[str, Path], tmp_path: Path
) -> None:
    source = small_bundles["monetico-tiny"]
    scheme = replace(SCHEMES["int8"], min_elements=1, int8_encoder=True, int8_codec=False)
    made = quantize_bundle(source, tmp_path / "made", scheme)
    image = np.random.default_rng(0).random((1, 3, 96, 64), np.float32) * 2 - 1
    found = []
    with open_pipeline(made) as pipe, open_pipeline(Bundle.open(source)) as exact:
        for count in (1, 2, 3):
            inputs = {"image": image, "strips": np.array([count])}
            found.append(pipe.run_component("vq_encoder", inputs)["tokens"])
        expected = exact.run_component("vq_encoder", inputs)["tokens"]
    for other in found[1:]:
        assert (other == found[0]).mean() > 0.95
    # Of random codes many are nearly as near.
    assert (found[0] == expected).mean() > 0.5


def test_a_bundle_without_an_encoder_says_so(small_bundles: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(small_bundles["monetico-tiny"], folder)
    manifest = json.loads((folder / "bundle.json").read_text("utf-8"))
    encoder = manifest["components"].pop("vq_encoder")
    gone = {encoder["file"], *encoder["external_data"]}
    manifest["files"] = [entry for entry in manifest["files"] if entry["path"] not in gone]
    for path in gone:
        (folder / path).unlink()
    (folder / "bundle.json").write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(UsageError, match="has no encoder of pictures"):
        quantize_bundle(folder, tmp_path / "made", replace(SCHEMES["int8"], int8_encoder=True))
