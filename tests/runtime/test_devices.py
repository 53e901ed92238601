"""Devices: WebGPU as a plug-in, components that a card has no kernels for, and phases that a card has no room for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pochade
from pochade.cli import main
from pochade.errors import DeviceUnavailableError, OutOfBudgetError, UsageError
from pochade.quant.bundle import quantize_bundle
from pochade.quant.scheme import SCHEMES
from pochade.runtime import webgpu
from pochade.runtime.ort import ort
from pochade.runtime.placement import CPU as CPU_PROVIDER
from pochade.runtime.placement import Placement, judge
from pochade.runtime.plan import ON_CPU
from pochade.runtime.probe import FLOAT, FLOAT16
from pochade.runtime.providers import PROVIDERS, WIDE_SPLIT, Device, choose, fix
from pochade.runtime.session import UNCAPTURED, ComponentSession
from tests.cards import Pretended, pretend

CALL: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 4.0, "seed": 3}


# WebGPU


def test_without_its_plug_in_the_fix_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(webgpu, "is_installed", lambda: False)
    with pytest.raises(DeviceUnavailableError, match=r"plug-in is not installed; pip install \"pochade\[webgpu\]\""):
        choose("webgpu")
    assert main(["generate", "a fox", "--device", "webgpu", "-o", "unused.png"]) == 4
    assert "device webgpu cannot be had" in capsys.readouterr().err


def test_an_onnxruntime_without_plug_ins_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webgpu, "is_installed", lambda: True)
    monkeypatch.setattr(webgpu, "ort", SimpleNamespace(__version__="1.20"))
    assert webgpu.why_not_webgpu() == "onnxruntime 1.20 takes no plug-ins"


def test_a_plug_in_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("libvulkan.so.1:\nno such file")

    monkeypatch.setattr(webgpu, "is_installed", lambda: True)
    monkeypatch.setattr(webgpu, "_cards", refuse)
    assert webgpu.why_not_webgpu() == "its plug-in cannot be loaded: libvulkan.so.1: no such file"
    assert "Vulkan" in str(fix("webgpu", ""))


def test_the_real_plug_in_is_registered_and_asked() -> None:
    pytest.importorskip("onnxruntime_ep_webgpu")
    reason = webgpu.why_not_webgpu()
    cards = webgpu._cards()
    assert all(card.ep_name == PROVIDERS["webgpu"] for card in cards)
    if not cards:
        assert reason == webgpu.NO_CARD
        with pytest.raises(DeviceUnavailableError, match="device webgpu cannot be had: no graphics card is seen"):
            choose("webgpu")


def test_indices_on_the_cpu_leave_a_component_on_the_card() -> None:
    place = PROVIDERS["webgpu"]
    found = judge(place, [(place, "MatMul"), (CPU_PROVIDER, "NonZero"), (CPU_PROVIDER, "ScatterElements")])
    assert found.is_covered and str(found) == f"{place}, but NonZero, ScatterElements on {CPU_PROVIDER}"
    assert not Placement(place, 5, {"Scan": 1, "QLinearConv": 3}).is_covered


def test_a_component_without_kernels_is_computed_on_the_cpu_and_told(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pochade.load(bundles["monetico-tiny"], device="cpu") as pipe:
        expected = pipe("a fox", **CALL)
    card = pretend(monkeypatch, "webgpu", {"vq_decoder": ["QLinearConv", "QLinearConv"], "sampler": ["NonZero"]})
    with pochade.load(bundles["monetico-tiny"]) as pipe:
        found = pipe("a fox", **CALL)
    assert {name.split(".")[0] for name in card.opened} == set(found.providers)
    assert found.providers["vq_decoder"] == CPU_PROVIDER
    assert found.providers["sampler"] == f"{PROVIDERS['webgpu']}, but NonZero on {CPU_PROVIDER}"
    assert found.providers["transformer"] == PROVIDERS["webgpu"]
    assert found.notes == ("vq_decoder is computed on the CPU: webgpu has no kernels for 2 QLinearConv",)
    assert found.settings["device"] == "webgpu" and found.settings["providers"] == found.providers
    assert "providers" not in expected.settings
    assert np.array_equal(found.tokens, expected.tokens)


def test_codecs_that_keep_float16_are_computed_on_the_cpu_where_the_card_has_none(
    small_bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = quantize_bundle(small_bundles["monetico-tiny"], tmp_path / "int8", SCHEMES["int8"]).path
    pretend(monkeypatch, "webgpu", {})
    real = ComponentSession.__init__

    def without_half(
        session: ComponentSession, bundle: Any, name: str, device: Device, *rest: Any, **more: Any
    ) -> None:
        real(session, bundle, name, replace(device, half=False), *rest, **more)

    monkeypatch.setattr(ComponentSession, "__init__", without_half)
    with pochade.load(made) as pipe:
        found = pipe("a fox", **CALL)
    assert found.providers["vq_decoder"] == CPU_PROVIDER
    assert found.providers["transformer"] == PROVIDERS["webgpu"]
    assert found.notes == (
        "vq_decoder is computed on the CPU: webgpu has no float16 on this card, and it keeps layers so",
    )


def test_codecs_compute_in_one_piece_where_loops_run_on_the_cpu(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pochade.runtime.strips.GPU_STRIP_PIXELS", 1)
    counts = {}
    for name in ("cuda", "webgpu"):
        pretend(monkeypatch, name, {})
        with pochade.load(bundles["monetico-tiny"]) as pipe:
            pipe.observer = lambda component, inputs, _, name=name: counts.update(
                {name: int(inputs["strips"][0])} if component == "vq_decoder" else {}
            )
            pipe("a fox", **CALL)
    assert counts["webgpu"] == 1 < counts["cuda"]


def test_what_all_steps_read_is_brought_once(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    card = pretend(monkeypatch, "webgpu", {"condition": ["Sin"]})
    with pochade.load(bundles["monetico-tiny"]) as pipe:
        pipe("a fox", **CALL | {"num_inference_steps": 5})
        context = next(spec for spec in pipe.bundle.manifest.components["condition"].outputs if spec.name == "context")
    # Of prompt and negative prompt: one that `condition`, on the CPU, gave, once each.
    assert card.brought.count((1, *map(int, context.shape[1:]))) == 2


# CUDA graphs


def test_passes_of_the_transformer_are_captured_by_text(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, real, runs = ["a fox", "a hen"], ComponentSession._run, []

    def listen(session: ComponentSession, binding: Any, graph: int) -> None:
        runs.append((session.component.name, graph))
        real(session, binding, graph)

    with pochade.load(bundles["monetico-tiny"], device="cpu") as pipe:
        expected = pipe(prompts, **CALL)
    card = pretend(monkeypatch, "cuda", {})
    monkeypatch.setattr(ComponentSession, "_run", listen)
    with pochade.load(bundles["monetico-tiny"], cuda_graphs=True) as pipe:
        found = pipe(prompts, **CALL)
    assert card.captured == ["transformer.gpu.onnx"]
    # Two steps of each; both have the negative prompt in common.
    assert [graph for name, graph in runs if name == "transformer"] == [1, 2, 1, 2, 3, 2, 3, 2]
    # Draws are made anew by each run, so that a preview can look at them.
    assert {graph for name, graph in runs if name != "transformer"} == {UNCAPTURED}
    assert np.array_equal(found.tokens, expected.tokens)


def test_a_session_on_cuda_is_told_to_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(ort, "InferenceSession", lambda *_, **options: given.append(options))
    for captures in (False, True):
        Device("cuda", required=True).open(b"", ort.SessionOptions(), captures)
    assert ["enable_cuda_graph" in options["providers"][0][1] for options in given] == [False, True]
    assert [options["disabled_optimizers"] for options in given] == [None, [WIDE_SPLIT]]


@pytest.mark.parametrize("device", ["cpu", "webgpu"])
def test_graphs_of_cuda_are_refused_elsewhere(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    if device == "webgpu":
        pretend(monkeypatch, device, {})
    with pytest.raises(UsageError, match=f"need device cuda, not {device}"):
        pochade.load(bundles["monetico-tiny"], device=device, cuda_graphs=True)


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="the GPU flavour is installed")
def test_graphs_of_cuda_without_a_card_are_told(bundles: dict[str, Path]) -> None:
    with pochade.load(bundles["monetico-tiny"], cuda_graphs=True) as pipe:
        assert pipe("a fox", **CALL).notes == ("painted on the CPU: there is no card that CUDA graphs could run on",)


def test_attention_that_is_wrong_stays_on_the_cpu(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real = Pretended.get_provider_graph_assignment_info

    def with_attention(session: Pretended) -> list[Any]:
        node = SimpleNamespace(op_type="MultiHeadAttention")
        return [*real(session), SimpleNamespace(ep_name=PROVIDERS["webgpu"], get_nodes=lambda: [node])]

    monkeypatch.setattr(Pretended, "get_provider_graph_assignment_info", with_attention)
    for attends in (True, False):
        pretend(monkeypatch, "webgpu", {}, attends=attends)
        with pochade.load(bundles["monetico-tiny"]) as pipe:
            found = pipe("a fox", **CALL)
        assert (found.providers["transformer"] == PROVIDERS["webgpu"]) is attends
        told = "transformer is computed on the CPU: webgpu computes attention wrongly on this card"
        assert (told in found.notes) is not attends


@pytest.mark.parametrize("element", [FLOAT, FLOAT16])
def test_attention_is_tried_on_what_it_has_to_give(monkeypatch: pytest.MonkeyPatch, element: int) -> None:
    """The CPU's is right; what leaves out keys is not."""

    def on_cpu(model: bytes, _options: Any) -> Any:
        return ort.InferenceSession(model, providers=[CPU_PROVIDER])

    monkeypatch.setattr(webgpu, "open_on_card", on_cpu)
    webgpu.attends_correctly.cache_clear()
    assert webgpu.attends_correctly(element)

    def forgetful(model: bytes, options: Any) -> Any:
        session = on_cpu(model, options)

        def run(_names: None, feeds: dict[str, Any]) -> Any:
            values = feeds["values"].copy()
            values[:, 64:] = 0
            return session.run(None, {**feeds, "values": values})

        return SimpleNamespace(run=run)

    monkeypatch.setattr(webgpu, "open_on_card", forgetful)
    webgpu.attends_correctly.cache_clear()
    assert not webgpu.attends_correctly(element)
    webgpu.attends_correctly.cache_clear()


def test_a_card_without_float16_gets_graphs_in_float32(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = {}
    for half in (True, False):
        card = pretend(monkeypatch, "webgpu", {}, half=half)
        with pochade.load(bundles["monetico-tiny"]) as pipe:
            pipe("a fox", **CALL)
        taken[half] = {name.split(".")[0]: name for name in card.opened}
    assert taken[True]["transformer"] == "transformer.gpu.onnx"
    assert taken[False]["transformer"] == "transformer.onnx"
    # Its second graph is in float32.
    components = pochade.load(bundles["monetico-tiny"]).bundle.manifest.components
    wide = [name for name, component in components.items() if component.gpu and component.gpu.dtype == "float32"]
    assert all(taken[False][name] == f"{name}.gpu.onnx" for name in wide if name in taken[False])


# A card that is too small


def test_phases_that_do_not_fit_a_card_run_on_the_cpu(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = pretend(monkeypatch, "cuda", {})
    folder = bundles["monetico-tiny"]
    with pochade.load(folder, vram="4G") as pipe:
        whole = pipe("a fox", **CALL)
        assert whole.notes == () and pipe.plan is not None
        peaks = {name: way.peak for name, way in pipe.plan.phases.items()}
    assert {name.split(".")[0] for name in card.opened} == set(whole.providers)
    limit = peaks["denoise"]
    card.opened.clear()
    assert peaks["decode"] > limit, "the test needs a decoder that takes more than the loop"
    with pochade.load(folder, vram=limit) as pipe:
        split = pipe("a fox", **CALL)
        assert pipe.plan is not None and pipe.plan.phases["decode"] == ON_CPU
        assert any("decode" in line and "on the CPU, as the card has too" in line for line in pipe.plan.lines())
        assert pipe.plan.peak <= limit
    assert "vq_decoder.onnx" not in card.opened and "transformer.gpu.onnx" in card.opened
    assert split.providers["vq_decoder"] == CPU_PROVIDER
    assert "vq_decoder runs on the CPU, as the card has too little memory" in split.notes
    assert np.array_equal(whole.tokens, split.tokens)
    with pochade.load(folder, vram=limit - 1) as pipe, pytest.raises(OutOfBudgetError, match="and denoise alone takes"):
        pipe("a fox", **CALL)


def test_a_preview_is_decoded_where_the_plan_wants_it(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = pretend(monkeypatch, "cuda", {})
    with pochade.load(bundles["monetico-tiny"], vram="4G") as pipe:
        pipe.stream("a fox", **CALL)
        assert pipe.plan is not None
        limit = pipe.plan.phases["denoise"].peak
    with pochade.load(bundles["monetico-tiny"], vram=limit) as pipe:
        events = pipe.stream("a fox", **CALL)
        event = next(events)
        assert event.preview().size == (64, 64)  # type: ignore[union-attr]
        events.close()  # type: ignore[attr-defined]
    assert not [name for name in card.opened if name.startswith("vq_decoder")]
