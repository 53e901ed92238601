"""What has to be known to turn one PyTorch module into one ONNX component."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

WeightSource = Callable[[], Tensor]
"""Reads or computes one weight, called once, when it is written to disk."""


@dataclass(frozen=True)
class ComponentPlan:
    """One graph of a bundle, before it is traced."""

    name: str
    module: nn.Module
    """Its weights are unset; `weights` fills the graph."""
    inputs: Mapping[str, Tensor]
    """Example of every input, in the order of `module.forward`."""
    dynamic: Mapping[str, Mapping[int, Any]]
    """`torch.export.Dim` of every input axis that may change."""
    axes: Mapping[str, tuple[str | int, ...]]
    """Shape of every input and output as told in the bundle; names are free axes."""
    outputs: tuple[str, ...]
    weights: Mapping[str, WeightSource]
    """Source of every parameter that the traced graph uses, by parameter name."""
