"""What a small install leaves out, without installing anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from pochade.benchmarks.install_size import drop_unused, installed, paint


def put(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(10))


def test_what_is_not_loaded_goes(tmp_path: Path) -> None:
    used = ["onnxruntime/__init__.py", "onnxruntime/capi/onnxruntime_pybind11_state.so", "numpy/testing/__init__.py"]
    put(tmp_path, *used, "onnxruntime/capi/libonnxruntime.so.1.32.0", "numpy/ma/tests/test_core.py", "alone.py")
    put(tmp_path, "onnxruntime/transformers/models/gpt2/tool.py", "onnxruntime/tools/a.py")
    assert installed(tmp_path) == {"onnxruntime": 50, "numpy": 20, "alone.py": 10}
    drop_unused(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(
        [*used, "alone.py"]
    )


def test_packages_that_do_not_paint_are_told(tmp_path: Path) -> None:
    put(tmp_path, "pochade/__init__.py")
    with pytest.raises(SystemExit, match="do not paint"):
        paint(tmp_path)
