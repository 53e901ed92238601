"""The ways to turn a weight matrix into codes and scales, by the name that schemes use."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pochade.quant.gptq import round_gptq
from pochade.quant.hqq import round_half_quadratic
from pochade.quant.moments import Moment
from pochade.quant.rtn import round_to_nearest
from pochade.quant.scale_search import round_by_scale_search

Rounded = tuple[NDArray[np.floating], NDArray[np.float32]]
"""Scales (rows, blocks) and signed codes (rows, blocks, block_size)."""

Method = Callable[[NDArray[np.floating], int, int, DTypeLike, Moment | None], Rounded]
"""Rows (outputs, inputs), bits, block size, type of the scales, and what is known of the inputs."""

METHODS: Mapping[str, Method] = {
    "rtn": round_to_nearest,
    "search": round_by_scale_search,
    "hqq": round_half_quadratic,
    "gptq": round_gptq,
}
