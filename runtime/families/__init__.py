"""One module per model family; a bundle names its family and this dict finds the class."""

from __future__ import annotations

from pochade.runtime.families.dimo import DimoPipeline
from pochade.runtime.families.meissonic import MeissonicPipeline

FAMILIES = {"meissonic": MeissonicPipeline, "dimo": DimoPipeline}
"""Pipeline class of each family that a bundle may name."""
