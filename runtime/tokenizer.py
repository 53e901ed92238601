"""Prompts to token ids, with a word about what did not fit."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pochade.errors import BundleInvalidError, UsageError

MAX_PROMPT_CHARS = 20_000
"""Far beyond what any text encoder reads; keeps a pasted file from costing minutes."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the text encoder takes it."""

    ids: NDArray[np.int64]
    """(tokens,): padded or cut to the length of the encoder."""
    cut_at: int | None
    """Index of the first character that was not read, None when all of it was."""


class PromptTokenizer:
    """The `tokenizer.json` of a bundle; it pads and truncates by itself."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise BundleInvalidError(str(path.parent), [f"{path.name} is no tokenizer ({error})"]) from None
        if not self._tokenizer.truncation or not self._tokenizer.padding:
            raise BundleInvalidError(str(path.parent), [f"{path.name} does not state its length"])

    def encode(self, prompt: str) -> EncodedPrompt:
        """Ids of a prompt.

        Raises:
            UsageError: not text that can be encoded; see `check_prompt`.
        """
        check_prompt(prompt)
        encoding = self._tokenizer.encode(prompt)
        rest = [start for part in encoding.overflowing for start, end in part.offsets if end > start]
        return EncodedPrompt(np.array(encoding.ids, np.int64), min(rest, default=None))


def check_prompt(prompt: str, what: str = "prompt") -> None:
    """Refuse what is no prompt.

    Raises:
        UsageError: too long, not Unicode text, or with control characters.
    """
    if len(prompt) > MAX_PROMPT_CHARS:
        length = len(prompt)
        raise UsageError(f"the {what} has {length} characters; at most {MAX_PROMPT_CHARS} are accepted, shorten it")
    for index, char in enumerate(prompt):
        category = unicodedata.category(char)
        if category == "Cs" or (category == "Cc" and char not in "\t\n\r"):
            kind = "a lone surrogate" if category == "Cs" else "the control character"
            raise UsageError(f"the {what} holds {kind} U+{ord(char):04X} at position {index}; remove it")
