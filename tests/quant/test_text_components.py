"""Text encoders through quantization: which form their weights get, and that they still answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from pochade.export.passes.store_half import StoreHalfPass
from pochade.export.text_components import BertPart, T5Part
from pochade.export.trace import build, save
from pochade.quant.component import quantize_component
from pochade.quant.scheme import DYNAMIC, SCHEMES, Keep, Storage, Use, blocks
from tests import text_models
from tests.text_models import BERT, BERT_TOKENS, T5, T5_TOKENS

NAMES = ("text_encoder", "text_encoder_2")
VOCABULARY = {"text_encoder": BERT["vocab_size"], "text_encoder_2": T5["vocab_size"]}
TOKENS = {"text_encoder": BERT_TOKENS, "text_encoder_2": T5_TOKENS}
LEAST_SNR = {"int8": 27.0, "int4": 9.0}
"""dB on random weights with sharp attention, rounded to nearest: sane, not good."""


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    bert, t5 = text_models.save_published(folder)
    for plan in (BertPart.open(bert, BERT_TOKENS).plan(torch.float32, BERT_TOKENS), T5Part.open(t5).plan(T5_TOKENS)):
        model = build(plan)
        save(model, folder / f"{plan.name}.onnx")
        StoreHalfPass()(model)
        save(model, folder / f"{plan.name}-half.onnx")
    return folder


def nodes(path: Path) -> list[onnx.NodeProto]:
    return list(onnx.load(path, load_external_data=False).graph.node)


def attribute(node: onnx.NodeProto, name: str) -> int:
    return next(int(a.i) for a in node.attribute if a.name == name)


@pytest.mark.parametrize("stored", ["", "-half"])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("name", NAMES)
def test_quantized_text_encoders_answer(graphs: Path, tmp_path: Path, name: str, scheme: str, stored: str) -> None:
    target = tmp_path / f"{name}.onnx"
    rounded = replace(SCHEMES[scheme], rounding="rtn")
    quantize_component(graphs / f"{name}{stored}.onnx", target, name, rounded)
    ids, mask = text_models.prompts(VOCABULARY[name], TOKENS[name])
    exact, found = (text_models.run(path, ids, mask) for path in (graphs / f"{name}.onnx", target))
    noise = np.square(exact - found).sum()
    assert 10 * np.log10(np.square(exact).sum() / noise) > LEAST_SNR[scheme]
    # The table is looked up in its codes, row by row.
    (lookup,) = [node for node in nodes(target) if node.op_type == "GatherBlockQuantized"]
    assert attribute(lookup, "bits") == (4 if name == "text_encoder_2" and scheme == "int4" else 8)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_every_linear_layer_is_rounded_and_no_activation_has_one_scale(
    graphs: Path, tmp_path: Path, scheme: str
) -> None:
    rounded = replace(SCHEMES[scheme], rounding="rtn")
    for name in NAMES:
        quantize_component(graphs / f"{name}.onnx", tmp_path / f"{name}.onnx", name, rounded)
        kinds = [node.op_type for node in nodes(tmp_path / f"{name}.onnx")]
        assert not {"MatMul", "Gemm"} & set(kinds)
        assert not any("DynamicQuantize" in kind for kind in kinds)
        bits = {attribute(n, "bits") for n in nodes(tmp_path / f"{name}.onnx") if n.op_type == "MatMulNBits"}
        assert bits == {8 if scheme == "int8" else 4}


BERT_LAYER = "text_encoder/encoder.layer.23.intermediate.dense.weight.T"
CLIP_LAYER = "text_encoder/text_model.encoder.layers.23.mlp.fc1.weight.T"
LAYER, TABLE = "text_encoder_2/encoder.block.3.layer.1.DenseReluDense.wo.weight.T", "text_encoder_2/shared.weight"


def test_rules_for_text_encoders() -> None:
    int8, int4 = SCHEMES["int8"], SCHEMES["int4"]
    assert int8.storage(Use.LINEAR, LAYER) == blocks(8) and int4.storage(Use.LINEAR, LAYER) == blocks(4)
    assert int8.storage(Use.LINEAR, BERT_LAYER) == blocks(8)
    assert int8.storage(Use.LINEAR, CLIP_LAYER) == DYNAMIC
    assert int8.keeping([Keep("wo", 8)]).storage(Use.LINEAR, LAYER) == blocks(8)
    assert int8.storage(Use.EMBEDDING, TABLE) == blocks(8) and int4.storage(Use.EMBEDDING, TABLE) == blocks(4, 32)
    assert int4.keeping([Keep("shared", 8)]).storage(Use.EMBEDDING, TABLE) == blocks(8)
    assert int4.storage(Use.EMBEDDING, "text_encoder/embeddings.word_embeddings.weight") == blocks(8)
    assert int4.with_block_size(64).storage(Use.EMBEDDING, TABLE) == blocks(4, 64)
    chosen = {LAYER: Storage(DYNAMIC.kind, 8)}
    # What a search has measured, or a user insists on, stands.
    assert replace(int8, chosen=chosen).storage(Use.LINEAR, LAYER) == DYNAMIC
