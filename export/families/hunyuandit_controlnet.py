"""ControlNets of HunyuanDiT 1.1 and 1.2: a picture of edges, depth or pose that the painting follows.

A bundle of its own, to be used beside one of `hunyuandit`: any number of nets then share a model, and each of them can
be quantized for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir
import torch
from tokenizers import Tokenizer

from pochade.errors import UsageError
from pochade.export.checkpoint import empty
from pochade.export.component import ComponentPlan
from pochade.export.hunyuan_controlnet import controlnet_plans
from pochade.export.hunyuan_layouts import ControlNetLayout
from pochade.export.modules.hunyuan_controlnet import ControlNet as Network
from pochade.export.trace import build

REVISION = 1
"""Of component and tensor names; pochade.runtime.families.hunyuandit_controlnet agrees on it."""


@dataclass(frozen=True)
class HunyuanControlNet:
    """An opened ControlNet, checked as a whole before anything is written."""

    layout: ControlNetLayout

    revision: ClassVar[int] = REVISION
    lora_components: ClassVar[tuple[str, ...]] = ()
    half_components: ClassVar[tuple[str, ...]] = ("controlnet",)
    task: ClassVar[str] = "controlnet"

    @classmethod
    def open(cls, path: Path, text_encoder: Path | None = None, transformer: Path | None = None) -> HunyuanControlNet:
        """Compare every tensor's name and shape with what the modules expect.

        Args:
            path: folder as diffusers publishes it, or file as Tencent does.
            text_encoder: there is none to be replaced.
            transformer: there is none to be replaced.

        Raises:
            InputRefusedError: every fault that was found.
            UsageError: a text encoder or transformer is given.
        """
        if text_encoder is not None or transformer is not None:
            raise UsageError("a ControlNet has no text encoder and no transformer to replace; leave the option away")
        layout = ControlNetLayout.open(path)
        layout.weights.check(empty(Network, layout.config))
        return cls(layout)

    def graphs(self, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], ir.Model]]]:
        """Name and builder of both components; `controlnet` computes in `dtype`, `condition` in float32."""
        for plan in self.plans(dtype):
            yield plan.name, partial(build, plan)

    def plans(self, dtype: torch.dtype) -> tuple[ComponentPlan, ...]:
        """Both components, before they are traced."""
        return controlnet_plans(self.layout.config, self.layout.weights, dtype)

    def tokenizer(self) -> Tokenizer | None:
        """None: it is given the states of the model's text encoders."""
        return None

    def more_tokenizers(self) -> dict[str, Tokenizer]:
        """None."""
        return {}

    def scheduler_manifest(self) -> dict[str, Any]:
        """What its steps are made of; the model has the loop."""
        return {"patch": self.layout.config.patch_size}

    def layer_bytes(self, component: str) -> dict[str, int]:  # noqa: ARG002 - the protocol's
        """Nothing: what its layers take is told by the shapes of its tensors."""
        return {}
