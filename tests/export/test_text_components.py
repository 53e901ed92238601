"""BERT and the T5 encoder against transformers, in PyTorch and in ONNX Runtime, and the layouts they are read from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from pochade.errors import InputRefusedError
from pochade.export.modules.bert import BertEncoder
from pochade.export.modules.t5_encoder import T5Encoder, relative_buckets
from pochade.export.passes.store_half import StoreHalfPass
from pochade.export.text_components import BertPart, T5Part
from pochade.export.trace import build, save
from tests import text_models
from tests.text_models import BERT, BERT_TOKENS, T5, T5_TOKENS

TOLERANCE = 2e-5
"""Float32 sums in another order, through three layers; outputs have a spread of about 1."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return text_models.save_published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def graphs(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("graphs")
    bert, t5 = BertPart.open(folders[0], BERT_TOKENS), T5Part.open(folders[1])
    for plan in (bert.plan(torch.float32, BERT_TOKENS), t5.plan(T5_TOKENS)):
        save(build(plan), folder / f"{plan.name}.onnx")
    return folder / "text_encoder.onnx", folder / "text_encoder_2.onnx"


def bert_case() -> tuple[Tensor, Tensor, Tensor]:
    ids, mask = text_models.prompts(BERT["vocab_size"], BERT_TOKENS)
    with torch.no_grad():
        return ids, mask, text_models.bert()(ids, mask).last_hidden_state


def t5_case() -> tuple[Tensor, Tensor, Tensor]:
    ids, mask = text_models.prompts(T5["vocab_size"], T5_TOKENS)
    with torch.no_grad():
        return ids, mask, text_models.t5_encoder(text_models.mt5())(ids, mask).last_hidden_state


def close(found: Tensor | np.ndarray, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    # What is at masked places counts too: the model behind the encoder may read it.
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=0, atol=tolerance)


def test_bert_in_pytorch(folders: tuple[Path, Path]) -> None:
    part = BertPart.open(folders[0], BERT_TOKENS)
    module = BertEncoder(part.config)
    part.weights.load_into(module)
    ids, mask, expected = bert_case()
    with torch.no_grad():
        close(module(ids, mask), expected)


def test_t5_in_pytorch(folders: tuple[Path, Path]) -> None:
    part = T5Part.open(folders[1])
    module = T5Encoder(part.config)
    part.weights.load_into(module)
    ids, mask, expected = t5_case()
    with torch.no_grad():
        close(module(ids, mask), expected)


@pytest.mark.parametrize("rows", [slice(0, 4), slice(1, 2)])
def test_bert_in_onnx_runtime(graphs: tuple[Path, Path], rows: slice) -> None:
    ids, mask, expected = bert_case()
    close(text_models.run(graphs[0], ids[rows], mask[rows]), expected[rows])


@pytest.mark.parametrize("rows", [slice(0, 4), slice(1, 2)])
def test_t5_in_onnx_runtime(graphs: tuple[Path, Path], rows: slice) -> None:
    ids, mask, expected = t5_case()
    close(text_models.run(graphs[1], ids[rows], mask[rows]), expected[rows])


def test_masks_matter() -> None:
    """Or the tests above would hold for an encoder that ignores them."""
    for case, model in ((bert_case, text_models.bert()), (t5_case, text_models.t5_encoder(text_models.mt5()))):
        ids, mask, expected = case()
        with torch.no_grad():
            unmasked = model(ids, torch.ones_like(mask)).last_hidden_state
        assert (unmasked - expected)[:3].abs().amax() > 0.1
        assert torch.equal(unmasked[3], expected[3])


@pytest.mark.parametrize("tokens", [1, 2, 77, 256, 700])
@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (16, 20), (8, 128)])
def test_buckets_are_those_of_transformers(tokens: int, buckets: int, most: int) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    places = torch.arange(tokens)
    distance = places[None] - places[:, None]
    attention: Any = T5Attention
    expected = attention._relative_position_bucket(distance, num_buckets=buckets, max_distance=most)
    assert torch.equal(relative_buckets(tokens, buckets, most), expected)


def test_graphs_have_the_fused_forms(graphs: tuple[Path, Path]) -> None:
    for path, width, layers in ((graphs[0], BERT["vocab_size"], 3), (graphs[1], T5["vocab_size"], 3)):
        graph = onnx.load(path, load_external_data=False).graph
        kinds = [node.op_type for node in graph.node]
        assert kinds.count("MultiHeadAttention") == layers
        assert "Softmax" not in kinds
        # Rows of the table are looked up: it is read by a Gather alone, as it is stored.
        tables = [init for init in graph.initializer if list(init.dims)[:1] == [width]]
        assert len(tables) == 1
        readers = [node for node in graph.node if tables[0].name in node.input]
        assert [node.op_type for node in readers] == ["Gather"] and readers[0].input[0] == tables[0].name
    assert kinds.count("SimplifiedLayerNormalization") == 2 * 3 + 1
    assert kinds.count("FastGelu") == 3


def test_half_stored_t5_computes_in_float32_and_widens_only_the_rows_it_reads(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    model = build(T5Part.open(folders[1]).plan(T5_TOKENS))
    StoreHalfPass()(model)
    save(model, tmp_path / "t5.onnx")
    graph = onnx.load(tmp_path / "t5.onnx", load_external_data=False).graph
    table = next(init for init in graph.initializer if list(init.dims)[:1] == [T5["vocab_size"]])
    assert table.data_type == onnx.TensorProto.FLOAT16
    assert [node.op_type for node in graph.node if table.name in node.input] == ["Gather"]
    ids, mask, expected = t5_case()
    # Eleven bits of mantissa in weights; half the tolerance would need float32 ones.
    close(text_models.run(tmp_path / "t5.onnx", ids, mask), expected, 1e-2)


def test_bert_computes_in_half_when_told(folders: tuple[Path, Path], tmp_path: Path) -> None:
    save(build(BertPart.open(folders[0], BERT_TOKENS).plan(torch.float16, BERT_TOKENS)), tmp_path / "bert.onnx")
    ids, mask, expected = bert_case()
    found = text_models.run(tmp_path / "bert.onnx", ids, mask)
    assert found.dtype == np.float32
    close(found, expected, 2e-2)


def original_bert(folder: Path, prefix: str) -> None:
    """As in a two-tower file: names below a prefix, and what other parts of the file hold."""
    state = {prefix + key: value for key, value in text_models.bert().state_dict().items()}
    extra = {
        "visual.proj": torch.zeros(2, 2),
        "logit_scale": torch.zeros(()),
        f"{prefix}embeddings.position_ids": torch.arange(128)[None],
        "cls.predictions.bias": torch.zeros(3),
    }
    folder.mkdir()
    torch.save(state | extra, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(BERT | {"type_vocab_size": 2, "layer_norm_eps": 1e-12}))


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_original_bert_file(tmp_path: Path, folders: tuple[Path, Path], prefix: str) -> None:
    original_bert(tmp_path / "bert", prefix)
    part, published = BertPart.open(tmp_path / "bert", BERT_TOKENS), BertPart.open(folders[0], BERT_TOKENS)
    assert part.config == published.config
    plan, other = part.plan(torch.float32, BERT_TOKENS), published.plan(torch.float32, BERT_TOKENS)
    assert set(plan.weights) == {name for name, _ in plan.module.named_parameters()}
    assert all(torch.equal(read(), other.weights[name]()) for name, read in plan.weights.items())


@pytest.mark.parametrize("missing", [None, "shared.weight", "encoder.embed_tokens.weight"])
def test_original_mt5_file(tmp_path: Path, folders: tuple[Path, Path], missing: str | None) -> None:
    whole = text_models.mt5()
    state = {key: value for key, value in whole.state_dict().items() if key != missing}
    assert any(key.startswith("decoder.") for key in state) and "lm_head.weight" in state
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(T5 | {"layer_norm_epsilon": 1e-6}))
    part, published = T5Part.open(tmp_path), T5Part.open(folders[1])
    assert part.config == published.config
    plan, other = part.plan(T5_TOKENS), published.plan(T5_TOKENS)
    assert set(plan.weights) == {name for name, _ in plan.module.named_parameters()}
    assert all(torch.equal(read(), other.weights[name]()) for name, read in plan.weights.items())


def test_missing_tensors_are_listed(tmp_path: Path) -> None:
    state = text_models.bert().state_dict()
    del state["encoder.layer.1.output.dense.bias"], state["embeddings.LayerNorm.weight"]
    state["encoder.layer.7.output.dense.bias"] = torch.zeros(1)
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(BERT | {"type_vocab_size": 2, "layer_norm_eps": 1e-12}))
    with pytest.raises(InputRefusedError) as caught:
        BertPart.open(tmp_path, BERT_TOKENS)
    assert caught.value.faults == (
        "missing tensor embeddings.LayerNorm.weight",
        "missing tensor encoder.layer.1.output.dense.bias",
        "unexpected tensor encoder.layer.7.output.dense.bias",
    )


def open_bert(folder: Path) -> object:
    return BertPart.open(folder, BERT_TOKENS)


@pytest.mark.parametrize(
    ("part", "open_part", "values", "reason"),
    [
        (0, open_bert, {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        (0, open_bert, {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        (0, open_bert, {"num_attention_heads": 5}, "5 heads do not divide"),
        (0, open_bert, {"max_position_embeddings": 64}, "prompts have 77 tokens"),
        (1, T5Part.open, {"feed_forward_proj": "relu"}, "feed_forward_proj is 'relu'"),
        (1, T5Part.open, {"relative_attention_num_buckets": 31}, "must be a multiple of 4"),
        (1, T5Part.open, {"relative_attention_max_distance": 8}, "relative_attention_max_distance is below 9"),
        (1, T5Part.open, {"d_ff": 161}, "has shape"),
    ],
)
def test_configs_that_cannot_be_meant(
    folders: tuple[Path, Path],
    tmp_path: Path,
    part: int,
    open_part: Callable[[Path], object],
    values: dict[str, object],
    reason: str,
) -> None:
    for file in folders[part].iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((folders[part] / "config.json").read_text()) | values
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputRefusedError, match=reason):
        open_part(tmp_path)
