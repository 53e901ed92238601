"""BERT's WordPiece as a `tokenizers` file, from the published vocab.txt."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

from pochade.errors import InputRefusedError
from pochade.export.checkpoint import read_json

MAX_VOCABULARY_BYTES = 16 << 20
"""The largest published WordPiece vocabulary has about a megabyte."""

UNKNOWN, START, END, PAD, MASK = "[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"


def bert_tokenizer(folder: Path, length: int) -> Tokenizer:
    """Tokenizer that gives [CLS], text, [SEP] and padding, always `length` ids.

    Args:
        folder: holds vocab.txt, and tokenizer_config.json where something differs from BERT's own settings.
        length: of a prompt; a smaller `model_max_length` wins.

    Raises:
        InputRefusedError: the vocabulary is missing, is no text, or lacks a special token.
    """
    vocabulary = _vocabulary(folder / "vocab.txt")
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    model = WordPiece(vocabulary, unk_token=UNKNOWN, continuing_subword_prefix="##", max_input_chars_per_word=100)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
        # None: accents go where case does.
        strip_accents=config.get("strip_accents"),
        lowercase=bool(config.get("do_lower_case", True)),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    ids = [(START, vocabulary[START]), (END, vocabulary[END])]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ids)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in (PAD, UNKNOWN, START, END, MASK)])
    limit = config.get("model_max_length")
    length = min(length, limit) if isinstance(limit, int) and limit > 2 else length
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=vocabulary[PAD], pad_token=PAD)
    return tokenizer


def _vocabulary(path: Path) -> dict[str, int]:
    """Ids by token, of a file with a token a line."""
    try:
        if path.stat().st_size > MAX_VOCABULARY_BYTES:
            raise InputRefusedError(str(path), [f"it is larger than {MAX_VOCABULARY_BYTES >> 20} MiB"])
        text = path.read_bytes().decode()
    except (OSError, ValueError) as error:
        raise InputRefusedError(str(path), [f"it cannot be read ({error})"]) from None
    # Not splitlines: some tokens are what it takes for the end of a line, such as U+2028.
    lines = text.removesuffix("\n").split("\n")
    vocabulary = {line.rstrip("\r"): i for i, line in enumerate(lines)}
    if missing := [token for token in (PAD, UNKNOWN, START, END, MASK) if token not in vocabulary]:
        raise InputRefusedError(str(path), [f"token {token} has no line" for token in missing])
    return vocabulary
