"""What has to be known to turn one PyTorch module into one ONNX component."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
    defaults: Mapping[str, Tensor] = field(default_factory=dict)
    """What an input is where a run leaves it out, by name of the input.

    It may be smaller than the input, where the graph broadcasts it. Such axes need a `Dim` and a name of their own:
    the graph would otherwise read the length of another input's axis here, and share buffers by it.
    """
