"""How much memory a call will take, phase by phase, and how to make it fit a budget; decided before anything is loaded.

Weights are counted as the bundle tells them (`Component.memory`), what is computed by formulas of the family. A family
lists ways to run each of its phases, from the fastest to the smallest, and the first that fits is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pochade.errors import OutOfBudgetError
from pochade.sizes import show_bytes


@dataclass(frozen=True)
class Workload:
    """What a call asks for, as far as memory goes."""

    rows: int
    """Of what the decoder reads for one picture."""
    columns: int
    steps: int
    texts: int
    """Distinct prompts and negative prompts."""
    images: int
    adapters: int = 0
    """Bytes of the changes of the component that has most of them."""
    encodes: bool = False
    """Whether it begins with a picture or follows one."""
    expand: str = "off"
    """Whether weights of few bits may or must be expanded, see `pochade.runtime.expanded`."""
    threads: int = 1
    """That may work."""


@dataclass(frozen=True)
class Way:
    """One way to run a phase."""

    peak: int
    """Bytes that the whole process takes at most meanwhile, predicted."""
    recompute: bool = False
    """Compute the codec's largest layers again instead of keeping them."""
    expanded: bool = False
    """Expand weights of few bits to 8 bits a number."""
    on_cpu: bool = False
    """Leave a graphics card to the other phases."""
    at_once: int = 1
    """Strips that the codec computes at the same time."""

    @property
    def means(self) -> str:
        """What is done to save memory or, with some of it, time."""
        if self.at_once > 1:
            return f"{self.at_once} strips at a time"
        if self.on_cpu:
            return "on the CPU, as the card has too little memory"
        if self.expanded:
            return "weights are expanded to 8 bits"
        return "the codec computes its largest layers twice" if self.recompute else ""


@dataclass(frozen=True)
class Plan:
    """How each phase is run."""

    budget: int | None
    """Bytes the process may take; None without a limit."""
    phases: Mapping[str, Way]
    """By name, in order."""

    @property
    def peak(self) -> int:
        """Largest resident set of the process during the call, predicted, bytes."""
        return max(way.peak for way in self.phases.values())

    def lines(self) -> list[str]:
        """The plan in words, a line per phase."""
        limit = "no limit was given" if self.budget is None else f"the limit is {show_bytes(self.budget)}"
        rows = [f"plan: at most {show_bytes(self.peak)} of memory, {limit}"]
        for name, way in self.phases.items():
            rows.append(f"  {name:10}{show_bytes(way.peak):>9}" + (f"  {way.means}" if way.means else ""))
        return rows


ON_CPU = Way(0, on_cpu=True)
"""What takes none of a card's memory."""


def with_split(phases: Mapping[str, Sequence[Way]]) -> dict[str, list[Way]]:
    """Ways on a graphics card, and last for every phase that runs once: on the CPU.

    Args:
        phases: ways on the card alone. What runs on every step stays there, or nothing would be left to want one for.
    """
    return {name: [*ways, *([] if name == "denoise" else [ON_CPU])] for name, ways in phases.items()}


def choose(phases: Mapping[str, Sequence[Way]], budget: int | None) -> Plan:
    """The first way of every phase that fits.

    Args:
        phases: ways to run each phase, the fastest first.
        budget: bytes the process may take; None for no limit.

    Raises:
        OutOfBudgetError: a phase has no such way; names the smallest budget that would do.
    """
    if budget is None:
        return Plan(None, {name: ways[0] for name, ways in phases.items()})
    least = {name: min(way.peak for way in ways) for name, ways in phases.items()}
    worst = max(least, key=lambda name: least[name])
    if least[worst] > budget:
        needed = math.ceil(least[worst] / 1e7) / 100
        raise OutOfBudgetError(
            f"the memory limit is {show_bytes(budget)}, and {worst} alone takes {needed:.2f} GB; allow "
            f"{needed:.2f}G or more, or take a smaller picture or a bundle of fewer bits"
        )
    return Plan(budget, {name: next(way for way in ways if way.peak <= budget) for name, ways in phases.items()})
