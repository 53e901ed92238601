"""Rows of models.yaml: what a checkpoint does not say about itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pochade.errors import InputRefusedError, MissingExtraError, UsageError
from pochade.export.checkpoint import read_json

FILE_NAME = "models.yaml"


@dataclass(frozen=True)
class Recipe:
    """One row."""

    name: str
    family: str
    checkpoint: str
    """Where it is published."""
    licence: str
    scheme: str
    """Quantization scheme that is recommended."""
    match: Mapping[str, Mapping[str, Any]]
    """Values in the checkpoint's JSON files that tell this row, by relative file name."""
    defaults: Mapping[str, Any]
    """What a call takes when it is told nothing: size, steps, guidance and the like."""
    prompts: Sequence[str]
    """What people ask of the model: for measuring, and for calibrating a quantization."""
    folder: str = ""
    """Regular expression found in the name of the checkpoint's folder, in any case of letters: for weights that look
    like others, such as distilled ones."""

    def fits(self, checkpoint: Path) -> bool:
        """Whether the checkpoint's files hold the values of `match`, null standing for a missing one."""
        if not re.search(self.folder, checkpoint.resolve().name, re.IGNORECASE):
            return False
        for name, wanted in self.match.items():
            if not (checkpoint / name).is_file():
                return False
            values = read_json(checkpoint / name)
            if any(values.get(key) != value for key, value in wanted.items()):
                return False
        return True


def read_recipes(path: Path | None = None) -> dict[str, Recipe]:
    """Rows by name, of the file that comes with pochade or another one.

    Raises:
        MissingExtraError: PyYAML is not installed.
        InputRefusedError: the file is not what it should be.
    """
    try:
        import yaml
    except ImportError:
        raise MissingExtraError('models.yaml needs PyYAML to be read: pip install "pochade[export]"') from None
    path = path or _default_file()
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {name: Recipe(name=name, **row) for name, row in rows.items()}
    except (OSError, yaml.YAMLError, TypeError, AttributeError) as error:
        raise InputRefusedError(str(path), [f"it holds no recipes ({error})"]) from None


def choose(recipes: Mapping[str, Recipe], checkpoint: Path, name: str | None) -> Recipe:
    """Row of that name, else the first one that fits the checkpoint.

    Raises:
        UsageError: no such name.
        InputRefusedError: nothing fits.
    """
    if name is not None:
        if name not in recipes:
            raise UsageError(f"recipe {name!r} is unknown; models.yaml has {', '.join(recipes)}")
        return recipes[name]
    for recipe in recipes.values():
        if recipe.fits(checkpoint):
            return recipe
    raise InputRefusedError(str(checkpoint), [f"no recipe fits it; choose one with --recipe: {', '.join(recipes)}"])


def _default_file() -> Path:
    """In a checkout at its top, in an installed package beside this module (setup.py puts it there)."""
    here = Path(__file__).resolve().parent
    return next((p for p in (here.parent / FILE_NAME, here / FILE_NAME) if p.is_file()), here.parent / FILE_NAME)
