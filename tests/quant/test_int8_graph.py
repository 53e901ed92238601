"""Weights in blocks, expanded when a component is opened: the same layer, the same picture but for a hair."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pochade
from pochade.bundle import Bundle
from pochade.errors import BundleInvalidError, CancelledError, DeviceUnavailableError, OutOfBudgetError, UsageError
from pochade.machine import saturates
from pochade.quant.bundle import quantize_bundle
from pochade.quant.component import quantize_component
from pochade.quant.int8_graph import save_int8_graph
from pochade.quant.rtn import channel_scales, round_channels, unpack_blocks
from pochade.quant.scheme import SCHEMES, blocks
from pochade.runtime import expanded, opening
from pochade.runtime.image import save_image
from pochade.runtime.ort import ort
from pochade.runtime.pipeline import Pipeline, Result
from pochade.runtime.providers import Device
from pochade.runtime.receipt import repeat_picture
from tests.quant.graphs import initializers, needs_vnni, operators, relative_error, run, save_linear

INT4 = replace(SCHEMES["int4"], rounding="rtn")
CALL: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 4, "guidance_scale": 3.0, "seed": 5}


@pytest.fixture(scope="module")
def int4(small_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_bundle(small_bundles["monetico-tiny"], tmp_path_factory.mktemp("made") / "int4", INT4).path


@pytest.fixture
def with_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that may overflow are as good as others where only the way to them is looked at."""
    for module in (opening, expanded):
        monkeypatch.setattr(module, "saturates", lambda: False)


def paint(folder: Path, **options: Any) -> tuple[Pipeline, Result]:
    with pochade.load(folder, device="cpu", **options) as pipe:
        return pipe, pipe("a fox", **CALL)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [256, 200])
def test_codes_and_steps_are_those_of_the_stored_weight(bits: int, width: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(bits)
    weight = rng.standard_normal((width, 96)).astype(np.float32)
    weight[:, 3] = 0
    source = save_linear(tmp_path / "float.onnx", weight)
    (tmp_path / "made").mkdir()
    target = tmp_path / "made" / "layer.onnx"
    scheme = replace(INT4, linear=blocks(bits), sensitive_layers=(), min_elements=0)
    quantize_component(source, target, "layer", scheme)
    graph = save_int8_graph(target)
    assert graph is not None
    stored = initializers(target)
    codes, scales = stored[f"w.weight.int{bits}"], stored["w.weight.scales"]
    rows = unpack_blocks(codes.astype(np.uint8), scales.astype(np.float32), bits, width)
    steps = channel_scales(rows, axis=0)
    values = expanded.expanded_weights(target.parent, graph, 1, ort.RunOptions())
    found = {name: value.numpy() for name, value in values.items()}
    np.testing.assert_array_equal(found[f"w.weight.int{bits}.int8"][:, 3], 0)
    steps[3] = found[f"w.weight.int{bits}.steps"][3]  # any that is not zero
    np.testing.assert_allclose(found[f"w.weight.int{bits}.steps"], steps, rtol=1e-6)
    difference = found[f"w.weight.int{bits}.int8"].astype(int) - round_channels(rows, steps[:, None]).T
    # A quotient may lie between two codes, on either side of the middle for a last bit.
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 0.01
    assert graph.weights >= found[f"w.weight.int{bits}.int8"].nbytes
    assert operators(target.parent / graph.file) == ["DynamicQuantizeMatMul"]
    if not saturates():
        x = rng.standard_normal((7, width)).astype(np.float32)
        assert 0 < relative_error(run(target.parent / graph.file, x=x, **found), run(target, x=x)) < 0.02


def test_an_expansion_can_be_stopped(int4: Path) -> None:
    graph = Bundle.open(int4).manifest.components["transformer"].int8
    assert graph is not None
    options = ort.RunOptions()
    options.terminate = True
    with pytest.raises(CancelledError):
        expanded.expanded_weights(int4, graph, 1, options)


def test_layers_that_one_scale_would_spoil_stay_as_they_are(tmp_path: Path) -> None:
    source = save_linear(tmp_path / "float.onnx", np.eye(64, dtype=np.float32))
    (tmp_path / "made").mkdir()
    target = tmp_path / "made" / "layer.onnx"
    quantize_component(source, target, "layer", replace(INT4, min_elements=0))
    assert operators(target) == ["MatMulNBits"]
    assert save_int8_graph(target, lambda name: name != "w.weight") is None
    assert save_int8_graph(target, lambda name: name == "w.weight") is not None


def test_only_what_runs_on_every_step_has_the_graphs(int4: Path) -> None:
    components = Bundle.open(int4).manifest.components
    assert [name for name, component in components.items() if component.int8 is not None] == ["transformer"]
    lora = components["transformer"].lora
    assert lora is not None and lora.int8 is not None


@needs_vnni
def test_pictures_of_expanded_weights_are_told_apart_and_repeated(int4: Path, tmp_path: Path) -> None:
    _, kept = paint(int4, expand="off")
    pipe, result = paint(int4, expand="on")
    assert "expanded" not in kept.settings and result.settings["expanded"] is True
    assert pipe.plan is not None
    assert "expanded to 8 bits" in "".join(pipe.plan.lines())
    # Random weights: near, and not the same.
    agreement = (result.tokens[0] == kept.tokens[0]).mean()
    assert agreement > 0.5
    for name, painted in (("stored", kept), ("expanded", result)):
        path = tmp_path / f"{name}.png"
        save_image(painted.images[0], path, painted.settings)
        assert repeat_picture(path, str(int4)).identical


def test_a_limit_of_memory_decides(int4: Path, with_vnni: None, tmp_path: Path) -> None:
    _, result = paint(int4)
    assert result.settings["expanded"] is True, "8 runs of the transformer are enough"
    large = tmp_path / "large"
    shutil.copytree(int4, large)
    manifest = json.loads((large / "bundle.json").read_text("utf-8"))
    manifest["components"]["transformer"]["int8"]["weights"] = 20 * 10**9
    (large / "bundle.json").write_text(json.dumps(manifest), "utf-8")
    _, result = paint(large, ram="19G")
    assert "expanded" not in result.settings
    with pytest.raises(OutOfBudgetError, match="denoise alone takes"):
        paint(large, ram="19G", expand="on")


def test_few_runs_are_done_before_weights_are_expanded(int4: Path, with_vnni: None) -> None:
    with pochade.load(int4, device="cpu") as pipe:
        assert "expanded" not in pipe("a fox", **CALL | {"num_inference_steps": 1}).settings


def test_adapters_work_on_expanded_weights(int4: Path, with_vnni: None, tmp_path: Path) -> None:
    with pochade.load(int4, device="cpu", expand="on") as pipe:
        plain = pipe("a fox", **CALL)
        pipe.load_lora(write_lora(pipe, tmp_path / "change.safetensors"))
        changed = pipe("a fox", **CALL)
    assert plain.settings["expanded"] is changed.settings["expanded"] is True
    assert not np.array_equal(plain.tokens[0], changed.tokens[0])


def write_lora(pipe: Pipeline, path: Path) -> Path:
    from safetensors.numpy import save_file

    lora = pipe.bundle.manifest.components["transformer"].lora
    assert lora is not None
    layer = lora.layers[0]
    name, width = next(iter(layer.outputs.items()))
    rng = np.random.default_rng(0)
    save_file(
        {
            f"transformer.{name}.lora_A.weight": rng.standard_normal((2, layer.inputs)).astype(np.float32),
            f"transformer.{name}.lora_B.weight": rng.standard_normal((width, 2)).astype(np.float32),
        },
        path,
    )
    return path


def test_what_cannot_be_expanded_says_so(int4: Path, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="transformer has nothing to expand"):
        paint(bundles["monetico-tiny"], expand="on")
    component, card = Bundle.open(int4).manifest.components["transformer"], Device("cuda", required=False)
    assert expanded.resolve_expand("auto", component, False, card, 100) == "off"
    with pytest.raises(UsageError, match="on a CPU alone"):
        expanded.resolve_expand("on", component, False, card, 100)
    with pytest.raises(UsageError, match="expand is 'maybe'; choose auto, on, off"):
        pochade.load(int4, device="cpu", expand="maybe")  # type: ignore[arg-type]
    monkeypatch.setattr(expanded, "saturates", lambda: True)
    with pytest.raises(DeviceUnavailableError, match="needs a processor with VNNI"):
        paint(int4, expand="on")
    assert "expanded" not in paint(int4)[1].settings


def test_a_damaged_expander_is_told(int4: Path, with_vnni: None, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(int4, folder)
    graph = Bundle.open(folder).manifest.components["transformer"].int8
    assert graph is not None
    content = bytearray((folder / graph.expander).read_bytes())
    content[:40] = b"\xff" * 40
    (folder / graph.expander).write_bytes(bytes(content))
    with pytest.raises(BundleInvalidError, match=r"expand\.onnx"):
        paint(folder, expand="on")
