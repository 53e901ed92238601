"""Exported components in ONNX Runtime, against recorded values and against the PyTorch modules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

import pochade
from pochade.export.families.meissonic import Meissonic
from pochade.export.modules.clip_text import ClipTextEncoder
from pochade.export.modules.masked_transformer import MaskedTransformer
from pochade.export.modules.vq import VQModel
from pochade.runtime.pipeline import Pipeline
from tests.golden import GOLDEN, TOLERANCE, arrays


@pytest.fixture
def pipe(bundles: dict[str, Path], model: str) -> Iterator[Pipeline]:
    with pochade.load(bundles[model], device="cpu") as pipeline:
        yield pipeline


def close(found: NDArray[Any], expected: NDArray[Any], tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def logits(pipe: Pipeline, head: NDArray[Any], inputs: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """Logits (batch, codes, height, width) by condition and transformer components and the head's matrix."""
    condition = pipe.run_component(
        "condition",
        {
            "text_states": inputs["encoder_hidden_states"],
            "pooled": inputs["pooled"],
            "micro_conds": inputs["micro_conds"],
            # A second step, to see that the first one is picked.
            "timesteps": np.array([inputs["timestep"][0], 11], np.float32),
        },
    )
    features = pipe.run_component(
        "transformer",
        {
            "tokens": inputs["tokens"].astype(np.int64),
            "context": condition["context"],
            "modulation": condition["modulation"],
            "step": np.array([0]),
        },
    )["features"]
    flat: NDArray[Any] = features @ head.T
    return flat.transpose(0, 2, 1).reshape(flat.shape[0], -1, *inputs["tokens"].shape[1:])


def head_of(model: str) -> NDArray[Any]:
    weights = Meissonic.open(GOLDEN / model).transformer_weights
    return weights["mlm_layer.conv2.weight"].flatten(1).numpy()


@pytest.mark.parametrize("case", ["fwd", "fwd_b"])
def test_recorded_forward(pipe: Pipeline, model: str, case: str) -> None:
    recorded = arrays(model)
    names = ("tokens", "encoder_hidden_states", "pooled", "micro_conds", "timestep")
    inputs = {name: recorded[f"{case}.in.{name}"] for name in names}
    close(logits(pipe, head_of(model), inputs), recorded[f"{case}.logits"])


@pytest.mark.parametrize("timestep", [0, 1, 63])
def test_recorded_forward_at_other_steps(pipe: Pipeline, model: str, timestep: int) -> None:
    recorded = arrays(model)
    names = ("tokens", "encoder_hidden_states", "pooled", "micro_conds")
    inputs = {name: recorded[f"fwd.in.{name}"] for name in names} | {"timestep": np.array([timestep])}
    close(logits(pipe, head_of(model), inputs), recorded[f"fwd_t{timestep}.logits"])


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 2, 2), (1, 2, 10), (3, 6, 4)])
def test_any_batch_and_grid(pipe: Pipeline, model: str, batch: int, height: int, width: int) -> None:
    checkpoint = Meissonic.open(GOLDEN / model)
    module = MaskedTransformer(checkpoint.transformer)
    checkpoint.transformer_weights.load_into(module)
    rng = np.random.default_rng(0)
    config = checkpoint.transformer
    inputs: dict[str, NDArray[Any]] = {
        "tokens": rng.integers(0, config.vocab_size, (batch, height, width)),
        "encoder_hidden_states": rng.normal(size=(batch, 77, config.joint_attention_dim)).astype(np.float32),
        "pooled": rng.normal(size=(batch, config.pooled_projection_dim)).astype(np.float32),
        "micro_conds": np.array([[512, 384, 0, 0, 6]] * batch, np.float32),
        "timestep": np.array([5]),
    }
    with torch.no_grad():
        expected = module(*(torch.from_numpy(value) for value in inputs.values())).numpy()
    close(logits(pipe, head_of(model), inputs), expected)


def test_text_encoder(pipe: Pipeline, model: str) -> None:
    recorded = arrays(model)
    ids = recorded["text.input_ids"].astype(np.int64)
    outputs = pipe.run_component("text_encoder", {"input_ids": ids})
    close(outputs["pooled"], recorded["text.text_embeds"])
    close(outputs["text_states"][:4], recorded["text.hidden_states_m2"])
    # A batch of another size gives the same rows.
    close(pipe.run_component("text_encoder", {"input_ids": ids[:1]})["pooled"], recorded["text.text_embeds"][:1])


def test_codec(pipe: Pipeline, model: str) -> None:
    recorded = arrays(model)
    tokens = recorded["vq.decode.tokens"].astype(np.int64)
    for i in range(len(tokens)):
        for count in (1, 2):
            strips = np.array([count])
            for small in (False, True):
                inputs = {"tokens": tokens[i : i + 1], "strips": strips, "recompute": np.array(small)}
                close(pipe.run_component("vq_decoder", inputs)["image"], recorded["vq.decode.sample"][i : i + 1])
            picture = recorded["vq.encode.image"][i : i + 1]
            found = pipe.run_component("vq_encoder", {"image": picture, "strips": strips})["tokens"]
            assert (found == recorded["vq.encode.tokens"][i : i + 1]).all()


@pytest.mark.parametrize(("rows", "columns"), [(12, 5), (7, 3), (1, 4)])
def test_strips_have_no_seams(pipe: Pipeline, model: str, rows: int, columns: int) -> None:
    """Any number of strips gives the picture of the untiled network, and its codes, off-square and odd sizes too."""
    source = Meissonic.open(GOLDEN / model).codec_weights
    codec = VQModel(Meissonic.open(GOLDEN / model).codec).eval()
    source.load_into(codec)
    tokens = np.random.default_rng(0).integers(0, codec.config.num_vq_embeddings, (1, rows, columns))
    with torch.no_grad():
        expected = codec.decode(torch.from_numpy(tokens)).numpy()
        codes = codec.nearest_codes(codec.encode(torch.from_numpy(expected))).numpy()
    for count in (n for n in range(1, rows + 1) if rows % n == 0):
        strips = np.array([count])
        for small in (False, True):
            inputs = {"tokens": tokens, "strips": strips, "recompute": np.array(small)}
            close(pipe.run_component("vq_decoder", inputs)["image"], expected)
        found = pipe.run_component("vq_encoder", {"image": expected, "strips": strips})["tokens"]
        assert (found == codes).mean() > 0.98, count


def test_versions_and_operators(bundles: dict[str, Path], model: str) -> None:
    for path in bundles[model].glob("*.onnx"):
        graph = onnx.load(path, load_external_data=False)
        assert graph.ir_version == 10
        versions = {entry.domain: entry.version for entry in graph.opset_import}
        assert versions.pop("") == 20
        assert versions in ({}, {"com.microsoft": 1})
        # Nothing of the machine that exported may travel in the file.
        assert b"/tmp" not in path.read_bytes() and b"site-packages" not in path.read_bytes()


def test_transformer_has_the_fused_forms(bundles: dict[str, Path], model: str) -> None:
    graph = onnx.load(bundles[model] / "transformer.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    blocks = 4
    assert kinds.count("MultiHeadAttention") == blocks
    assert kinds.count("RotaryEmbedding") == 2 * blocks
    assert "Softmax" not in kinds
    # Query, key, value and MLP are products of their own: to cut one up costs more than to round its input anew.
    assert not [node for node in graph.node if node.op_type == "Split" and "modulation" not in node.input[0]]
    # No weight is turned when the session opens.
    turned = {name for node in graph.node if node.op_type == "Transpose" for name in node.input}
    assert not turned & {init.name for init in graph.initializer}


@pytest.fixture(scope="module")
def half_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pochade.export.write import export_checkpoint

    target = tmp_path_factory.mktemp("half") / "monetico-fp16"
    export_checkpoint(GOLDEN / "monetico-tiny", target, dtype="fp16", recipe="monetico")
    return target


def test_fp16_bundle_is_half_as_large_and_close(half_bundle: Path, bundles: dict[str, Path]) -> None:
    recorded = arrays("monetico-tiny")
    names = ("tokens", "encoder_hidden_states", "pooled", "micro_conds", "timestep")
    inputs = {name: recorded[f"fwd.in.{name}"] for name in names}
    with pochade.load(half_bundle, device="cpu") as pipe:
        found = logits(pipe, head_of("monetico-tiny"), inputs)
        grid = {"tokens": recorded["vq.decode.tokens"][:1].astype(np.int64), "strips": np.array([2])}
        grid["recompute"] = np.array(False)
        image = pipe.run_component("vq_decoder", grid)["image"]
        painted = pipe("a red house", width=64, height=64, num_inference_steps=2, seed=1).images[0]
    # Eleven bits of mantissa through four blocks; logits have a spread of about 1.
    close(found, recorded["fwd.logits"], 0.02)
    close(image, recorded["vq.decode.sample"][:1], 2e-3)
    assert painted.size == (64, 64)
    for name in ("transformer", "condition"):
        half, full = (b / f"{name}.onnx.data" for b in (half_bundle, bundles["monetico-tiny"]))
        assert half.stat().st_size < 0.62 * full.stat().st_size


def test_another_text_encoder_can_be_taken() -> None:
    """The tower of the other tiny model has other weights and the same shape."""
    checkpoint = Meissonic.open(GOLDEN / "monetico-tiny", GOLDEN / "meissonic-tiny" / "text_encoder")
    module = ClipTextEncoder(checkpoint.text)
    checkpoint.text_weights.load_into(module)
    ids = torch.from_numpy(arrays("meissonic-tiny")["text.input_ids"]).long()
    with torch.no_grad():
        close(module(ids)[1].numpy(), arrays("meissonic-tiny")["text.text_embeds"])
