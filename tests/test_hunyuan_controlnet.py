"""HunyuanDiT with ControlNets, from checkpoints to a picture, against the reference pipeline with the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

import pochade
from pochade.bundle import Bundle
from pochade.cli import main
from pochade.errors import OutOfBudgetError, UsageError
from pochade.quant.bundle import quantize_bundle
from pochade.quant.fidelity import Recorder, open_pipeline
from pochade.quant.scheme import SCHEMES
from pochade.quant.trial import record_calibration, small_settings
from pochade.runtime.families.hunyuandit_memory import MemoryModel
from pochade.runtime.pipeline import Pipeline, Result
from pochade.runtime.plan import Workload
from tests import hunyuan
from tests.hunyuan_reference import NEGATIVE, PROMPT, reference

Folders = dict[str, tuple[Path, Path]]
SQUARE, WIDE = (64, 64), (96, 64)
TOLERANCE = 2e-4
"""Of latents whose deviation is about 1, after a whole run; as without ControlNets."""
SMALL: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 3}


def picture(size: tuple[int, int], quality: int = 20) -> Image.Image:
    """Something to follow."""
    return Image.effect_mandelbrot(size, (-2, -1, 1, 1), quality).convert("RGB")


def load(bundles: Folders, nets: Sequence[Path], version: str = "v1.2", **given: Any) -> Pipeline:
    return pochade.load(bundles[version][1], device="cpu", threads=1, controlnets=nets, **given)


def pochade_net(folder: Path) -> Pipeline:
    """The net by itself."""
    return open_pipeline(Bundle.open(folder))


def latents(pipe: Pipeline, **given: Any) -> tuple[NDArray[np.float32], Result]:
    """Latents that the codec is given, and the result."""
    recorder = Recorder()
    pipe.observer = recorder
    result = pipe(PROMPT, negative_prompt=NEGATIVE, **given)
    return recorder.calls[-1].inputs["latent"], result


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of the reference's own
@pytest.mark.parametrize(
    ("version", "size", "scales"),
    [("v1.2", SQUARE, [0.8]), ("v1.2", WIDE, [0.5, 1.3]), ("v1.1", WIDE, [1.0]), ("v1.1", SQUARE, [0.6, 0.4])],
)
def test_runs_equal_the_reference(
    hunyuan_bundles: Folders,
    hunyuan_controlnets: Folders,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    size: tuple[int, int],
    scales: list[float],
) -> None:
    """One net, and two whose pictures differ."""
    count = len(scales)
    images = [picture(size, 20 + 30 * i) for i in range(count)]
    given: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0}
    with load(hunyuan_bundles, [hunyuan_controlnets[version][1]] * count, version) as pipe:
        ours: dict[str, Any] = {"control_image": images, "controlnet_conditioning_scale": scales}
        found, result = latents(pipe, width=size[0], height=size[1], seed=3, sampler="ddpm", **given, **ours)
    nets = [hunyuan.controlnet(version) for _ in range(count)]
    one = count == 1
    given |= {
        "control_image": images[0] if one else images,
        "controlnet_conditioning_scale": scales[0] if one else scales,
    }
    expected = reference(hunyuan_bundles[version][0], version, "ddpm", size, monkeypatch, nets=nets, **given)
    np.testing.assert_allclose(found / expected.std(), expected / expected.std(), rtol=0, atol=TOLERANCE)
    assert result.settings["controlnets"] == [version] * count
    assert result.settings["controlnet_conditioning_scale"] == scales
    names = {"controlnet", "condition_2"} | ({"controlnet_2", "condition_3"} if count == 2 else set())
    assert names <= result.providers.keys() and names <= result.components.keys()


def test_nets_take_part_only_where_there_is_a_picture(hunyuan_bundles: Folders, hunyuan_controlnets: Folders) -> None:
    with load(hunyuan_bundles, [hunyuan_controlnets["v1.2"][1]]) as pipe:
        without, result = latents(pipe, **SMALL)
        assert result.settings["controlnets"] is None and "controlnet" not in result.providers
        none, _ = latents(pipe, **SMALL, control_image=picture(SQUARE), controlnet_conditioning_scale=0.0)
        followed, _ = latents(pipe, **SMALL, control_image=picture(SQUARE))
        # The picture may have any size and mode.
        grey, _ = latents(pipe, **SMALL, control_image=picture((200, 100)).convert("L"), image=picture(SQUARE))
    with load(hunyuan_bundles, []) as pipe:
        plain, _ = latents(pipe, **SMALL)
    assert (without == plain).all()
    np.testing.assert_allclose(none, plain, rtol=0, atol=1e-6)
    assert np.abs(followed - plain).max() > 0.1 and np.abs(grey - plain).max() > 0.1


@pytest.mark.parametrize(
    ("count", "given", "reason"),
    [
        (0, {"control_image": picture(SQUARE)}, "a control image needs a ControlNet to read it"),
        (1, {"controlnet_conditioning_scale": 1.0}, "how strictly to follow control_image; give that too"),
        (1, {"control_image": [picture(SQUARE)] * 2}, "2 control images for 1 ControlNets"),
        (2, {"control_image": [picture(SQUARE)]}, "1 control images for 2 ControlNets"),
        (1, {"control_image": picture(SQUARE), "controlnet_conditioning_scale": [1.0, 1.0]}, "2 scales for 1"),
        (1, {"control_image": picture(SQUARE), "controlnet_conditioning_scale": -1}, "conditioning_scale is -1"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    hunyuan_bundles: Folders, hunyuan_controlnets: Folders, count: int, given: dict[str, Any], reason: str
) -> None:
    nets = [hunyuan_controlnets["v1.2"][1]] * count
    with load(hunyuan_bundles, nets) as pipe, pytest.raises(UsageError, match=reason):
        pipe(PROMPT, **SMALL, **given)


def test_bundles_that_do_not_go_together(hunyuan_bundles: Folders, hunyuan_controlnets: Folders) -> None:
    net = hunyuan_controlnets["v1.1"][1]
    with pytest.raises(UsageError, match=r"it is for HunyuanDiT up to 1\.1, and .* is HunyuanDiT 1\.2; take the net"):
        load(hunyuan_bundles, [net])
    with pytest.raises(UsageError, match="is no ControlNet but a bundle of hunyuandit"):
        load(hunyuan_bundles, [hunyuan_bundles["v1.2"][1]])
    with pytest.raises(UsageError, match="a model of meissonic, takes no ControlNet; leave"):
        pochade.load("starter", device="cpu", controlnets=[net])
    with pytest.raises(UsageError, match="is a ControlNet, which paints nothing by itself; give it beside a model"):
        pochade.load(net, device="cpu")


def test_memory_is_planned_for_the_nets(hunyuan_bundles: Folders, hunyuan_controlnets: Folders) -> None:
    model, net = hunyuan_bundles["v1.2"][1], hunyuan_controlnets["v1.2"][1]
    work = Workload(rows=128, columns=128, steps=4, texts=2, images=1, encodes=True)
    loops = []
    for count in range(4):
        memory = MemoryModel.of(Bundle.open(model), 8, [Bundle.open(net)] * count)
        assert memory is not None
        loops.append(memory.ways(work, "auto", 0)["denoise"][0].peak)
    grown = np.diff(loops)
    half, width = hunyuan.TRANSFORMER["num_layers"] // 2, hunyuan.TRANSFORMER["hidden_size"]
    weights, added = Bundle.open(net).manifest.components["controlnet"].memory or {}, half * 64 * 64 * width * 4
    # What is added is kept twice, and once more when another net goes on from it. Conditions are small beside it.
    assert np.allclose(grown, weights["weights"] + np.array([added, added, 0]), rtol=0.05)
    with load(hunyuan_bundles, [net]) as pipe:
        pipe(PROMPT, **SMALL, control_image=picture(SQUARE))
        assert pipe.plan is not None and "encode" in pipe.plan.phases
    with load(hunyuan_bundles, [net], ram="1M") as pipe, pytest.raises(OutOfBudgetError):
        pipe(PROMPT, **SMALL, control_image=picture(SQUARE))


def test_adapters_change_the_model_and_not_the_nets(
    hunyuan_bundles: Folders, hunyuan_controlnets: Folders, tmp_path: Path
) -> None:
    """A net of scale 0 changes nothing of what an adapter does, and one of scale 1 is itself with it."""
    generator = torch.Generator().manual_seed(1)
    width, key = hunyuan.TRANSFORMER["hidden_size"], "transformer.blocks.0.attn1.to_out.0"
    parts = {f"{key}.lora_A.weight": (4, width), f"{key}.lora_B.weight": (width, 4)}
    tensors = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in parts.items()}
    save_file(tensors, tmp_path / "style.safetensors")
    with load(hunyuan_bundles, [hunyuan_controlnets["v1.2"][1]]) as pipe:
        followed, _ = latents(pipe, **SMALL, control_image=picture(SQUARE))
        pipe.load_lora(tmp_path / "style.safetensors")
        alone, _ = latents(pipe, **SMALL)
        none, _ = latents(pipe, **SMALL, control_image=picture(SQUARE), controlnet_conditioning_scale=0.0)
        recorder = Recorder()
        pipe.observer = recorder
        pipe(PROMPT, **SMALL, control_image=picture(SQUARE), guidance_scale=1.0)
    np.testing.assert_allclose(none, alone, rtol=0, atol=1e-5)
    assert np.abs(followed - alone).max() > 0.1
    call = next(call for call in recorder.calls if call.component == "controlnet")
    with pochade_net(hunyuan_controlnets["v1.2"][1]) as net:
        found = net.run_component("controlnet", call.inputs)["sums"]
    np.testing.assert_allclose(found, call.outputs["sums"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("scheme", "least"), [("int8", 30.0), ("int4", 20.0)])
def test_quantized_nets(
    hunyuan_bundles: Folders, hunyuan_controlnets: Folders, tmp_path: Path, scheme: str, least: float
) -> None:
    """In dB, on random weights: sane, not good."""
    net = hunyuan_controlnets["v1.2"][1]
    made = quantize_bundle(net, tmp_path / scheme, SCHEMES[scheme])
    card = made.manifest.scorecard
    assert card is not None and card["settings"] == {"inputs": "random", "seed": 7, "reference": net.name}
    assert card["pipeline"] == {} and min(row["snr_db"] for row in card["components"].values()) > least
    step = made.manifest.components["controlnet"]
    assert step.precision == scheme and [spec.name for spec in step.inputs if spec.optional] == ["controls"]
    found = []
    for folder in (net, made.path):
        with load(hunyuan_bundles, [folder]) as pipe:
            found.append(latents(pipe, **SMALL, control_image=picture(SQUARE))[0])
    assert 0 < np.abs(found[0] - found[1]).max() < 0.5
    if scheme == "int4":
        weights = [
            node.input[1] for node in onnx.load(made.path / "controlnet.onnx").graph.node if node.op_type == "MatMul"
        ]
        assert weights == ["patch_in.weight.T"] * 2


def test_what_reads_no_prompts_is_not_calibrated_with_any(hunyuan_controlnets: Folders) -> None:
    net = Bundle.open(hunyuan_controlnets["v1.2"][1])
    with pytest.raises(UsageError, match="reads no prompts to calibrate with; leave --calibration away"):
        record_calibration(net, ["a fox"], lambda *_: None)
    with pytest.raises(UsageError, match="a controlnet, paints no picture by itself; measure its model"):
        small_settings(net)


def test_commands(
    hunyuan_bundles: Folders, hunyuan_controlnets: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, net, file = (
        str(p) for p in (hunyuan_bundles["v1.2"][1], hunyuan_controlnets["v1.2"][1], tmp_path / "控.png")
    )
    picture((80, 60)).save(file)
    painted = str(tmp_path / "画.png")
    small = ["generate", PROMPT, "-m", model, "--size", "64x64", "--steps", "2", "--device", "cpu", "-o", painted]
    control = ["--controlnet", net, "--control-image", file]
    assert main([*small, *control, "--control-strength", "0.7", "--control-preprocess", "canny"]) == 0
    assert main(["verify", painted, "--model", model]) == 6
    assert "follows a control image, which it does not carry" in capsys.readouterr().err
    assert main([*small, *control, *control, "--control-strength", "0.7", "--control-strength", "0.2"]) == 0
    capsys.readouterr()
    for flags, reason in (
        (["--controlnet", net], "--controlnet needs a picture to follow"),
        (["--control-strength", "1"], "--control-strength needs a picture to follow"),
        (["--control-image", file], "a control image needs a ControlNet"),
        ([*control, "--control-strength", "99"], "controlnet_conditioning_scale is 99"),
    ):
        assert main([*small, *flags]) == 2
        assert reason in capsys.readouterr().err
    assert main([*small[:3], net, *small[4:]]) == 2
    assert "is a ControlNet, which paints nothing by itself" in capsys.readouterr().err
    assert main(["bench", net]) == 2
    assert "paints no picture by itself" in capsys.readouterr().err
    assert main(["info", net]) == 0
    assert "controlnet" in capsys.readouterr().out
