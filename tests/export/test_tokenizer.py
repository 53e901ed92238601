"""Token ids against the recorded ones, and the traps of CLIP's tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pochade.errors import InputRefusedError
from pochade.export.clip_tokenizer import clip_tokenizer
from tests.golden import GOLDEN, arrays, facts

FOLDER = GOLDEN / "monetico-tiny" / "tokenizer"


@pytest.mark.parametrize("case", [i for i in range(12) if i != 8])
def test_recorded_ids(model: str, case: int) -> None:
    tokenizer = clip_tokenizer(GOLDEN / model / "tokenizer", 77)
    ids = tokenizer.encode(facts(model)["text_prompts"][case]).ids
    assert ids == arrays(model)["text.input_ids"][case].tolist()


def test_chinese_keeps_its_bytes(model: str) -> None:
    """The recorded case splits every Chinese character, as the slow tokenizer does; the fast one need not."""
    tokenizer = clip_tokenizer(GOLDEN / model / "tokenizer", 77)
    encoding = tokenizer.encode("雪山 and 城堡")
    assert len(encoding.ids) == 77
    assert tokenizer.decode(encoding.ids).replace("</w>", "").replace(" ", "") == "雪山and城堡"


def test_exclamation_mark_is_the_padding_token() -> None:
    tokenizer = clip_tokenizer(FOLDER, 77)
    ids, end = tokenizer.encode("dog! cat").ids, tokenizer.token_to_id("<|endoftext|>")
    assert end is not None and 0 in ids[1 : ids.index(end)]
    assert ids[-1] == 0


def test_empty_prompt_is_start_end_padding() -> None:
    tokenizer = clip_tokenizer(FOLDER, 77)
    assert tokenizer.encode("").ids == [662, 663, *[0] * 75]


def test_long_prompt_ends_with_the_end_token() -> None:
    ids = clip_tokenizer(FOLDER, 77).encode("dog " * 200).ids
    assert len(ids) == 77 and ids[-1] == 663


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("merges.txt", "#version: 0.2\none two three\n", "is no pair"),
        ("merges.txt", "#version: 0.2\nqq zz\n", "does not fit vocab.json"),
        ("vocab.json", "[1, 2]", "no JSON object"),
        ("vocab.json", '{"a": 0}', "has no id"),
        ("tokenizer_config.json", "{}", "names no bos_token"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, name: str, text: str, reason: str) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(FOLDER, folder)
    (folder / name).write_text(text)
    with pytest.raises(InputRefusedError, match=reason):
        clip_tokenizer(folder, 77)


def test_do_lower_case_is_obeyed(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(FOLDER, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"do_lower_case": False}))
    assert clip_tokenizer(folder, 77).encode("DOG").ids != clip_tokenizer(FOLDER, 77).encode("DOG").ids
