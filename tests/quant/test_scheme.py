"""Which form each weight is kept in, by rule."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pochade.errors import UsageError
from pochade.quant.scheme import CHANNELS, DYNAMIC, FLOAT, HALF, SCHEMES, Keep, Kind, Storage, Use, blocks

INT4 = SCHEMES["int4"]

SENSITIVE = [
    "transformer/project_to_hidden.weight",
    "transformer/project_from_hidden.weight",
    "transformer/embed.conv.weight",
    "transformer/down_block.downsample.conv.weight",
    "transformer/up_block.upsample.conv.weight.T",
    "transformer/folded+mlm_layer.conv1.weight",
    "transformer/down_kernel.T",
    "transformer/head_kernel.T",
    "transformer/transformer_blocks.3.norm1.linear.weight",
    "transformer/transformer_blocks.3.norm1_context.linear.weight+transformer_blocks.4.norm1.linear.weight",
    "transformer/single_transformer_blocks.0.norm.linear.weight",
    "condition/anything",
    "sampler/anything",
    "text_encoder/text_projection.weight",
    "transformer/context_embedder.weight",
]
PLAIN = [
    "transformer/transformer_blocks.3.attn.to_q.weight+transformer_blocks.3.attn.to_k.weight",
    "transformer/transformer_blocks.0.ff.net.0.proj.weight",
    "transformer/single_transformer_blocks.27.proj_out.weight",
    "text_encoder/text_model.encoder.layers.0.mlp.fc1.weight",
    "text_encoder/text_model.encoder.layers.0.self_attn.out_proj.weight",
]


@pytest.mark.parametrize("path", SENSITIVE)
def test_sensitive_layers_keep_eight_bits(path: str) -> None:
    assert INT4.storage(Use.LINEAR, path) == blocks(8)


@pytest.mark.parametrize("path", PLAIN)
def test_other_layers_take_four_bits(path: str) -> None:
    assert INT4.storage(Use.LINEAR, path) == blocks(4)


def test_uses_have_their_own_form() -> None:
    table, kernel = "text_encoder/text_model.embeddings.token_embedding.weight", "vq_decoder/decoder.conv_in.weight"
    assert INT4.storage(Use.EMBEDDING, table) == blocks(8)
    assert INT4.storage(Use.CONV, kernel) == CHANNELS
    assert SCHEMES["int8"].storage(Use.LINEAR, PLAIN[0]) == DYNAMIC
    assert SCHEMES["int8"].storage(Use.CONV, kernel) == HALF


def test_the_code_book_is_never_rounded() -> None:
    assert INT4.storage(Use.LINEAR, "vq_encoder/code_kernel") == FLOAT
    assert INT4.storage(Use.EMBEDDING, "vq_decoder/code_table") == FLOAT


def test_the_first_matching_keep_rule_wins_over_everything() -> None:
    scheme = INT4.keeping([Keep(r"to_q", 32), Keep(r"^transformer/", 8), Keep(r"quantize|decoder", 16)])
    assert scheme.storage(Use.LINEAR, PLAIN[0]) == FLOAT
    assert scheme.storage(Use.LINEAR, PLAIN[1]) == blocks(8)
    assert scheme.storage(Use.EMBEDDING, "vq_decoder/quantize.embedding.weight") == HALF
    assert scheme.storage(Use.LINEAR, PLAIN[3]) == blocks(4)


def test_eight_bits_take_the_form_of_the_use() -> None:
    rules = [Keep(".", 8)]
    four_bit_table = replace(INT4, embedding=blocks(4, 32)).keeping(rules)
    assert four_bit_table.storage(Use.EMBEDDING, "a/b") == blocks(8, 32)
    assert SCHEMES["int8"].keeping(rules).storage(Use.CONV, "a/b") == CHANNELS
    assert SCHEMES["int8"].keeping(rules).storage(Use.LINEAR, "a/b") == DYNAMIC
    assert replace(INT4, embedding=FLOAT).keeping(rules).storage(Use.EMBEDDING, "a/b") == blocks(8)


def test_block_size_changes_wherever_there_are_blocks() -> None:
    small = INT4.with_block_size(32)
    assert (small.linear, small.sensitive, small.embedding) == (blocks(4, 32), blocks(8, 32), blocks(8, 32))
    assert small.conv == CHANNELS
    assert SCHEMES["int8"].with_block_size(32).linear == DYNAMIC


def test_the_manifest_is_json_and_states_the_accuracy_level() -> None:
    manifest = json.loads(json.dumps(INT4.keeping([Keep("a", 8)]).to_manifest()))
    assert manifest["linear"] == {"kind": "blocks", "bits": 4, "block_size": 128, "accuracy_level": 4}
    assert manifest["conv"] == {"kind": "channels", "bits": 8}
    assert manifest["keep"] == [{"pattern": "a", "bits": 8}]
    assert manifest["sensitive_layers"]


def test_short_forms() -> None:
    assert [str(s) for s in (FLOAT, HALF, CHANNELS, DYNAMIC, blocks(4))] == [
        "float32",
        "half float16",
        "channels int8",
        "dynamic int8",
        "blocks int4/128",
    ]


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(UsageError, match="5 bits"):
        blocks(5)
    with pytest.raises(UsageError, match="block size 48"):
        blocks(4, 48)
    with pytest.raises(UsageError, match="do not go together"):
        Storage(Kind.HALF, 16, block_size=32)
    with pytest.raises(UsageError, match="4 bits"):
        Keep("x", 4)
    with pytest.raises(UsageError, match="regular expression"):
        Keep("(", 8)
    with pytest.raises(UsageError, match="conv weights cannot be kept"):
        replace(INT4, conv=DYNAMIC)
    with pytest.raises(UsageError, match="8 bits, not 4"):
        replace(INT4, sensitive=blocks(4))
