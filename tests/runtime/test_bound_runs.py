"""Runs that are bound once: the same numbers from values that stay where they are."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest

import pochade
from pochade.runtime.session import UNCAPTURED, ComponentSession, Stop, put, to_array

CELLS = 256
"""Of the starter's picture."""


@pytest.fixture
def transformer() -> Iterator[ComponentSession]:
    with pochade.load("starter", device="cpu") as pipe:
        session = ComponentSession(pipe.bundle, "transformer", pipe.device, 1, Stop())
        with closing(session):
            yield session


def inputs_of(session: ComponentSession, seed: int) -> dict[str, Any]:
    random, lengths = np.random.default_rng(seed), {"batch": 1, "height": 16, "width": 16, "steps": 4}
    shapes = {
        spec.name: tuple(lengths[axis] if isinstance(axis, str) else axis for axis in spec.shape)
        for spec in session.component.inputs
    }
    return {
        "tokens": random.integers(0, 1000, shapes["tokens"]),
        "step": np.array([seed % 4]),
        "context": random.standard_normal(shapes["context"]).astype(np.float32),
        "modulation": random.standard_normal(shapes["modulation"]).astype(np.float32),
    }


def test_what_is_put_into_buffers_is_computed_with(transformer: ComponentSession) -> None:
    first, second = inputs_of(transformer, 1), inputs_of(transformer, 2)
    second |= {name: first[name] for name in ("context", "modulation")}
    expected = [to_array(transformer.run(inputs)["features"]) for inputs in (first, second)]
    buffers = {"tokens": transformer.buffer("tokens", batch=1, height=16, width=16), "step": transformer.buffer("step")}
    kept = transformer.buffer("features", batch=1, cells=CELLS)
    runs = transformer.bind({**first, **buffers}, {"features": kept})
    for inputs, wanted in zip((first, second, first), (*expected, expected[0]), strict=True):
        for name, buffer in buffers.items():
            put(buffer, inputs[name])
        found = runs.run()["features"]
        assert np.array_equal(found.numpy(), wanted) and np.array_equal(kept.numpy(), wanted)


def test_an_output_without_a_buffer_is_made_anew(transformer: ComponentSession) -> None:
    inputs = inputs_of(transformer, 1)
    step = transformer.buffer("step")
    runs = transformer.bind({**inputs, "step": step})
    put(step, np.array([0]))
    first = runs.run()["features"]
    before = first.numpy().copy()
    put(step, np.array([3]))
    second = runs.run()["features"]
    assert np.array_equal(first.numpy(), before), "somebody may still look at it"
    assert not np.array_equal(second.numpy(), before)


def test_one_run_writes_where_the_next_one_reads(transformer: ComponentSession) -> None:
    """A value that a session gave fills a buffer as an array does."""
    value = transformer.run(inputs_of(transformer, 1))["features"]
    buffer = transformer.buffer("features", batch=1, cells=CELLS)
    put(buffer, value)
    copy = transformer.detached("features", value)
    assert np.array_equal(buffer.numpy(), value.numpy()) and np.array_equal(copy, value.numpy())
    assert buffer.data_ptr() != value.data_ptr()


def test_runs_that_are_bound_do_not_hold_a_closed_session() -> None:
    with pochade.load("starter", device="cpu") as pipe:
        session = ComponentSession(pipe.bundle, "transformer", pipe.device, 1, Stop())
    kept = session.buffer("features", batch=1, cells=CELLS)
    runs = session.bind(inputs_of(session, 1), {"features": kept})
    runs.run()
    held = weakref.ref(session._session)
    session.close()
    assert held() is None, "its weights would stay"
    assert kept.numpy().any()
    whole = weakref.ref(runs)
    del runs
    assert whole() is None, "nor may the two hold one another until somebody collects garbage"


def test_what_lies_elsewhere_is_brought_for_every_run(
    transformer: ComponentSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime copies a value of another device when it is bound, and what is put there later does not follow."""
    inputs, tokens = inputs_of(transformer, 1), transformer.buffer("tokens", batch=1, height=16, width=16)
    kept = {"features": transformer.buffer("features", batch=1, cells=CELLS)}
    monkeypatch.setattr(transformer, "home", lambda port: "card" if port == "tokens" else "cpu")
    runs = transformer.bind({**inputs, "tokens": tokens}, kept)
    bound: list[str] = []
    real = runs._binding.bind_ortvalue_input

    def bind(name: str, value: Any) -> None:
        bound.append(name)
        real(name, value)

    monkeypatch.setattr(runs._binding, "bind_ortvalue_input", bind)
    for seed in (1, 2):
        put(tokens, inputs_of(transformer, seed)["tokens"])
        runs.run()
    assert bound == ["tokens", "tokens"] and runs._graph == UNCAPTURED
