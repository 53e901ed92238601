"""Whether a component's attention multiplies 8-bit numbers here, and how many of them there are at a time."""

from __future__ import annotations

from pochade.component import ATTENDED_HEADS, Component
from pochade.machine import saturates


def is_rounded(component: Component) -> bool:
    """Whether the first graph of a component has attention of 8-bit numbers."""
    return bool((component.quantization or {}).get("int8_attentions"))


def scores_at_a_time(component: Component, tokens: int) -> int:
    """Numbers of one table of scores, 0 where attention is in float32 and keeps none on a CPU.

    Args:
        component: whose attention it is.
        tokens: that attend to one another.
    """
    return ATTENDED_HEADS * tokens**2 if is_rounded(component) and not saturates() else 0
