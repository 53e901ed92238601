"""ControlNets of HunyuanDiT: against the reference library, and what is read of both layouts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pochade.errors import InputRefusedError, UsageError
from pochade.export.families.hunyuandit_controlnet import HunyuanControlNet
from pochade.export.recipes import choose, read_recipes
from pochade.export.write import export_checkpoint
from tests import hunyuan, hunyuan_checkpoint

TOLERANCE = 1e-4
STEP, SCALE = 1, 0.7


@pytest.fixture(params=hunyuan.VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def reference(version: str, latent: Tensor, control: Tensor, timestep: float) -> Tensor:
    """What the published network adds, (skips, batch, cells, dim)."""
    text = hunyuan.text_inputs()
    outputs = hunyuan.controlnet(version)(
        latent,
        torch.full((len(latent),), timestep),
        control,
        SCALE,
        encoder_hidden_states=text["text_states"],
        text_embedding_mask=text["text_mask"],
        encoder_hidden_states_t5=text["text_states_2"],
        text_embedding_mask_t5=text["text_mask_2"],
        image_meta_size=hunyuan.meta_sizes(),
        style=torch.zeros(len(latent), dtype=torch.int64),
        image_rotary_emb=tuple(t.repeat_interleave(2, dim=-1) for t in hunyuan.tables(*latent.shape[-2:])),
        return_dict=False,
    )[0]
    return torch.stack(outputs)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 20)])
def test_components_agree_with_the_reference(
    version: str, hunyuan_controlnets: dict[str, tuple[Path, Path]], height: int, width: int
) -> None:
    checkpoint, bundle = hunyuan_controlnets[version]
    told = hunyuan.condition_inputs(version)
    condition, step = HunyuanControlNet.open(checkpoint).plans(torch.float32)
    context, modulation = hunyuan.run(bundle / "condition.onnx", told)
    for found, expected in zip((context, modulation), hunyuan.filled(condition)(*told.values()), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    inputs = hunyuan.step_inputs(context, modulation, STEP, height, width)
    control = torch.randn(inputs["latent"].shape, generator=torch.Generator().manual_seed(8))
    inputs |= {"control": control, "scale": torch.tensor([SCALE])}
    expected = reference(version, inputs["latent"], control, float(told["timesteps"][STEP]))
    (alone,) = hunyuan.run(bundle / "controlnet.onnx", inputs)
    torch.testing.assert_close(alone, expected, rtol=0, atol=TOLERANCE)
    before = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    (added,) = hunyuan.run(bundle / "controlnet.onnx", inputs | {"controls": before})
    torch.testing.assert_close(added, expected + before, rtol=0, atol=TOLERANCE)
    eager = hunyuan.filled(step)(*((inputs | {"controls": before})[name] for name in step.inputs))
    torch.testing.assert_close(eager, expected + before, rtol=0, atol=TOLERANCE)


def test_both_layouts_hold_the_same_net(
    version: str, hunyuan_controlnets: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    file = hunyuan_checkpoint.write_original_controlnet(tmp_path / "pytorch_model_canny_distill.pt", version)
    first, second = HunyuanControlNet.open(hunyuan_controlnets[version][0]), HunyuanControlNet.open(file)
    assert "blocks.0.skip_linear.weight" not in second.layout.weights.keys()  # noqa: SIM118
    for one, other in zip(first.plans(torch.float32), second.plans(torch.float32), strict=True):
        assert one.name == other.name and one.axes == other.axes and one.weights.keys() == other.weights.keys()
        for name, source in one.weights.items():
            torch.testing.assert_close(other.weights[name](), source(), rtol=0, atol=1e-6)


def test_every_weight_is_used(version: str, hunyuan_controlnets: dict[str, tuple[Path, Path]]) -> None:
    plans = HunyuanControlNet.open(hunyuan_controlnets[version][0]).plans(torch.float32)
    named = {name for plan in plans for name in plan.weights}
    folded = {"pos_embed.proj.weight", "pos_embed.proj.bias", "time_extra_emb.style_embedder.weight"}
    folded |= {f"time_extra_emb.extra_embedder.linear_1.{kind}" for kind in ("weight", "bias")}
    assert hunyuan.controlnet(version).state_dict().keys() - folded <= named


@pytest.mark.parametrize(("file", "values"), [("config.json", {"transformer_num_layers": 7}), ("config.json", {})])
def test_a_config_that_is_none(
    hunyuan_controlnets: dict[str, tuple[Path, Path]], tmp_path: Path, file: str, values: dict[str, int]
) -> None:
    folder = Path(shutil.copytree(hunyuan_controlnets["v1.2"][0], tmp_path / "net"))
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | values if values else {}))
    with pytest.raises(InputRefusedError, match=r"is no even number|is missing"):
        HunyuanControlNet.open(folder)


def test_other_networks_are_refused(hunyuan_controlnets: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    torch.save({"mlp_t5.0.weight": torch.zeros(2, 2)}, tmp_path / "x.pt")
    with pytest.raises(InputRefusedError, match="pos_embed"):
        HunyuanControlNet.open(tmp_path / "x.pt")
    with pytest.raises(InputRefusedError, match="the file is missing"):
        HunyuanControlNet.open(tmp_path / "y.pt")
    with pytest.raises(UsageError, match="no text encoder and no transformer to replace"):
        HunyuanControlNet.open(hunyuan_controlnets["v1.2"][0], transformer=tmp_path)


@pytest.mark.parametrize("kind", ["canny", "depth", "pose"])
def test_recipe_is_found_by_config_and_folder(version: str, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / f"HunyuanDiT-{version}-ControlNet-Diffusers-{kind.capitalize()}"
    folder.mkdir()
    sized = {} if version == "v1.1" else {"use_style_cond_and_image_meta_size": False}
    (folder / "config.json").write_text(json.dumps({"_class_name": "HunyuanDiT2DControlNetModel"} | sized))
    recipe = choose(read_recipes(), folder, None)
    assert recipe.name == f"hunyuandit-{version}-controlnet-{kind}" and folder.name in recipe.checkpoint


def test_bundle_says_what_it_is(hunyuan_controlnets: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    manifest = json.loads((hunyuan_controlnets["v1.2"][1] / "bundle.json").read_text())
    assert (manifest["task"], manifest["tokenizer"]) == ("controlnet", None)
    ports = {spec["name"]: spec for spec in manifest["components"]["controlnet"]["inputs"]}
    assert ports["controls"]["optional"] and "optional" not in ports["control"]
    with pytest.raises(InputRefusedError, match="no recipe fits it"):
        export_checkpoint(hunyuan_checkpoint.write_original_controlnet(tmp_path / "c.pt", "v1.2"), tmp_path / "b")
