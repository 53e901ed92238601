"""One module for each model family; adding a family is adding a module and a line here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import onnx_ir as ir
import torch
from tokenizers import Tokenizer

from pochade.export.families.dimo import Dimo
from pochade.export.families.hunyuandit import HunyuanDiT
from pochade.export.families.hunyuandit_controlnet import HunyuanControlNet
from pochade.export.families.meissonic import Meissonic


class Exportable(Protocol):
    """A checkpoint that was opened and checked as a whole."""

    revision: ClassVar[int]
    """Of component and tensor names; the runtime's family reads it."""
    lora_components: ClassVar[tuple[str, ...]]
    """Components whose linear layers low-rank changes can be added to."""
    half_components: ClassVar[tuple[str, ...]]
    """Components that graphics cards compute in float16; the others would leave its range or lose what matters."""
    task: ClassVar[str]
    """What a bundle of it is for, see docs/bundle-format.md."""

    @classmethod
    def open(cls, path: Path, text_encoder: Path | None = None, transformer: Path | None = None) -> Self:
        """Check a folder, and other folders that take the place of parts of it.

        Raises:
            InputRefusedError: the checkpoint is not what it should be.
            UsageError: a part is replaced that cannot be.
        """

    def graphs(self, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], ir.Model]]]:
        """Name and builder of every component."""

    def tokenizer(self) -> Tokenizer | None:
        """Of the first text encoder; None where there is no text encoder."""

    def more_tokenizers(self) -> dict[str, Tokenizer]:
        """Of the others, by the component's name."""

    def scheduler_manifest(self) -> dict[str, Any]:
        """What the runtime's loop needs to know."""

    def layer_bytes(self, component: str) -> dict[str, int]:
        """Bytes per pixel of the layers that a component keeps, for the memory plan."""


FAMILIES: Mapping[str, type[Exportable]] = {
    "hunyuandit": HunyuanDiT,
    "hunyuandit-controlnet": HunyuanControlNet,
    "meissonic": Meissonic,
    "dimo": Dimo,
}
"""Opened checkpoint of each family that a recipe may name."""
