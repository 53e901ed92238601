"""What pyproject.toml cannot say: models.yaml lies at the top of the repository and belongs beside its reader."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

RECIPES = "models.yaml"


class BuildWithRecipes(build_py):
    """Copies the recipes into the package; an editable install reads them where they are."""

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if not self.editable_mode:
            self.copy_file(RECIPES, self._target(), preserve_mode=False)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Everything built, the recipes among it."""
        return [*super().get_outputs(include_bytecode), *([] if self.editable_mode else [self._target()])]

    def _target(self) -> str:
        return str(Path(self.build_lib, "pochade", "export", RECIPES))


setup(cmdclass={"build_py": BuildWithRecipes})
