"""Which form each weight gets, so that a size buys the most, or a fidelity costs the least."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence

from pochade.quant.sensitivity import Option

Options = Mapping[str, Sequence[Option]]
"""By weight, cheapest first."""

Choice = dict[str, Option]


def within_bytes(options: Options, budget: int, start: Choice | None = None) -> Choice | None:
    """The least total noise that the budget buys; None where even the first choice exceeds it.

    Noise of different weights adds up, as independent errors do. Every weight begins with its smallest form; the step
    that takes most noise away per byte comes next, until nothing more fits. Along the convex hull of each weight's
    options that is optimal but for the last step (Everett 1963, Operations Research 11(3)).

    Args:
        options: of every weight.
        budget: bytes of all together.
        start: forms to begin with, in place of the smallest; of `within_noise`.
    """
    choice = dict(start) if start else {name: forms[0] for name, forms in options.items()}
    left = budget - sum(option.bytes for option in choice.values())
    if left < 0:
        return None
    for name, option in _steps(options, choice):
        price = option.bytes - choice[name].bytes
        if price <= left:
            choice[name] = option
            left -= price
    return choice


def within_noise(options: Options, limit: float) -> Choice | None:
    """The fewest bytes that keep the total noise at or below a limit; None where nothing does."""
    choice = {name: forms[0] for name, forms in options.items()}
    noise = sum(option.noise for option in choice.values())
    for name, option in _steps(options, choice):
        if noise <= limit:
            break
        noise += option.noise - choice[name].noise
        choice[name] = option
    return choice if sum(option.noise for option in choice.values()) <= limit else None


def _steps(options: Options, start: Choice) -> Iterator[tuple[str, Option]]:
    """Steps along every weight's convex hull from where it starts, the best bargain of all first."""
    hulls = {name: [o for o in hull(forms) if o.bytes >= start[name].bytes] for name, forms in options.items()}
    heap = [(-_bargain(h[0], h[1]), name, 1) for name, h in hulls.items() if len(h) > 1]
    heapq.heapify(heap)
    while heap:
        _, name, at = heapq.heappop(heap)
        yield name, hulls[name][at]
        if at + 1 < len(hulls[name]):
            heapq.heappush(heap, (-_bargain(hulls[name][at], hulls[name][at + 1]), name, at + 1))


def hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of noise over bytes, from the first on."""
    out: list[Option] = []
    for option in options:
        if out and (option.bytes < out[-1].bytes or option.noise >= out[-1].noise):
            continue
        while len(out) > 1 and _bargain(out[-1], option) >= _bargain(out[-2], out[-1]):
            out.pop()
        out.append(option)
    return out


def _bargain(old: Option, new: Option) -> float:
    """Noise taken away per byte; what is padded to the same whole pages costs none."""
    price = new.bytes - old.bytes
    return (old.noise - new.noise) / price if price else math.inf
