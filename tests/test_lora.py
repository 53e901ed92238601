"""LoRA in every format in circulation, against the same change merged into the weights."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

import pochade
from pochade.cli import main
from pochade.errors import InputRefusedError, UsageError
from pochade.export.families.hunyuandit import HunyuanDiT
from pochade.export.families.meissonic import Meissonic
from pochade.lora_graph import find_sites, save_lora_graph
from pochade.quant.bundle import quantize_bundle
from pochade.quant.component import quantize_component
from pochade.quant.scheme import SCHEMES
from pochade.runtime.lora import open_lora, stacked
from pochade.runtime.pipeline import Pipeline
from tests import hunyuan
from tests.golden import GOLDEN
from tests.quant.test_hunyuan import dequantized, exact_products

RANK = 3
DIM, HIDDEN, TEXT = 176, 768, 64
TOLERANCE = 1e-3

FUSED = {
    "attn1.Wqkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn1.out_proj": ("attn1.to_out.0",),
    "attn2.q_proj": ("attn2.to_q",),
    "attn2.kv_proj": ("attn2.to_k", "attn2.to_v"),
    "attn2.out_proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "default_modulation.1": ("norm1.linear",),
    "skip_linear": ("skip_linear",),
}
"""Layers of a block in Tencent's naming, and in diffusers'."""

SHAPES = {
    "attn1.Wqkv": (3 * DIM, DIM),
    "attn2.kv_proj": (2 * DIM, TEXT),
    "mlp.fc1": (HIDDEN, DIM),
    "mlp.fc2": (DIM, HIDDEN),
    "skip_linear": (DIM, 2 * DIM),
}
"""Outputs and inputs, where they are not both DIM."""

Adapter = dict[str, tuple[Tensor, Tensor]]
"""A and B by Tencent's name."""


def adapter(seed: int = 0) -> Adapter:
    """Changes of every kind of layer in some blocks; those of block 4 have a skip."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    layers = [(i, name) for i in (0, 4) for name in FUSED if name != "skip_linear" or i == 4]
    shapes = [SHAPES.get(name, (DIM, DIM)) for _, name in layers]
    pairs = [(matrix(RANK, inputs), matrix(outputs, RANK)) for outputs, inputs in shapes]
    return {f"blocks.{i}.{name}": pair for (i, name), pair in zip(layers, pairs, strict=True)}


def split(made: Adapter) -> Adapter:
    """The same under diffusers' names: rows of B are cut, A is shared."""
    out: Adapter = {}
    for name, (a, b) in made.items():
        blocks, i, layer = name.split(".", 2)
        block = f"{blocks}.{i}"
        for part, rows in zip(FUSED[layer], b.chunk(len(FUSED[layer])), strict=True):
            out[f"{block}.{part}"] = (a, rows)
    return out


def peft(made: Adapter, folder: Path) -> Path:
    """Tencent's trainer, alpha twice the rank."""
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in made.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b / 2
    save_file(contiguous(tensors), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2 * RANK, "r": RANK, "peft_type": "LORA"}))
    return folder


def diffusers(made: Adapter, folder: Path) -> Path:
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in split(made).items():
        tensors[f"transformer.{name}.lora_A.weight"] = a
        tensors[f"transformer.{name}.lora_B.weight"] = b
    return written(tensors, folder)


def kohya(made: Adapter, folder: Path) -> Path:
    """With an alpha of one, which divides by the rank."""
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in made.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b * RANK, f"{key}.alpha": torch.tensor(1.0)}
    return written(tensors, folder)


def gradio(made: Adapter, folder: Path) -> Path:
    """Of Tencent's demo, which divides by the root of the rank."""
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in made.items():
        key = f"unet.{name.replace('_', '.')}.lora"
        tensors |= {f"{key}.down.weight": a, f"{key}.up.weight": b * RANK**0.5}
    return written(tensors, folder)


def written(tensors: dict[str, Tensor], folder: Path, name: str = "变.safetensors") -> Path:
    save_file(contiguous(tensors), folder / name)
    return folder / name


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}


FORMATS: list[Callable[[Adapter, Path], Path]] = [peft, diffusers, kohya, gradio]


def merged(version: str, scale: float, *adapters: Adapter) -> Any:
    """Reference network with the changes in its weights."""
    network = hunyuan.transformer(version)
    state = network.state_dict()
    for made in adapters:
        for name, (a, b) in split(made).items():
            state[f"{name}.weight"] += scale * b @ a
    network.load_state_dict(state)
    return network


def components(pipe: Pipeline, version: str) -> list[NDArray[Any]]:
    """What condition and one step answer."""
    told = {name: value.numpy() for name, value in hunyuan.condition_inputs(version).items()}
    condition = pipe.run_component("condition", told)
    context, modulation = (torch.from_numpy(condition[name]) for name in ("context", "modulation"))
    step = hunyuan.step_inputs(context, modulation, 1, 8, 12)
    answer = pipe.run_component("transformer", {name: value.numpy() for name, value in step.items()})
    return [condition["modulation"], answer["noise_pred"]]


def expected(network: Any, version: str) -> list[NDArray[Any]]:
    """The same of PyTorch."""
    modules = {name: hunyuan.filled(plan) for name, plan in hunyuan.plans(network).items()}
    context, modulation = modules["condition"](*hunyuan.condition_inputs(version).values())
    step = hunyuan.step_inputs(context, modulation, 1, 8, 12)
    return [modulation.numpy(), modules["transformer"](*step.values()).numpy()]


def close(found: list[NDArray[Any]], wanted: list[NDArray[Any]], tolerance: float = TOLERANCE) -> None:
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a / b.std(), b / b.std(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_changes_what_merging_changes(
    hunyuan_bundles: dict[str, tuple[Path, Path]], tmp_path: Path, form: Callable[[Adapter, Path], Path]
) -> None:
    made = adapter()
    with pochade.load(hunyuan_bundles["v1.2"][1], device="cpu") as pipe:
        plain = components(pipe, "v1.2")
        lora = pipe.load_lora(form(made, tmp_path), 0.7)
        assert lora.used_keys == lora.keys and not lora.unused
        squares = [(b @ a).square().sum() for a, b in made.values()]
        names = [f"{name}.weight" for name in split(made)]
        weights = [hunyuan.transformer("v1.2").state_dict()[name].square().sum() for name in names]
        norm = 0.7 * (sum(map(float, squares)) / sum(map(float, weights))) ** 0.5
        assert lora.relative_norm == pytest.approx(norm, rel=1e-3)
        changed = components(pipe, "v1.2")
        close(changed, expected(merged("v1.2", 0.7, made), "v1.2"))
        assert all(np.abs(a - b).max() > 0.05 for a, b in zip(plain, changed, strict=True))
        pipe.unload_lora(lora)
        for a, b in zip(components(pipe, "v1.2"), plain, strict=True):
            np.testing.assert_array_equal(a, b)


def test_several_add_up(hunyuan_bundles: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    one, other = adapter(1), adapter(2)
    (tmp_path / "b").mkdir()
    with pochade.load(hunyuan_bundles["v1.1"][1], device="cpu") as pipe:
        first = pipe.load_lora(kohya(one, tmp_path), 0.5)
        second = pipe.load_lora(diffusers(other, tmp_path / "b"), 0.5)
        assert pipe.loras == (first, second)
        close(components(pipe, "v1.1"), expected(merged("v1.1", 0.5, one, other), "v1.1"))
        pipe.unload_lora(first)
        close(components(pipe, "v1.1"), expected(merged("v1.1", 0.5, other), "v1.1"))
        with pytest.raises(UsageError, match="is not loaded"):
            pipe.unload_lora(first)
        pipe.unload_lora()
        assert len(pipe.loras) == 0


def test_int4_adds_the_change_to_its_own_weights(hunyuan_bundles: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """Products in float32, so that what is compared is the change alone."""
    bundle, made = hunyuan_bundles["v1.2"][1], adapter()
    with pochade.load(bundle, device="cpu") as pipe:
        lora = pipe.load_lora(kohya(made, tmp_path))
    plans, answers = hunyuan.plans(merged("v1.2", 0.0)), []
    told: dict[str, Tensor] = hunyuan.condition_inputs("v1.2")
    for name in ("condition", "transformer"):
        quantize_component(bundle / f"{name}.onnx", tmp_path / f"{name}.onnx", name, exact_products("int4"))
        graph = save_lora_graph(tmp_path / f"{name}.onnx", find_sites(ir.load(bundle / f"{name}.onnx")))
        assert graph is not None
        module = hunyuan.filled(plans[name])
        state = module.state_dict() | dequantized(tmp_path / f"{name}.onnx")
        for layer, (a, b) in split(made).items():
            if f"{layer}.weight" in state:
                state[f"{layer}.weight"] = state[f"{layer}.weight"] + b @ a
        module.load_state_dict(state)
        inputs = {key: torch.from_numpy(value) for key, value in stacked([lora], name, graph.dtype).items()}
        found = hunyuan.run(tmp_path / graph.file, told | inputs)
        answers = list(module(*told.values())) if name == "condition" else [module(*told.values())]
        close([value.numpy() for value in found], [value.numpy() for value in answers])
        if name == "condition":
            told = hunyuan.step_inputs(answers[0], answers[1], 1, 8, 12)


def test_int8_bundle_takes_it_too(hunyuan_bundles: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """Against float32 with the same change: as near as without one."""
    bundle = hunyuan_bundles["v1.2"][1]
    quantize_bundle(bundle, tmp_path / "int8", replace(SCHEMES["int8"], rounding="rtn"))
    file, errors = kohya(adapter(), tmp_path), []
    for change in (False, True):
        answers = []
        for folder in (bundle, tmp_path / "int8"):
            with pochade.load(folder, device="cpu") as pipe:
                if change:
                    pipe.load_lora(file)
                answers.append(components(pipe, "v1.2")[1])
        errors.append(np.square(answers[0] - answers[1]).mean() / np.square(answers[0]).mean())
    assert errors[1] < 2 * errors[0] < 2e-2


def test_meissonic_takes_kohya_files(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Every linear layer of text encoder, condition and transformer."""
    generator = torch.Generator().manual_seed(3)
    prefixes = {"text_encoder": "lora_te1_", "condition": "lora_unet_", "transformer": "lora_unet_"}
    tensors: dict[str, Tensor] = {}
    changes: dict[tuple[str, str], Tensor] = {}
    with pochade.load(bundles["meissonic-tiny"], device="cpu") as pipe:
        for component, prefix in prefixes.items():
            graph = pipe.bundle.manifest.components[component].lora
            assert graph is not None
            stored = [(product.inputs, *item) for product in graph.layers for item in product.outputs.items()]
            assert len(stored) > 5
            for width, layer, height in stored:
                a, b = torch.randn(2, width, generator=generator), 0.02 * torch.randn(height, 2, generator=generator)
                tensors |= one(prefix + layer.replace(".", "_"), a, b)
                changes[component, layer] = b @ a
        pipe.load_lora(written(tensors, tmp_path))
        for plan in Meissonic.open(GOLDEN / "meissonic-tiny").plans(torch.float32):
            module = hunyuan.filled(plan)
            state = module.state_dict()
            for (where, layer), change in changes.items():
                if where == plan.name:
                    state[f"{layer}.weight"] = state[f"{layer}.weight"] + change
            module.load_state_dict(state)
            inputs = {key: torch.rand(value.shape, generator=generator) for key, value in plan.inputs.items()}
            for key, value in plan.inputs.items():
                if not value.is_floating_point():
                    inputs[key] = (2 * inputs[key]).long()
            found = pipe.run_component(plan.name, {key: value.numpy() for key, value in inputs.items()})
            answer = module(*inputs.values())
            wanted = [answer] if isinstance(answer, Tensor) else list(answer)
            close(list(found.values()), [value.numpy() for value in wanted])


def test_kohya_files_change_bert(hunyuan_bundles: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    checkpoint, bundle = hunyuan_bundles["v1.2"]
    down, up = torch.randn(2, TEXT, generator=torch.Generator().manual_seed(4)), 0.05 * torch.randn(TEXT, 2)
    layers = [f"encoder.layer.{i}.attention.self.{part}" for i in (0, 2) for part in ("query", "key", "value")]
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        tensors |= one(f"lora_te1_{layer.replace('.', '_')}", down, up)
    plan = next(plan for plan in HunyuanDiT.open(checkpoint).plans(torch.float32) if plan.name == "text_encoder")
    module = hunyuan.filled(plan)
    ids = torch.randint(5, 60, (1, hunyuan.TEXT_LEN), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(hunyuan.TEXT_LEN) < 20).long()[None]
    before = module(ids, mask)
    state = module.state_dict()
    for layer in layers:
        state[f"{layer}.weight"] = state[f"{layer}.weight"] + up @ down
    module.load_state_dict(state)
    with pochade.load(bundle, device="cpu") as pipe:
        pipe.load_lora(written(tensors, tmp_path))
        inputs = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        found = pipe.run_component("text_encoder", inputs)["text_states"]
    after = module(ids, mask).numpy()
    close([found[:, :20]], [after[:, :20]])
    assert np.abs(after - before.numpy()).max() > 0.05


def test_commands(
    hunyuan_bundles: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, picture = str(hunyuan_bundles["v1.2"][1]), str(tmp_path / "a.png")
    file = kohya(adapter(), tmp_path)
    painted = ["generate", "狐狸", "-m", bundle, "--size", "64x64", "--steps", "2", "--device", "cpu", "-o", picture]
    assert main([*painted, "--lora", f"{file}:0.5", "--lora", str(file)]) == 0
    told = capsys.readouterr().err
    assert re.search(rf"LoRA {file.name}: 51 of 51 keys, [0-9]+\.[0-9][0-9] % of the norm of the weights", told)
    assert main(["verify", picture, "--model", bundle]) == 6
    assert "painted with a LoRA" in capsys.readouterr().err
    assert main([*painted, "--lora", str(tmp_path / "none.safetensors")]) == 6
    assert "there is no such file" in capsys.readouterr().err
    assert main([*painted, "--lora-partial"]) == 2
    assert main([*painted, "--lora", f"{file}:nan"]) == 2
    assert "scale is nan" in capsys.readouterr().err


def header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no safetensors file"),
        (b"PK\3\4" + bytes(200), "no safetensors file"),
        (struct.pack("<Q", 1 << 60) + b"{}", "no safetensors file"),
        (header(b"[]"), "must hold an object"),
        (header(b"{nonsense"), "no JSON"),
        (header(b'{"a.lora_A.weight": 3}'), "in an unknown way"),
        (header(b'{"a.lora_A.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}'), "no room"),
        (header(b'{"a.lora_A.weight": {"dtype": "F32", "shape": [-2, 2], "data_offsets": [0, 16]}}'), "that are none"),
        (header(b'{"a.lora_A.weight": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}') + bytes(4), "'Q4'"),
        (header(b'{"__metadata__": {"a": 3}}'), "metadata"),
        (header(b"{}"), "no pair of LoRA matrices"),
    ],
)
def test_files_that_are_none_are_refused(
    hunyuan_bundles: dict[str, tuple[Path, Path]], tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pochade.load(hunyuan_bundles["v1.2"][1], device="cpu") as pipe, pytest.raises(InputRefusedError, match=reason):
        pipe.load_lora(path)


def one(name: str, down: Tensor, up: Tensor, **more: Tensor) -> dict[str, Tensor]:
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up} | {
        f"{name}.{key}": value for key, value in more.items()
    }


OUT = "lora_unet_blocks_0_attn1_out_proj"


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"a.hada_w1_a": torch.zeros(2)}, "it is LoHa, of which only LoRA"),
        ({"a.lokr_w1": torch.zeros(2)}, "LoKr"),
        (one(OUT, torch.zeros(2, DIM), torch.zeros(DIM, 3)), "do not fit"),
        (one(OUT, torch.zeros(2, DIM), torch.full((DIM, 2), torch.nan)), "NaN or infinity"),
        (one(OUT, torch.zeros(2, DIM), torch.zeros(DIM, 2), alpha=torch.zeros(2)), "no single number"),
        (one(OUT, torch.zeros(2, DIM - 1), torch.zeros(DIM, 2)), "for 175 inputs and 176 outputs, the model has 176"),
        (one(OUT, torch.zeros(0, DIM), torch.zeros(DIM, 0)), "do not fit"),
        (one(OUT, torch.zeros(2, DIM, 3, 3), torch.zeros(DIM, 2)), "no matrix's"),
        (
            one("lora_unet_down_blocks_0", torch.zeros(2, 3), torch.zeros(3, 2)),
            "none of its keys belongs to hunyuandit",
        ),
        (
            one(OUT, torch.zeros(2, DIM), torch.zeros(DIM, 2))
            | one("lora_unet_x", torch.zeros(2, 3), torch.zeros(3, 2)),
            "2 of its 4 keys have no place in this model .*; --lora-partial uses the others",
        ),
        ({f"{OUT}.lora_down.weight": torch.zeros(2, DIM)}, "no pair of LoRA matrices"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(
    hunyuan_bundles: dict[str, tuple[Path, Path]], tmp_path: Path, tensors: dict[str, Tensor], reason: str
) -> None:
    path = written(tensors, tmp_path)
    with pochade.load(hunyuan_bundles["v1.2"][1], device="cpu") as pipe:
        with pytest.raises(InputRefusedError, match=reason):
            pipe.load_lora(path)
        assert pipe.loras == ()


def test_parts_are_used_when_that_is_wanted(hunyuan_bundles: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    tensors = one(OUT, torch.ones(2, DIM), torch.ones(DIM, 2)) | one("lora_te2_x", torch.ones(2, 3), torch.ones(3, 2))
    with pochade.load(hunyuan_bundles["v1.2"][1], device="cpu") as pipe:
        lora = pipe.load_lora(written(tensors, tmp_path), partial=True)
        assert (lora.used_keys, lora.keys, len(lora.unused)) == (2, 4, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_type_of_number_is_read(
    hunyuan_bundles: dict[str, tuple[Path, Path]], tmp_path: Path, dtype: torch.dtype
) -> None:
    down, up = torch.randn(2, DIM).to(dtype), torch.randn(DIM, 2).to(dtype)
    with pochade.load(hunyuan_bundles["v1.2"][1], device="cpu") as pipe:
        path = written(one(OUT, down, up), tmp_path)
        lora = open_lora(path, 1.0, pipe.bundle, pipe.lora_names)
        change = lora.changes["transformer"]["blocks.0.attn1.to_out.0"][0]
        np.testing.assert_array_equal(change.down, down.float().numpy())
        np.testing.assert_array_equal(change.up, up.float().numpy())
