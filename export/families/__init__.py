"""One module per model family; a recipe names its family and this dict finds the class."""

from __future__ import annotations

from pochade.export.families.dimo import Dimo
from pochade.export.families.meissonic import Meissonic

FAMILIES = {"meissonic": Meissonic, "dimo": Dimo}
"""Opened checkpoint of each family that a recipe may name."""
