"""Which execution provider computes which nodes of an open session, read from its own record.

`get_providers()` says what a session was offered. Nodes that the first of them has no kernel for are computed by the
next without a word, and every value between the two crosses the bus.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

CPU = "CPUExecutionProvider"

RECORD = "session.record_ep_graph_assignment_info"
"""Session option without which there is no record."""

SHAPE_OPERATORS = frozenset(
    {"Add", "Cast", "Ceil", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Floor", "Gather", "Greater", "If"}
    | {"Identity", "Less", "Loop", "Max", "Min", "Mod", "Mul", "Not", "Range", "ReduceProd", "Reshape", "Scan", "Shape"}
    | {"Size", "Slice", "Split", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"}
)
"""Operators that every provider has. One of them on the CPU is arithmetic on lengths, which ONNX Runtime keeps there on
purpose: a graph that waits for the card to know a shape is slower."""

INDEX_OPERATORS = frozenset({"ArgMax", "NonZero", "ReduceSum", "ScatterElements"})
"""Operators that WebGPU has for floats, or not at all. One of them on the CPU computes on whole numbers, of which there
is one a token: some kilobytes cross the bus."""


@dataclass(frozen=True)
class Placement:
    """Where the nodes of a session are computed."""

    provider: str
    """Which has first choice."""
    nodes: int
    """How many it computes, subgraphs included; 0 where nothing was recorded."""
    strays: Mapping[str, int]
    """Operators that the CPU computes in its place, and how many nodes of each; shape arithmetic is none."""
    attentions: int = 0
    """How many of its nodes are fused attention."""

    def __str__(self) -> str:
        if not self.strays:
            return self.provider
        return f"{self.provider}, but {self.strays_in_words} on {CPU}"

    @property
    def is_covered(self) -> bool:
        """Whether the CPU computes nothing but shapes and indices."""
        return INDEX_OPERATORS.issuperset(self.strays)

    @property
    def strays_in_words(self) -> str:
        """Such as "2 MatMulInteger, ArgMax"."""
        counts = sorted(self.strays.items())
        return ", ".join(operator if count == 1 else f"{count} {operator}" for operator, count in counts)


def placement(session: Any) -> Placement:
    """Of a session that was opened with `RECORD`; one on the CPU needs none."""
    provider = str(session.get_providers()[0])
    if provider == CPU:
        return Placement(provider, 0, {})
    return judge(provider, _recorded(session))


def judge(provider: str, nodes: Iterable[tuple[str, str]]) -> Placement:
    """What a record says.

    Args:
        provider: which has first choice.
        nodes: provider and operator of each.
    """
    counts = Counter(nodes)
    strays = {
        operator: count
        for (place, operator), count in counts.items()
        if place != provider and operator not in SHAPE_OPERATORS
    }
    own = sum(count for (place, _), count in counts.items() if place == provider)
    return Placement(provider, own, strays, counts[provider, "MultiHeadAttention"])


def _recorded(session: Any) -> Iterable[tuple[str, str]]:
    for part in session.get_provider_graph_assignment_info():
        for node in part.get_nodes():
            yield part.ep_name, node.op_type
