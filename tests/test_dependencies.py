"""Who imports what, read from the sources."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

RUNTIME = {"numpy", "PIL", "tokenizers", "onnxruntime"}
QUANT = {"numpy", "PIL", "onnx", "onnx_ir"}
EXPORT = {"numpy", "tokenizers", "torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "yaml"}
ALLOWED = {"src/pochade": {"numpy"}, "runtime": RUNTIME, "quant": QUANT, "export": EXPORT}
"""Packages that each part may import: those its extra in pyproject.toml brings."""

SHARED = {
    f"src/pochade/{name}.py": {"onnx_ir"}
    for name in ("gpu_graph", "gpu_half", "gpu_strips", "graph_edit", "lora_graph", "strip_parts")
}
"""Files for export and quantization, which may not see each other; no other part imports them."""


def modules(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield node.module or ""


@pytest.mark.parametrize("folder", ALLOWED)
def test_packages_come_with_the_extra(folder: str) -> None:
    known = ALLOWED[folder] | set(sys.stdlib_module_names) | {"pochade"}
    for name, tree in modules(folder):
        strange = {package.partition(".")[0] for package in imported(tree)} - known - SHARED.get(name, set())
        assert not strange, name


def test_one_module_imports_onnxruntime() -> None:
    """It switches the telemetry off first; any other place could come before it."""
    found = [
        name
        for name, tree in modules("src/pochade", "runtime", "quant", "export", "benchmarks")
        if any(package.partition(".")[0] == "onnxruntime" for package in imported(tree))
    ]
    assert found == ["runtime/ort.py"]


def test_the_library_neither_prints_nor_configures_logging() -> None:
    for name, tree in modules("src/pochade", "runtime", "quant", "export"):
        if name.startswith("src/pochade/cli/"):
            continue
        called = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not {"print", "logging.basicConfig", "sys.stdout.write", "sys.stderr.write"} & set(called), name


def test_what_export_and_quantization_share_is_theirs_alone() -> None:
    for name, tree in modules("src/pochade", "runtime"):
        if name in SHARED:
            continue
        shared = {path.removeprefix("src/").removesuffix(".py").replace("/", ".") for path in SHARED}
        assert not shared & set(imported(tree)), name
