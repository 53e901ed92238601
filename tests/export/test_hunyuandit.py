"""HunyuanDiT checkpoints in both layouts: what is read of them, and one test per refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort
import pytest
import torch

from pochade.benchmarks.random_hunyuandit import BETA_END
from pochade.errors import InputRefusedError, UsageError
from pochade.export.families.hunyuandit import HunyuanDiT
from pochade.export.trace import save
from tests import hunyuan, hunyuan_checkpoint


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By version, and for Tencent's layout version and `original`."""
    folder = tmp_path_factory.mktemp("检查点")
    published = {v: hunyuan_checkpoint.write_checkpoint(folder / v, v) for v in hunyuan.VERSIONS}
    original = {f"{v} original": hunyuan_checkpoint.write_original(folder / f"{v}o", v) for v in hunyuan.VERSIONS}
    return published | original


@pytest.mark.parametrize("version", hunyuan.VERSIONS)
def test_both_layouts_hold_the_same_model(checkpoints: dict[str, Path], version: str) -> None:
    first, second = (HunyuanDiT.open(checkpoints[name]) for name in (version, f"{version} original"))
    for one, other in zip(first.plans(torch.float32), second.plans(torch.float32), strict=True):
        assert one.name == other.name and one.weights.keys() == other.weights.keys() and one.axes == other.axes
        for name, source in one.weights.items():
            # Where a style is folded into a bias, sums depend on how memory is aligned.
            torch.testing.assert_close(other.weights[name](), source(), rtol=0, atol=1e-6)
    assert first.tokenizer().to_str() == second.tokenizer().to_str()
    for key, expected in first.scheduler_manifest().items():
        assert second.scheduler_manifest()[key] == expected


@pytest.mark.parametrize("version", hunyuan.VERSIONS)
def test_weights_tell_the_version(checkpoints: dict[str, Path], tmp_path: Path, version: str) -> None:
    folder = hunyuan_checkpoint.copy(checkpoints[version], tmp_path / "wrong")
    edit(folder / "transformer" / "config.json", use_style_cond_and_image_meta_size=version == "v1.2")
    manifest = HunyuanDiT.open(folder).scheduler_manifest()
    assert manifest["takes_sizes"] == (version == "v1.1")
    assert manifest["beta_end"] == BETA_END[version]
    condition = next(p for p in HunyuanDiT.open(folder).plans(torch.float32) if p.name == "condition")
    assert ("image_meta_size" in condition.inputs) == (version == "v1.1")


def test_distilled_weights_and_the_inner_folder_are_found(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = hunyuan_checkpoint.copy(checkpoints["v1.2 original"], tmp_path / "distilled")
    model = folder / "t2i" / "model"
    (model / "pytorch_model_ema.pt").rename(model / "pytorch_model_distill.pt")
    assert HunyuanDiT.open(folder / "t2i").layout.weights.where.name == "pytorch_model_distill.pt"


def test_every_component_opens(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The codec and the order; the traced components are run by tests of their own."""
    graphs = dict(HunyuanDiT.open(checkpoints["v1.2"]).graphs(torch.float32))
    names = ["text_encoder", "text_encoder_2", "condition", "transformer", "sampler", "vae_decoder", "vae_encoder"]
    assert list(graphs) == names
    for name in names[-2:]:
        save(graphs[name](), tmp_path / f"{name}.onnx")
        assert ort.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"]).get_inputs()


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def config(part: str, **values: object) -> Callable[[Path], object]:
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    return lambda folder: edit(folder / part / name, **values)


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).rename(folder / "elsewhere")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("text_encoder_2"), "missing text_encoder_2"),
        (without("vae"), "missing vae"),
        (without("tokenizer_2/spiece.model"), "spiece.model"),
        (config("transformer", num_layers=5), "no even number"),
        (config("transformer", num_layers=8), "missing tensor blocks.6"),
        (config("transformer", hidden_size=99), "hidden_size 99 differs"),
        (config("transformer", activation_fn="geglu"), "not gelu-approximate"),
        (config("transformer", norm_type="rms"), "not layer_norm"),
        (config("transformer", cross_attention_dim_t5=60), "no multiple of 8"),
        (config("transformer", attention_head_dim=86, hidden_size=172), "no multiple of 4"),
        (config("transformer", cross_attention_dim=32), "BERT's states are 64 wide, the transformer takes 32"),
        (config("transformer", cross_attention_dim_t5=32), "T5's states are 64 wide, the transformer takes 32"),
        (config("scheduler", beta_end=None), "beta_end None is no number"),
        (config("scheduler", prediction_type="epsilon"), "prediction_type is 'epsilon'"),
    ],
)
def test_checkpoints_that_cannot_be_meant(
    checkpoints: dict[str, Path], tmp_path: Path, change: Callable[[Path], object], reason: str
) -> None:
    folder = hunyuan_checkpoint.copy(checkpoints["v1.2"], tmp_path / "damaged")
    change(folder)
    with pytest.raises(InputRefusedError, match=reason):
        HunyuanDiT.open(folder)


def test_other_folders_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputRefusedError, match="not a folder"):
        HunyuanDiT.open(tmp_path / "nothing")
    with pytest.raises(InputRefusedError, match="missing model, clip_text_encoder"):
        HunyuanDiT.open(tmp_path)
    with pytest.raises(UsageError, match="no other text encoder"):
        HunyuanDiT.open(checkpoints["v1.2"], tmp_path)
    with pytest.raises(UsageError, match="leave --transformer away"):
        HunyuanDiT.open(checkpoints["v1.2"], transformer=tmp_path)
    folder = hunyuan_checkpoint.copy(checkpoints["v1.2 original"], tmp_path / "damaged")
    torch.save({"mlp_t5.0.weight": torch.zeros(2, 2)}, folder / "t2i" / "model" / "pytorch_model_ema.pt")
    with pytest.raises(InputRefusedError, match=r"no HunyuanDiT: tensor 'pos_embed.proj.weight' is missing"):
        HunyuanDiT.open(folder)
    (folder / "t2i" / "model" / "pytorch_model_ema.pt").unlink()
    with pytest.raises(InputRefusedError, match=r"none of pytorch_model_ema.pt"):
        HunyuanDiT.open(folder)
