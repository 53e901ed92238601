"""Uniform draws that are the same on every device, from a counter-based generator on the host."""

from __future__ import annotations

import secrets
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pochade.errors import UsageError

MAX_SEED = 2**63 - 1


class Noise(Protocol):
    """Where a masked-token pipeline takes its uniform draws from; all values float32 in [0, 1)."""

    def draw(self, image: int, step: int, cells: int) -> NDArray[np.float32]:
        """(cells,): one number per cell, inverts the cumulative distribution over the codes."""

    def keep(self, image: int, step: int, cells: int) -> NDArray[np.float32]:
        """(cells,): one number per cell, becomes the Gumbel noise on the confidence; not asked for on the last step."""


@runtime_checkable
class StartNoise(Noise, Protocol):
    """Where a pipeline that starts from codes and noise takes them from, all float32."""

    def codes(self, image: int, cells: int) -> NDArray[np.float32]:
        """(cells,): one number in [0, 1) per cell, becomes the code it starts with."""

    def order(self, image: int, cells: int) -> NDArray[np.float32]:
        """(cells,): one number in [0, 1) per cell; the cells with the least start masked."""

    def normal(self, image: int, cells: int, width: int) -> NDArray[np.float32]:
        """(cells, width): standard normal, added to the embedded cells."""


class PhiloxNoise:
    """Philox 4x64 (Salmon et al. 2011), keyed by the seed; every draw has its own counter block.

    A draw depends on the seed, the step and its purpose, not on what was drawn before, so a run can be resumed and
    image `i` of seed `s` equals image 0 of seed `s + i`.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def draw(self, image: int, step: int, cells: int) -> NDArray[np.float32]:
        """See `Noise.draw`."""
        return self._uniform(image, step, 0, cells)

    def keep(self, image: int, step: int, cells: int) -> NDArray[np.float32]:
        """See `Noise.keep`."""
        return self._uniform(image, step, 1, cells)

    def codes(self, image: int, cells: int) -> NDArray[np.float32]:
        """See `StartNoise.codes`."""
        return self._uniform(image, 0, 2, cells)

    def order(self, image: int, cells: int) -> NDArray[np.float32]:
        """See `StartNoise.order`."""
        return self._uniform(image, 0, 3, cells)

    def normal(self, image: int, cells: int, width: int) -> NDArray[np.float32]:
        """See `StartNoise.normal`."""
        return _generator(self.seed, image, 0, 4).standard_normal((cells, width), dtype=np.float32)

    def _uniform(self, image: int, step: int, purpose: int, cells: int) -> NDArray[np.float32]:
        return _generator(self.seed, image, step, purpose).random(cells, dtype=np.float32)


class GaussianNoise(Protocol):
    """Where a pipeline of continuous diffusion takes its noise from; all values float32, standard normal."""

    def start(self, image: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """What the first step begins with."""

    def step(self, image: int, step: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """What a step adds, for samplers that do."""


class PhiloxGaussianNoise:
    """As `PhiloxNoise`, normally distributed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def start(self, image: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """See `GaussianNoise.start`."""
        return _generator(self.seed, image, 0, 5).standard_normal(shape, dtype=np.float32)

    def step(self, image: int, step: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """See `GaussianNoise.step`."""
        return _generator(self.seed, image, step, 6).standard_normal(shape, dtype=np.float32)


def _generator(seed: int, image: int, step: int, purpose: int) -> np.random.Generator:
    # The first counter word runs within a draw; the second and third tell draws apart.
    return np.random.Generator(np.random.Philox(key=(seed + image) & MAX_SEED, counter=[0, step, purpose, 0]))


def uniform_row(noise: NDArray[np.float32], cells: int) -> NDArray[np.float32]:
    """Noise of one image as (1, cells), once it is what a `Noise` promises.

    Raises:
        UsageError: another number of values, or one outside [0, 1).
    """
    row = np.asarray(noise, np.float32)
    if row.shape != (cells,) or not ((row >= 0) & (row < 1)).all():
        raise UsageError(f"noise must be {cells} numbers in [0, 1), not shape {row.shape}")
    return row[None]


def random_seed() -> int:
    """A seed nobody chose, short enough to be typed again."""
    return secrets.randbelow(2**32)
