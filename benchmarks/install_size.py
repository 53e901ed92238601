"""Bytes that an installation takes: `python -m pochade.benchmarks.install_size PACKAGE [--json FILE]`.

PACKAGE is a wheel or a checkout of pochade. It is installed twice, as pip does by itself and with nothing that painting
does not need, and the bundle that comes with it paints with either, in a process that sees nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")

LEAN = ("--no-deps", "--no-compile", "onnxruntime", "numpy", "pillow", "tokenizers")
"""Neither what these declare and painting never imports (tokenizers a client of the hub, onnxruntime protobuf), nor
compiled copies of the sources."""

UNUSED = ("**/tests", "onnxruntime/capi/libonnxruntime.so*", "onnxruntime/transformers", "onnxruntime/tools")
"""Not loaded: tests, ONNX Runtime once more for programs in C, and its scripts for other people's models."""

PAINT = """
import sys
sys.path.insert(0, sys.argv[1])
from pochade.cli import main
sys.exit(main(["generate", "a large red star", "-m", "starter", "--steps", "4", "-s", "1", "-o", sys.argv[2]]))
"""


def installed(folder: Path) -> dict[str, int]:
    """Bytes of the files below each entry of a folder of packages, the largest first."""
    sizes = {entry.name: sum(map(_bytes, _files(entry))) for entry in folder.iterdir()}
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def drop_unused(folder: Path) -> None:
    """Delete what painting does not load."""
    for pattern in UNUSED:
        for found in list(folder.glob(pattern)):
            if found.is_dir():
                shutil.rmtree(found)
            else:
                found.unlink()


def paint(folder: Path) -> None:
    """Paint with the packages in a folder alone.

    Raises:
        SystemExit: it does not work.
    """
    picture = folder.with_name(f"{folder.name}.png")
    # Neither the environment's packages nor the user's.
    command = [sys.executable, "-I", "-S", "-c", PAINT, str(folder), str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not picture.exists():
        raise SystemExit(f"the packages in {folder} do not paint: {done.stderr.strip()}")
    picture.unlink()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the sizes there")
    arguments = parser.parse_args()
    package = str(arguments.package.resolve())
    report = {}
    with tempfile.TemporaryDirectory() as work:
        for name, asked in (("pip", [f"{package}[cpu]"]), ("lean", [package, *LEAN])):
            folder = Path(work) / name
            subprocess.run([*PIP, "--target", folder, *asked], check=True)
            if name == "lean":
                drop_unused(folder)
            report[name] = installed(folder)
            paint(folder)
            parts = ", ".join(f"{entry} {size / 1e6:.1f}" for entry, size in report[name].items() if size > 5e5)
            print(f"{name}: {sum(report[name].values()) / 1e6:.1f} MB ({parts})")
    if arguments.json:
        arguments.json.write_text(json.dumps({"format_version": 1, "bytes": report}, indent=2) + "\n", "utf-8")


def _files(entry: Path) -> Iterator[Path]:
    if entry.is_file():
        yield entry
    for folder, _, names in os.walk(entry):
        yield from (Path(folder) / name for name in names)


def _bytes(path: Path) -> int:
    return path.lstat().st_size


if __name__ == "__main__":
    main()
