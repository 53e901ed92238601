"""CLIP's byte-level BPE as a `tokenizers` file, from the published vocab.json and merges.txt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from pochade.errors import InputRefusedError
from pochade.export.checkpoint import read_json

PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""Contractions, runs of letters, single digits, runs of anything else (Radford et al. 2021, released code)."""


def clip_tokenizer(folder: Path, length: int) -> Tokenizer:
    """Tokenizer that gives start token, text, end token and padding, always `length` ids.

    The padding token is a special token: wherever it stands in a prompt it becomes the padding id. Released
    checkpoints pad with "!", id 0.

    Args:
        folder: holds vocab.json, merges.txt and tokenizer_config.json.
        length: positions of the text encoder; a smaller `model_max_length` wins.

    Raises:
        InputRefusedError: files are missing or do not make a vocabulary.
    """
    vocabulary, config = read_json(folder / "vocab.json"), read_json(folder / "tokenizer_config.json")
    start, end, pad = (_token(config, folder, key) for key in ("bos_token", "eos_token", "pad_token"))
    faults = [f"token {token!r} has no id" for token in (start, end, pad) if token not in vocabulary]
    if faults or not all(isinstance(i, int) for i in vocabulary.values()):
        raise InputRefusedError(str(folder / "vocab.json"), faults or ["ids must be whole numbers"])
    try:
        model = BPE(vocabulary, _merges(folder / "merges.txt"), end_of_word_suffix="</w>", unk_token=end)
    except Exception as error:  # the library raises bare Exception
        raise InputRefusedError(str(folder / "merges.txt"), [f"it does not fit vocab.json ({error})"]) from None
    tokenizer = Tokenizer(model)
    steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " ")]
    steps += [normalizers.Lowercase()] if config.get("do_lower_case", True) else []
    tokenizer.normalizer = normalizers.Sequence(steps)
    pieces = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    ids = [(start, vocabulary[start]), (end, vocabulary[end])]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=ids)
    # normalized=False for "!", True for the others, as the released tokenizer_config.json has them.
    tokenizer.add_special_tokens([AddedToken(t, normalized=t != pad) for t in dict.fromkeys((start, end, pad))])
    length = min(length, int(config.get("model_max_length", length)))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=vocabulary[pad], pad_token=pad)
    return tokenizer


def _token(config: dict[str, Any], folder: Path, key: str) -> str:
    value = config.get(key)
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise InputRefusedError(str(folder / "tokenizer_config.json"), [f"it names no {key}"])
    return text


def _merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputRefusedError(str(path), [f"it cannot be read ({error})"]) from None
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    bad = [pair for pair in pairs if len(pair) != 2]
    if bad:
        raise InputRefusedError(str(path), [f"{' '.join(bad[0])!r} is no pair"])
    return [(a, b) for a, b in pairs]
