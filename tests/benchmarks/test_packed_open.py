"""Opening a component from packed weights, measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from pochade.benchmarks.packed_open import measure
from pochade.runtime import opening, packed
from pochade.runtime.locate import resolve

needs_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell own memory")


@needs_linux
def test_each_way_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "WORTHWHILE", 100_000)
    monkeypatch.setattr(opening, "PACKED_BYTES", 1000)
    job = {"folder": str(resolve("starter")), "component": "transformer"}
    plain, packing, again = (measure({**job, "cache": cache}) for cache in ("", str(tmp_path), str(tmp_path)))
    assert plain["disk"] == 0 < packing["disk"] == again["disk"]
    assert all(figures["seconds"] > 0 for figures in (plain, packing, again))
