"""What gets into a wheel: all of the package, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

import pochade

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
LISTED: list[str] = PROJECT["tool"]["setuptools"]["packages"]
MOST_BYTES = 16_000_000
"""A wheel that a pip on a slow line still gets, the starter bundle included."""


def sources() -> dict[str, Path]:
    """Every module on disk, by its path inside a wheel."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            found[f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}"] = path
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by way of the sdist from a copy of the tree: builds leave ghosts behind."""
    place = tmp_path_factory.mktemp("build")
    copy = place / "checkout"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "golden", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=left_out)
    sample = copy / "src" / "pochade" / "models" / "sample"
    sample.mkdir(parents=True)
    (sample / "bundle.json").write_text("{}", encoding="utf-8")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(place / "dist"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (place / "dist").glob("*.whl")
    return path


def test_every_folder_of_modules_is_a_listed_package() -> None:
    """One that is missing from the list works in a checkout and is absent from the wheel."""
    folders = {name.rpartition("/")[0].replace("/", ".") for name in sources()}
    assert folders == set(LISTED)
    assert len(LISTED) == len(set(LISTED))
    assert {f"{name.replace('.', '/')}/__init__.py" for name in LISTED} <= sources().keys()


def test_a_wheel_holds_every_module_and_nothing_beside_the_package(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        assert {name.partition("/")[0] for name in names} == {"pochade", f"pochade-{pochade.__version__}.dist-info"}
        assert {name for name in names if name.endswith(".py")} == sources().keys()
        for name, path in sources().items():
            assert archive.read(name) == path.read_bytes(), name
    assert wheel.name == f"pochade-{pochade.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size <= MOST_BYTES


def test_a_wheel_holds_what_is_no_module(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        assert archive.read("pochade/export/models.yaml") == (ROOT / "models.yaml").read_bytes()
        assert archive.read("pochade/models/sample/bundle.json") == b"{}"
        assert archive.read("pochade/py.typed") == b""
        info = f"pochade-{pochade.__version__}.dist-info"
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert b"pochade = pochade.cli:main" in archive.read(f"{info}/entry_points.txt")
        metadata = archive.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0\n" in metadata
    needed = {line for line in metadata.splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line}
    assert {line.split()[1].partition(">")[0] for line in needed} == {"numpy", "pillow", "tokenizers"}


def test_a_wheel_finds_its_recipes(wheel: Path, tmp_path: Path) -> None:
    with ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from pochade.export import recipes; "
        "print(recipes._default_file(), *recipes.read_recipes())"
    )
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True, timeout=600)
    found, *names = done.stdout.split()
    assert found == str(tmp_path / "pochade" / "export" / "models.yaml")
    assert {"meissonic", "monetico"} <= set(names)
