"""How long training runs, and the learning rate on the way."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

WARM_UP = 150
"""Steps until the full learning rate."""


@dataclass
class Budget:
    """A run's length in minutes of wall clock or in samples; whichever is given."""

    minutes: float | None = None
    samples: int | None = None
    spent: float = 0.0
    """Seconds used by earlier, interrupted runs."""
    _started: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        """Seconds of training so far, earlier runs included."""
        return self.spent + time.monotonic() - self._started

    def progress(self, samples: int) -> float:
        """Share of the budget used after this many samples, 0 to 1."""
        shares = [self.seconds() / (60 * self.minutes)] if self.minutes else []
        shares += [samples / self.samples] if self.samples else []
        if not shares:
            raise ValueError("a budget needs minutes or samples")
        return min(1.0, max(shares))


def rate_factor(step: int, progress: float) -> float:
    """Factor on the learning rate: warm-up, flat until half-way, then linear to 3 %."""
    decay = 1.0 if progress < 0.5 else 1.0 - 0.97 * (progress - 0.5) / 0.5
    return min(1.0, (step + 1) / WARM_UP) * decay
