"""Prompts to ids, masks and a word about what did not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from pochade.errors import BundleInvalidError, UsageError
from pochade.runtime.tokenizer import PromptTokenizer

WORDS = ["<pad>", "</s>", "red", "fox", "snow"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4, pad_id=0, pad_token="<pad>")
    tokenizer.save(str(tmp_path / "second.json"))
    return tmp_path / "second.json"


def test_padding_is_masked(path: Path) -> None:
    encoded = PromptTokenizer(path).encode("red fox")
    assert encoded.ids.tolist() == [2, 3, 1, 0] and encoded.mask.tolist() == [1, 1, 1, 0]
    assert encoded.ids.dtype == encoded.mask.dtype == "int64"
    assert encoded.cut_at is None and encoded.note("red fox") is None


def test_note_says_where_which_reader_stopped(path: Path) -> None:
    prompt = "red fox snow red fox"
    encoded = PromptTokenizer(path).encode(prompt)
    assert encoded.mask.tolist() == [1, 1, 1, 1] and encoded.cut_at == 13
    assert encoded.note(prompt, "mT5") == (
        "only the first 13 of 20 characters of a prompt fit mT5's 4 tokens; it was cut at …red fox snow |red fox…"
    )


def test_refusals(path: Path) -> None:
    tokenizer = PromptTokenizer(path)
    with pytest.raises(UsageError, match=r"control character U\+0007"):
        tokenizer.encode("red\a")
    path.write_text("{}")
    with pytest.raises(BundleInvalidError, match=r"second\.json is no tokenizer"):
        PromptTokenizer(path)
