"""A component in parts (`pochade.strip_parts`), open: several strips at a time, each computed by one thread."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pochade.bundle import Component
from pochade.errors import BundleInvalidError
from pochade.runtime import heap
from pochade.runtime.ort import ort

Array = NDArray[Any]

_LAYER = 1 << 20
"""Bytes from which on memory of what was read last is taken again for what is written next."""


class _Layers:
    """Memory of layers: pages that were written once are not asked for again, nor those that nobody needs kept."""

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = {}
        self._blocks: dict[str, mmap.mmap] = {}
        """By the value that lies in it."""

    def new(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array for a value; what is in it is undefined."""
        size = int(np.prod(shape)) * dtype.itemsize
        if size < _LAYER:
            return np.empty(shape, dtype)
        if waiting := self._free.get(size):
            block = waiting.pop()
        else:
            self._free.clear()
            # Of numpy's own, which asks for huge pages, clearing took a sixth of a decoder's time.
            block = mmap.mmap(-1, size)
        self._blocks[name] = block
        return np.frombuffer(block, dtype).reshape(shape)

    def free(self, name: str) -> None:
        """Take back a value's memory; nobody may read it any more."""
        if (block := self._blocks.pop(name, None)) is not None:
            self._free.setdefault(len(block), []).append(block)


class _Part:
    """A part that is open."""

    def __init__(self, session: Any, strips: Mapping[str, str]) -> None:
        self.session = session
        ports = [port.name for port in session.get_inputs()]
        self.strips = {port: strips[port] for port in ports if port in strips}
        """Ports that differ from strip to strip, by name, and the values they are strips of."""
        self.wholes = [port for port in ports if port not in strips]
        self.results = [port.name for port in session.get_outputs()]

    @property
    def reads(self) -> set[str]:
        """Names of values."""
        return {*self.strips.values(), *self.wholes}


class Binding:
    """What a run is given and gives, bound as with ONNX Runtime's own."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}
        """By name, in order; None where there is no value to write to."""

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        """Give an `OrtValue`."""
        self.inputs[name] = value

    def bind_output(self, name: str, _: str) -> None:
        """Ask for an output."""
        self.outputs[name] = None

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        """Ask for an output in an `OrtValue` that is there."""
        self.outputs[name] = value

    def get_outputs(self) -> list[Any]:
        """The outputs as `OrtValue`s, in the order in which they were asked for."""
        return list(self.outputs.values())


class PartedSession:
    """All parts of a component, to be used as ONNX Runtime's session of the whole."""

    def __init__(self, component: Component, where: str, sessions: Sequence[Any], at_once: int) -> None:
        """Take the sessions of the parts.

        Args:
            component: that has them.
            where: bundle to name where they do not fit together.
            sessions: one for each, of one thread.
            at_once: strips to compute at a time.

        Raises:
            BundleInvalidError: a part reads what no earlier one gives, or none gives an output.
        """
        pairs = zip(component.parts, sessions, strict=True)
        self._parts = [_Part(session, part.strips) for part, session in pairs]
        self._outputs = [spec.name for spec in component.outputs]
        self._last: dict[str, int] = {}
        """The last part to read a value, by its name."""
        known = {spec.name for spec in component.inputs}
        for i, (part, opened) in enumerate(zip(component.parts, self._parts, strict=True)):
            if unknown := sorted(opened.reads - known):
                raise BundleInvalidError(where, [f"{part.file} reads {unknown[0]!r}, which no part before it gives"])
            known.update(opened.results)
            self._last.update(dict.fromkeys(opened.reads, i))
        if missing := sorted(set(self._outputs) - known):
            raise BundleInvalidError(where, [f"no part of {component.name} gives {missing[0]!r}"])
        self._at_once = at_once
        self._workers = ThreadPoolExecutor(at_once, thread_name_prefix=f"pochade-{component.name}")

    def get_providers(self) -> list[str]:
        """Names of execution providers."""
        providers: list[str] = self._parts[0].session.get_providers()
        return providers

    def get_inputs(self) -> list[Any]:
        """None that have a home of their own: all are read from the host."""
        return []

    def get_input_memory_infos(self) -> list[Any]:
        """See `get_inputs`."""
        return []

    def io_binding(self) -> Binding:
        """What to bind inputs and outputs to."""
        return Binding()

    def run_with_iobinding(self, binding: Binding, options: Any) -> None:
        """Compute the outputs that are asked for.

        Args:
            binding: complete.
            options: ONNX Runtime's of a run, by which this one can be ended.
        """
        values: dict[str, Array] = {name: value.numpy() for name, value in binding.inputs.items()}
        layers = _Layers()
        for i, part in enumerate(self._parts):
            if part.strips:
                values |= self._run_strips(part, values, layers, options)
            else:
                feeds = {name: values[name] for name in part.wholes}
                values |= zip(part.results, part.session.run(part.results, feeds, options), strict=True)
            for name in [name for name in values if self._last.get(name, -1) <= i and name not in self._outputs]:
                del values[name]
                layers.free(name)
        for name, kept in binding.outputs.items():
            if kept is None:
                binding.outputs[name] = ort.OrtValue.ortvalue_from_numpy(values[name])
            else:
                kept.update_inplace(values[name])

    def close(self) -> None:
        """End the threads, and let the system have what their heaps still hold; sessions go with the last reference."""
        together = threading.Barrier(self._at_once)

        def release() -> None:
            together.wait()
            heap.return_memory_of_thread()

        wait([self._workers.submit(release) for _ in range(self._at_once)])
        self._workers.shutdown()
        self._parts.clear()

    def _run_strips(
        self, part: _Part, values: Mapping[str, Array], layers: _Layers, options: Any
    ) -> Mapping[str, Array]:
        """What a part gives of all strips, each value with an axis of strips before its own."""
        count = len(values[next(iter(part.strips.values()))])
        results: dict[str, Array] = {}
        rest, lock = iter(range(count)), threading.Lock()

        def keep(strip: int, given: Sequence[Any]) -> None:
            """Copy what ONNX Runtime made for a strip; the first tells how large all are."""
            arrays = {name: value.numpy() for name, value in zip(part.results, given, strict=True)}
            with lock:
                if not results:
                    results.update({name: layers.new(name, (count, *a.shape), a.dtype) for name, a in arrays.items()})
            for name, array in arrays.items():
                results[name][strip] = array

        def work() -> None:
            binding = part.session.io_binding()
            wholes = {name: ort.OrtValue.ortvalue_from_numpy(values[name]) for name in part.wholes}
            for name, value in wholes.items():
                binding.bind_ortvalue_input(name, value)
            for strip in rest:
                # Held until the strip is done: values are on the arrays' own memory.
                given = {port: _strip(values[name], strip) for port, name in part.strips.items()}
                for port, value in given.items():
                    binding.bind_ortvalue_input(port, value)
                known = bool(results)
                for name in part.results:
                    if known:
                        array = results[name][strip]
                        binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
                    else:
                        binding.bind_output(name, "cpu")
                part.session.run_with_iobinding(binding, options)
                if not known:
                    keep(strip, binding.get_outputs())

        self._together(work, min(self._at_once, count), options)
        return results

    def _together(self, work: Callable[[], None], times: int, options: Any) -> None:
        """Let as many threads do the same, and wait for all of them, also where one fails."""
        futures = [self._workers.submit(work) for _ in range(times)]
        try:
            for future in futures:
                future.result()
        except BaseException:
            options.terminate = True
            wait(futures)
            raise


def _strip(values: Array, strip: int) -> Any:
    """One strip's part of a value, on the same memory."""
    return ort.OrtValue.ortvalue_from_numpy(values[strip : strip + 1].reshape(values.shape[1:]))
