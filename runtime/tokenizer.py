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
    mask: NDArray[np.int64]
    """(tokens,): 1 for what was read, 0 for padding."""
    cut_at: int | None
    """Index of the first character that was not read, None when all of it was."""

    def note(self, prompt: str, encoder: str = "the text encoder") -> str | None:
        """What to tell whoever wrote the prompt; None when all of it was read.

        Args:
            prompt: the text that was encoded.
            encoder: what to call the reader.
        """
        if self.cut_at is None:
            return None
        read, unread = prompt[: self.cut_at][-24:], prompt[self.cut_at :][:24]
        return (
            f"only the first {self.cut_at} of {len(prompt)} characters of a prompt fit {encoder}'s "
            f"{len(self.ids)} tokens; it was cut at …{read}|{unread}…"
        )


class PromptTokenizer:
    """A `tokenizer.json` of a bundle; it pads and truncates by itself.

    Open one for the phase that reads text: a vocabulary of 250 000 pieces takes 450 MB.
    """

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
        ids, mask = (np.array(row, np.int64) for row in (encoding.ids, encoding.attention_mask))
        return EncodedPrompt(ids, mask, min(rest, default=None))


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
