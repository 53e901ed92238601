"""Bundles that paint nothing by themselves: they help a model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from pochade.errors import UsageError
from pochade.runtime.pipeline import Pipeline, Result, StepEvent


class Companion(Pipeline):
    """An opened bundle of this kind; `run_component` works as for any other."""

    use: ClassVar[str]
    """What it is and how it is used: the rest of a sentence that begins with its name."""

    def stream(self, prompt: str | Sequence[str], *_: Any, **__: Any) -> Iterator[StepEvent | Result]:  # noqa: ARG002 - no argument changes it
        """Paint nothing.

        Raises:
            UsageError: always; it says what the bundle is for.
        """
        raise UsageError(f"{self.bundle.path} {self.use}")

    @abstractmethod
    def rehearse(self, seed: int) -> None:
        """Run every component on random numbers of a seed, as a call of the model would; an observer is told of it."""
