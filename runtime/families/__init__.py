"""One module per model family; a bundle names its family and this dict finds the class."""

from __future__ import annotations

from collections.abc import Mapping

from pochade.runtime.families.dimo import DimoPipeline
from pochade.runtime.families.hunyuandit import HunyuanDiTPipeline
from pochade.runtime.families.hunyuandit_controlnet import HunyuanControlNet
from pochade.runtime.families.meissonic import MeissonicPipeline
from pochade.runtime.pipeline import Pipeline

FAMILIES: Mapping[str, type[Pipeline]] = {
    "meissonic": MeissonicPipeline,
    "dimo": DimoPipeline,
    "hunyuandit": HunyuanDiTPipeline,
    "hunyuandit-controlnet": HunyuanControlNet,
}
"""Pipeline class of each family that a bundle may name."""
