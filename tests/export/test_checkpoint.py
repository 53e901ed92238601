"""Checkpoint folders: the layouts that are read, and one test per refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pochade.errors import InputRefusedError, OutputError, UsageError
from pochade.export.families.meissonic import Meissonic
from pochade.export.recipes import choose, read_recipes
from pochade.export.write import export_checkpoint
from tests.golden import GOLDEN

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "检查点"
    shutil.copytree(GOLDEN / "monetico-tiny", target)
    return target


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def reload(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def shard(folder: Path, count: int) -> None:
    tensors = load_file(folder / WEIGHTS)
    keys = sorted(tensors)
    names = {key: f"diffusion_pytorch_model-{i % count + 1:05}-of-{count:05}.safetensors" for i, key in enumerate(keys)}
    for name in set(names.values()):
        save_file({key: tensors[key] for key in keys if names[key] == name}, folder / "transformer" / name)
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / WEIGHTS).unlink()


def test_sharded_checkpoint_gives_the_same_tensors(folder: Path) -> None:
    whole = Meissonic.open(folder).transformer_weights
    expected = {key: whole[key].clone() for key in whole.keys()}  # noqa: SIM118
    shard(folder, 3)
    found = Meissonic.open(folder).transformer_weights
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_load(folder: Path, dtype: torch.dtype) -> None:
    reload(folder, lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()}))
    plan = next(p for p in Meissonic.open(folder).plans(torch.float32) if p.name == "transformer")
    assert plan.weights["cell_table"]().dtype == torch.float32
    assert plan.weights["project_to_hidden.weight"]().dtype == dtype


def test_fp16_copy_is_taken_when_it_is_alone(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
    assert Meissonic.open(folder).transformer_weights.keys()


def test_foreign_parts_of_a_clip_file_are_passed_over(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    extra = {
        "vision_model.x": torch.zeros(1),
        "logit_scale": torch.zeros(1),
        "visual_projection.weight": torch.zeros(1),
    }
    save_file(load_file(path) | extra, path)
    Meissonic.open(folder)


def test_all_wrong_tensors_are_listed_at_once(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["project_to_hidden.weight"]
        del tensors["embed.conv.weight"]
        tensors["surprise"] = torch.zeros(1)
        tensors["context_embedder.weight"] = torch.zeros(3, 5)

    reload(folder, change)
    with pytest.raises(InputRefusedError) as caught:
        Meissonic.open(folder)
    assert set(caught.value.faults) == {
        "missing tensor project_to_hidden.weight",
        "missing tensor embed.conv.weight",
        "unexpected tensor surprise",
        "tensor context_embedder.weight has shape [3, 5], expected [48, 32]",
    }


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def lie_about_offsets(path: Path) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first = next(key for key in header if key != "__metadata__")
    header[first]["data_offsets"] = [0, 10**12]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def lie_about_the_header(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, lie_about_offsets, lie_about_the_header, empty])
def test_damaged_safetensors_are_refused(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder / WEIGHTS)
    with pytest.raises(InputRefusedError, match="no intact safetensors file"):
        Meissonic.open(folder)


def test_missing_shard_is_named(folder: Path) -> None:
    shard(folder, 2)
    (folder / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputRefusedError, match=r"shard diffusion_pytorch_model-00002-\S+ is missing"):
        Meissonic.open(folder)


def test_shard_outside_the_folder_is_refused(folder: Path) -> None:
    shard(folder, 1)
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    values = json.loads(index.read_text())
    edit(index, weight_map=dict.fromkeys(values["weight_map"], "../../secret.safetensors"))
    with pytest.raises(InputRefusedError, match="is not a plain file name"):
        Meissonic.open(folder)


def test_no_checkpoint_folder(tmp_path: Path) -> None:
    with pytest.raises(InputRefusedError, match=r"missing model_index\.json, transformer"):
        Meissonic.open(tmp_path)
    with pytest.raises(InputRefusedError, match="not a folder"):
        Meissonic.open(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("file", "values", "reason"),
    [
        ("transformer/config.json", {"guidance_embeds": True}, "guidance_embeds is true"),
        ("transformer/config.json", {"pooled_projection_dim": 40}, "differs from the width"),
        ("transformer/config.json", {"axes_dims_rope": [4, 4, 4]}, "do not add up"),
        ("transformer/config.json", {"upsample": True}, "downsample and upsample differ"),
        ("transformer/config.json", {"codebook_size": 40}, "the codec has 48 codes, the transformer takes 40"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "neither 'gelu' nor 'quick_gelu'"),
        ("text_encoder/config.json", {"hidden_size": 64}, "text states are 64 wide"),
        ("vqvae/config.json", {"mid_block_add_attention": True}, "mid_block_add_attention"),
        ("vqvae/config.json", {"up_block_types": ["Other"]}, "only DownEncoderBlock2D"),
        ("scheduler/scheduler_config.json", {"mask_token_id": 3}, "mask_token_id 3"),
        ("scheduler/scheduler_config.json", {"masking_schedule": "other"}, "neither cosine nor linear"),
    ],
)
def test_configs_that_cannot_be_meant(folder: Path, file: str, values: dict[str, object], reason: str) -> None:
    edit(folder / file, **values)
    with pytest.raises(InputRefusedError, match=reason):
        Meissonic.open(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": ' * 100_000])
def test_broken_json(folder: Path, text: str) -> None:
    (folder / "transformer" / "config.json").write_text(text)
    with pytest.raises(InputRefusedError, match="JSON"):
        Meissonic.open(folder)


def test_missing_value_is_named(folder: Path) -> None:
    path = folder / "vqvae" / "config.json"
    values = json.loads(path.read_text())
    del values["latent_channels"]
    path.write_text(json.dumps(values))
    with pytest.raises(InputRefusedError, match="'latent_channels' is missing"):
        Meissonic.open(folder)


def test_recipe_is_found_by_the_config(folder: Path) -> None:
    recipes = read_recipes()
    with pytest.raises(InputRefusedError, match="no recipe fits it; choose one with --recipe"):
        choose(recipes, folder, None)
    edit(folder / "transformer" / "config.json", codebook_size=8192)
    assert choose(recipes, folder, None).name == "monetico"
    edit(folder / "transformer" / "config.json", downsample=True)
    assert choose(recipes, folder, None).name == "meissonic"
    with pytest.raises(UsageError, match="recipe 'other' is unknown"):
        choose(recipes, folder, "other")


def test_folder_tells_what_weights_do_not(tmp_path: Path) -> None:
    row = read_recipes()["monetico"]
    plain, distilled = replace(row, match={}), replace(row, match={}, folder="distill", name="distilled")
    rows = {"distilled": distilled, "plain": plain}
    for name, expected in (("Some-Model-Distilled", distilled), ("Some-Model", plain)):
        (tmp_path / name).mkdir()
        assert choose(rows, tmp_path / name, None) is expected


def test_recipes_and_families_agree() -> None:
    from pochade.export.families import FAMILIES as EXPORTED
    from pochade.runtime.families import FAMILIES as PAINTED

    for recipe in read_recipes().values():
        assert recipe.family in EXPORTED and recipe.family in PAINTED
    for name, family in EXPORTED.items():
        assert family.revision == PAINTED[name].revisions[-1]


def test_interrupted_export_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    def interrupt(what: str, _done: int, _total: int) -> None:
        if what == "condition":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(folder, tmp_path / "bundle", recipe="monetico", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["检查点"]


def test_full_disk_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / ".bundle.x.partial" / "text_encoder.onnx"))

    monkeypatch.setattr("pochade.export.trace.ir.save", full)
    with pytest.raises(OutputError, match="No space left on device"):
        export_checkpoint(folder, tmp_path / "bundle", recipe="monetico")
    assert [path.name for path in tmp_path.iterdir()] == ["检查点"]
