"""The CUDA provider without a card: needs the package onnxruntime-gpu and a C compiler; `.ci/run` has both."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pochade.benchmarks import null_cuda
from pochade.runtime.ort import ort

HAS_CUDA = "CUDAExecutionProvider" in ort.get_available_providers()


@pytest.mark.skipif(not HAS_CUDA or not shutil.which("cc"), reason="needs onnxruntime-gpu and a C compiler")
def test_the_starter_computes_on_the_card_alone(tmp_path: Path) -> None:
    """In a process of its own: libraries that compute nothing must not stay where others want to compute."""
    command = [sys.executable, "-m", "pochade.benchmarks.null_cuda", "starter", "--json", str(tmp_path / "out.json")]
    subprocess.run(command, check=True)
    report = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert all(row["nodes"] and not row["strays"] for row in report["components"])
    *_, step, picture = report["painting"]
    # What comes down is the number of cells that are not decided yet, and at the end tokens and a picture.
    assert step["to_host"] == 4 and step["to_device"] < 4096
    assert picture["until"] == "picture" and picture["to_host"] < 256 * 256 * 3 * 4 + 4096
    # What is left are buffers of the loop, whose allocator is the process's.
    assert report["after_close"] < 4_000_000
    assert all(peak <= report["planned_peaks"][phase] for phase, peak in report["phase_peaks"].items())


@pytest.mark.skipif(not HAS_CUDA or not shutil.which("cc"), reason="needs onnxruntime-gpu and a C compiler")
def test_passes_that_are_captured_start_as_a_whole(tmp_path: Path) -> None:
    """Nor does such a graph read memory of the host, which would be another's when it is started again."""
    command = [sys.executable, "-m", "pochade.benchmarks.null_cuda", "starter", "--steps", "4", "--cuda-graphs"]
    subprocess.run([*command, "--json", str(tmp_path / "out.json")], check=True)
    first, *_, last, _ = json.loads((tmp_path / "out.json").read_text("utf-8"))["painting"]
    assert first["launches"] > 500 > last["launches"] > 2
    assert not any(row["captured_copies"] or row["captured_allocations"] for row in (first, last))


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_the_libraries_count_what_passes_through_them(tmp_path: Path) -> None:
    """Asked directly, in a process of its own."""
    code = f"""
import ctypes
from pathlib import Path
from pochade.benchmarks.null_cuda import NullCuda
card = NullCuda(Path({str(tmp_path)!r}))
cuda = card._runtime
pointer = ctypes.c_void_p()
assert cuda.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(1 << 20)) == 0
data = ctypes.create_string_buffer(b"x" * 100, 100)
back = ctypes.create_string_buffer(100)
assert cuda.cudaMemcpy(pointer, data, ctypes.c_size_t(100), 1) == 0
assert cuda.cudaMemcpy(back, pointer, ctypes.c_size_t(100), 4) == 0 and back.raw == b"x" * 100
assert cuda.cudaFree(pointer) == 0
counted = card.take()
assert (counted.peak, counted.allocated, counted.to_device, counted.to_host) == (1 << 20, 0, 100, 100)
assert card.take().peak == 0
graph = ctypes.c_void_p()
cuda.cudaStreamBeginCapture(None, 0)
cuda.cudaLaunchKernel()
cuda.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(100))
cuda.cudaMemcpy(pointer, data, ctypes.c_size_t(100), 1)
cuda.cudaStreamEndCapture(None, ctypes.byref(graph))
cuda.cudaGraphLaunch(graph, None)
counted = card.take()
assert (counted.captured_copies, counted.captured_allocations, counted.launches) == (100, 1, 1)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_compiler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="no C compiler"):
        null_cuda.NullCuda(tmp_path)
