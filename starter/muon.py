"""Muon (Jordan et al. 2024) in the precision that the processor is fast in.

PyTorch's own always orthogonalizes in bfloat16, which takes 24 s a step where a processor has to emulate it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, chosen by Jordan for the steepest slope at zero."""
ITERATIONS = 5
RMS = 0.2
"""Root mean square of an update at rate 1, as AdamW's is (Liu et al. 2025, arXiv 2502.16982, section 2.2)."""


class Muon(torch.optim.Optimizer):
    """For matrices: Nesterov momentum, orthogonalized, with decoupled weight decay."""

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float, dtype: torch.dtype) -> None:
        """Take the matrices.

        Args:
            params: all of two axes.
            lr: learning rate, comparable with AdamW's.
            weight_decay: share of a weight that goes per unit of rate.
            dtype: to orthogonalize in.
        """
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; `closure`, if given, computes gradients first, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rate = group["lr"]
            for weight in (w for w in group["params"] if w.grad is not None):
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                momentum = state["momentum_buffer"]
                momentum.lerp_(weight.grad, 1 - MOMENTUM)
                update = orthogonal(weight.grad.lerp(momentum, MOMENTUM), self._dtype)
                weight.mul_(1 - rate * group["weight_decay"])
                weight.add_(update, alpha=-rate * RMS * math.sqrt(max(weight.shape)))
        return loss


def orthogonal(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix of the same singular vectors whose singular values lie about 1 (Newton-Schulz), in `dtype`."""
    a, b, c = NEWTON_SCHULZ
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if is_tall else matrix).to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
