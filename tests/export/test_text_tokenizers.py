"""BERT's and T5's token ids against transformers and SentencePiece, and what is refused."""

from __future__ import annotations

import io
import json
import random
import struct
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer

from pochade.errors import InputRefusedError
from pochade.export.bert_tokenizer import bert_tokenizer
from pochade.export.sentencepiece_tokenizer import SentencePieceModel, sentencepiece_tokenizer
from pochade.runtime.tokenizer import PromptTokenizer
from tests.bundles import wire

LENGTH = 77

BITS = [
    *("red fox", "Snow", "café", "naïve", "ﬁre", "ß", "İstanbul", "don't", "3.14", "A1", "x" * 101, "unbelievable"),
    *(
        "雪山",
        "城堡",
        "一只红色的狐狸",
        "龘",
        "𠮷",
        "㍿",
        "①",
        "㎏",
        "ｆｏｘ",
        "ＡＢＣ",
        "１２３",
        "～",
        "ｶﾞ",
        "ｶ",
        "かな",
        "한국어",
    ),
    *("，", "。", "！", "？", "、", "：", "；", "（画）", "《雪》", "“”", "‘’", "…", "——", "·", "～～"),
    *("😀", "👩‍👩‍👧", "🇩🇪", "👍🏽", "™", "½", "€", "e\u0301", "n\u0303", "ก็", "नि", "ﷺ"),
    *(" ", "  ", "     ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u200b", "\u200d", "\ufeff", "▁", "\u2028"),
    *("<0x41>", "<0xE9>", "<", ">", "##", "[x]", "_", "--", "...", "$5", "@", "#", "%", "~", "^", "`", "\\"),
]


def strings() -> list[str]:
    """Every bit alone and between letters, mixtures of them, and characters from all over Unicode."""
    rng = random.Random(7)
    letters = [c for c in map(chr, range(0x20, 0x30000)) if unicodedata.category(c)[0] not in "CM"]
    mixed = ["".join(rng.choices(BITS, k=rng.randint(2, 12))) for _ in range(400)]
    rare = [f"a{char}b {char}" for char in rng.sample(letters, 400)]
    return ["", " ", *BITS, *(f" a{bit} b{bit}c " for bit in BITS), *mixed, *rare]


def different(strings: list[str], found: Callable[[str], Any], expected: Callable[[str], Any]) -> list[str]:
    return [ascii(text) for text in strings if found(text) != expected(text)]


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of most characters of the strings, with continuations, some words, and BERT's own special ids."""
    folder = tmp_path_factory.mktemp("bert")
    characters = sorted(
        {c for text in strings() for c in unicodedata.normalize("NFD", text.lower()) if c.isprintable()}
    )
    kept = [c for i, c in enumerate(characters) if not c.isspace() and i % 5]
    special = ["[PAD]", *(f"[unused{i}]" for i in range(1, 4)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = ["red", "fox", "snow", "cafe", "naive", "##able", "un", "##bel", "##iev", "don", "##no", "##w", "\u2028x"]
    tokens = dict.fromkeys([*special, *words, *kept, *(f"##{c}" for c in kept)])
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8", newline="")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 512}))
    return folder


def test_bert_ids_are_those_of_transformers(bert_folder: Path) -> None:
    from transformers import BertTokenizer

    reference: Any = BertTokenizer.from_pretrained(bert_folder)
    tokenizer = bert_tokenizer(bert_folder, LENGTH)
    options = {"padding": "max_length", "max_length": LENGTH, "truncation": True}

    def expected(text: str) -> list[list[int]]:
        encoded = reference(text, **options)
        return [encoded["input_ids"], encoded["attention_mask"]]

    def found(text: str) -> list[list[int]]:
        encoding = tokenizer.encode(text)
        return [encoding.ids, encoding.attention_mask]

    assert len(strings()) > 900
    assert different(strings(), found, expected) == []
    ids = tokenizer.encode("A red fox [MASK] 雪").ids
    assert ids[:2] == [5, tokenizer.token_to_id("a")] and tokenizer.token_to_id("[MASK]") in ids
    assert len(ids) == LENGTH and ids[-1] == 0


def test_bert_vocabulary_is_read_as_python_reads_lines(tmp_path: Path, bert_folder: Path) -> None:
    """Windows line ends make the same ids; a token that holds another line separator is one token."""
    text = (bert_folder / "vocab.txt").read_bytes().decode()
    (tmp_path / "vocab.txt").write_text(text.replace("\n", "\r\n"), encoding="utf-8", newline="")
    tokenizer, other = bert_tokenizer(tmp_path, LENGTH), bert_tokenizer(bert_folder, LENGTH)
    assert tokenizer.get_vocab() == other.get_vocab()
    assert other.token_to_id("\u2028x") == text.split("\n").index("\u2028x")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n", r"token \[MASK\] has no line"),
        (b"[PAD]\n\xff\xfe\n", "cannot be read"),
        (b"", r"token \[PAD\] has no line"),
        (None, "cannot be read"),
    ],
)
def test_bert_vocabularies_that_are_none(tmp_path: Path, data: bytes | None, reason: str) -> None:
    if data is not None:
        (tmp_path / "vocab.txt").write_bytes(data)
    with pytest.raises(InputRefusedError, match=reason):
        bert_tokenizer(tmp_path, LENGTH)


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small unigram model made as that of mT5 was: bytes for what it does not know, nmt_nfkc, ids 0 1 2."""
    rng = random.Random(3)
    words = [bit for bit in BITS if len(bit) < 20] + ["fox", "red", "foxes", "redder", "painting", "雪", "山峰"]
    lines = (" ".join(rng.choices(words, k=8)) for _ in range(3000))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        vocab_size=430,
        hard_vocab_limit=False,
        model_type="unigram",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="nmt_nfkc",
        user_defined_symbols=["<new>", "▁<extra_id_0>"],
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("t5") / "spiece.model"
    path.write_bytes(model.getvalue())
    return path


def unpadded(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def test_t5_ids_are_those_of_sentencepiece(spiece: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(spiece))
    tokenizer = unpadded(sentencepiece_tokenizer(spiece, LENGTH))
    more = ["a<new>b", "<extra_id_0>", " x <extra_id_0> y", "<new><new>"]
    assert different([*strings(), *more], lambda t: tokenizer.encode(t).ids, lambda t: [*reference.encode(t), 1]) == []
    # The strings reach what they are there for.
    pieces = [tokenizer.id_to_token(i) for text in strings() for i in tokenizer.encode(text).ids]
    assert {"<0xF0>", "▁"} < set(pieces) and len(set(pieces)) > 200 and "<unk>" not in pieces


def test_t5_prompts_have_one_length_and_keep_their_end(spiece: Path, tmp_path: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(spiece))
    sentencepiece_tokenizer(spiece, 12).save(str(tmp_path / "second.json"))
    tokenizer = PromptTokenizer(tmp_path / "second.json")
    short, prompt = tokenizer.encode("red fox"), "red fox 雪山 😀 " * 9
    cut = tokenizer.encode(prompt)
    ids = reference.encode("red fox")
    assert short.ids.tolist() == [*ids, 1] + [0] * (11 - len(ids))
    assert short.mask.tolist() == [1] * (len(ids) + 1) + [0] * (11 - len(ids))
    assert cut.ids.tolist() == [*reference.encode(prompt)[:11], 1] and cut.mask.all()
    assert cut.cut_at is not None and reference.encode(prompt[: cut.cut_at]) == cut.ids.tolist()[:11]
    assert tokenizer.encode("").ids.tolist() == [1] + [0] * 11


def test_t5_special_tokens_in_a_prompt_are_those_tokens(spiece: Path) -> None:
    tokenizer = unpadded(sentencepiece_tokenizer(spiece, LENGTH))
    assert [i for i in tokenizer.encode("</s><pad>").ids if i < 3] == [1, 0, 1]


def fields(path: Path) -> SentencePieceModel:
    return SentencePieceModel.read(path)


def charsmap(spiece: Path) -> bytes:
    return fields(spiece).charsmap


def model(*pieces: bytes, trainer: bytes = b"", normalizer: bytes = b"") -> bytes:
    special = (piece("<pad>", 3), piece("</s>", 3), piece("<unk>", 2), piece("▁a", 1, -1.0))
    return b"".join((*(special + pieces), wire(2, trainer), wire(3, normalizer)))


def piece(text: str, kind: int, score: float = 0.0) -> bytes:
    return wire(1, wire(1, text) + b"\x15" + struct.pack("<f", score) + wire(3, kind))


def rules(*units: int, text: bytes = b"x\0") -> bytes:
    return struct.pack("<I", 4 * len(units)) + struct.pack(f"<{len(units)}I", *units) + text


def test_a_model_by_hand_is_read(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(model(piece("b", 1, -2.0), piece("<s>", 3), piece("c", 5, -1.0)))
    tokenizer = unpadded(sentencepiece_tokenizer(tmp_path / "m", LENGTH))
    assert tokenizer.encode("ab").ids == [3, 4, 1]
    # Control pieces and unused ones are found in no text.
    assert tokenizer.encode("a<s>c").ids == [3, 2, 1]


HOSTILE = {
    "empty": (b"", "has no piece <pad>"),
    "text": (b"no model", "wire type|beyond the end|number"),
    "cut": (model()[:-30], "beyond the end|has no piece"),
    "long varint": (b"\x08" + b"\xff" * 12, "more than 64 bits"),
    "group": (b"\x0b", "wire type 3"),
    "piece is a number": (wire(1, 5), "a number stands where"),
    "nameless": (model(piece("", 1)), "piece '' has kind 1"),
    "kind": (model(piece("b", 9)), "piece 'b' has kind 9"),
    "nan": (model(piece("b", 1, float("nan"))), "has the score nan"),
    "twice": (model(piece("▁a", 1)), "a piece twice"),
    "not text": (model(wire(1, wire(1, b"\xff"))), "utf-8"),
    "bpe": (model(trainer=wire(3, 2)), "its model type is 2"),
    "unescaped": (model(normalizer=wire(5, 0)), "does not escape white space"),
    "short rules": (model(normalizer=wire(2, b"\x04\0")), "requires a buffer"),
    "cut rules": (model(normalizer=wire(2, rules(0)[:6])), "rules are cut off"),
    "rules leave": (model(normalizer=wire(2, rules(0xFFFFFC00))), "rules lead out of their table"),
    "value leaves": (model(normalizer=wire(2, rules(*[0x100 | 1 << 10] + [0x80000063] * 511))), "out of their replace"),
    "no end": (model(normalizer=wire(2, rules(*[0] * 512, text=b"x"))), "out of their replacements"),
}


@pytest.mark.parametrize(("data", "reason"), HOSTILE.values(), ids=HOSTILE.keys())
def test_models_that_are_none(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "spiece.model").write_bytes(data)
    with pytest.raises(InputRefusedError, match=reason):
        sentencepiece_tokenizer(tmp_path / "spiece.model", LENGTH)


def damaged(data: bytes, rng: random.Random) -> Iterator[bytes]:
    for _ in range(200):
        copy = bytearray(data)
        for _ in range(rng.randint(1, 20)):
            copy[rng.randrange(len(copy))] = rng.randrange(256)
        yield bytes(copy)


def test_no_damage_to_rules_brings_the_reader_down(spiece: Path, tmp_path: Path) -> None:
    """The library ends the program where rules lead out of their tables; such files must not get that far."""
    rng, refused = random.Random(5), 0
    for data in damaged(charsmap(spiece), rng):
        (tmp_path / "m").write_bytes(model(normalizer=wire(2, data)))
        try:
            tokenizer = sentencepiece_tokenizer(tmp_path / "m", LENGTH)
        except InputRefusedError:
            refused += 1
            continue
        for text in strings()[::40]:
            tokenizer.encode(text)
    assert 0 < refused < 200
