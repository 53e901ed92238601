"""What a pipeline took it gives back, also while its results are kept."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest

import pochade
from pochade.runtime.pipeline import Result
from pochade.runtime.session import ComponentSession
from pochade.runtime.tokenizer import PromptTokenizer


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> dict[str, weakref.ref[Any]]:
    """ONNX Runtime's own session of every component that has been closed."""
    refs: dict[str, weakref.ref[Any]] = {}
    close = ComponentSession.close

    def watched(self: ComponentSession) -> None:
        refs[self.component.name] = weakref.ref(self._session._sess)
        close(self)

    monkeypatch.setattr(ComponentSession, "close", watched)
    return refs


def test_each_phase_ends_with_its_weights_gone(bundles: dict[str, Path], closed: dict[str, weakref.ref[Any]]) -> None:
    with pochade.load(bundles["monetico-tiny"], device="cpu", threads=1) as pipe:
        kept = []
        for event in pipe.stream("a fox", width=64, height=64, num_inference_steps=2, guidance_scale=2.0, seed=1):
            kept.append(event)
            gc.collect()
            # Tensors of the phases before are used on every step; sessions that made them are not.
            alive = [name for name, session in closed.items() if session() is not None]
            assert alive == []
    assert isinstance(kept[-1], Result) and len(kept) == 3
    assert set(closed) == {"text_encoder", "condition", "transformer", "sampler", "vq_decoder"}


def test_arrays_of_a_single_component_hold_on_to_nothing(
    bundles: dict[str, Path], closed: dict[str, weakref.ref[Any]]
) -> None:
    with pochade.load(bundles["monetico-tiny"], device="cpu", threads=1) as pipe:
        assert pipe.bundle.tokenizer_path is not None
        ids = PromptTokenizer(pipe.bundle.tokenizer_path).encode("a fox").ids[None]
        states = pipe.run_component("text_encoder", {"input_ids": ids})["text_states"]
    gc.collect()
    assert states.size > 0 and closed["text_encoder"]() is None


CYCLES = """
import sys
import pochade

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6

kept = []
for cycle in range(11):
    with pochade.load("starter", device="cpu") as pipe:
        kept += list(pipe.stream("a large red star", seed=cycle, num_inference_steps=2))
    print(resident())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell a process's memory there")
def test_memory_returns_ten_times_in_a_row() -> None:
    done = subprocess.run([sys.executable, "-c", CYCLES], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    first, *later = map(float, done.stdout.split())
    assert len(later) == 10
    assert max(later) - first < 30, (first, later)


ENDED = """
import ctypes, os, threading, time
from pochade.runtime import heap

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6

def work():
    library = heap._glibc()
    blocks = [library.malloc(1 << 20) for _ in range(40)]
    for block in blocks:
        ctypes.memset(block, 1, 1 << 20)
    together.wait()
    for block in blocks:
        library.free(block)

heap.set_up_heap()
if heap._glibc() is None:
    raise SystemExit("another C library")
heap.return_memory_of_ended(3)
time.sleep(0.1)
together = threading.Barrier(3)
alive = len(os.listdir("/proc/self/task"))
before = resident()
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
while len(os.listdir("/proc/self/task")) > alive:
    time.sleep(0.01)  # joined, and not ended yet
print(before, resident())
heap.return_memory_of_ended(3)
print(resident())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell a process's memory there")
def test_heaps_of_threads_that_ended_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", ENDED], capture_output=True, text=True, timeout=60, check=False)
    if "another C library" in done.stderr:
        pytest.skip("glibc alone keeps heaps")
    before, kept, after = map(float, done.stdout.split())
    # Without it this test would test nothing.
    assert kept - before > 80, done.stderr
    assert after - before < 10
