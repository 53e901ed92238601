"""One open component: sessions with IO binding that can be stopped within a node."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from pochade.bundle import Bundle, Component
from pochade.errors import CancelledError, UsageError
from pochade.runtime import heap
from pochade.runtime.opening import Opening, open_component
from pochade.runtime.ort import ort
from pochade.runtime.packed import PackedWeights
from pochade.runtime.parted import PartedSession
from pochade.runtime.placement import Placement
from pochade.runtime.providers import Device

Array = NDArray[Any]

Observer = Callable[[str, Mapping[str, Array], Mapping[str, Array]], None]
"""Told name, inputs and outputs of every component run, as arrays; calibration and scorecards listen this way."""


@dataclass(frozen=True)
class ComponentTimes:
    """Seconds that a component took during one call of a pipeline."""

    opened: list[float] = field(default_factory=list)
    """To open each session, its file read and its weights laid out."""
    ran: list[float] = field(default_factory=list)
    """Each run."""


class Stop:
    """A request to stop, seen by whatever run is under way."""

    def __init__(self) -> None:
        self.requested = False
        self._options: Any = None

    def request(self) -> None:
        """End the current run at its next node; from any thread."""
        self.requested = True
        if self._options is not None:
            self._options.terminate = True

    def check(self) -> None:
        """Raise if a stop was requested.

        Raises:
            CancelledError: it was.
        """
        if self.requested:
            raise CancelledError("stopped on request")

    def guard(self, options: Any) -> None:
        """Let `request` reach the run with these options."""
        self._options = options
        self.check()


UNCAPTURED = -1
"""Graph of runs that are not captured, as ONNX Runtime numbers it."""


class BoundRuns:
    """Runs of a component on values that stay where they are, bound once however often it runs.

    On a card such a run can be captured as a CUDA graph the first time and started as a whole from then on, where the
    session captures: its thousands of kernels then cost the processor one call.
    """

    def __init__(
        self, session: ComponentSession, inputs: Mapping[str, Any], kept: Mapping[str, Any], graph: int
    ) -> None:
        """Bind them; see `ComponentSession.bind`.

        Args:
            session: that is run.
            inputs: arrays or values.
            kept: buffers of outputs.
            graph: that they may be captured as, or `UNCAPTURED`.
        """
        self._session = session
        self._given = dict(inputs)
        brought = session.brought(inputs)
        # What is written to elsewhere is brought here for every run: binding copies it, once.
        self._elsewhere = {
            name: value
            for name, value in inputs.items()
            if not _is_array(value) and value.device_name() != session.home(name)
        }
        self._kept = dict(kept)
        self._fresh = [spec.name for spec in session.component.outputs if spec.name not in kept]
        # A captured run reads and writes the same addresses for ever.
        self._graph = UNCAPTURED if self._fresh or self._elsewhere else graph
        self._binding = session.binding(brought)
        for name, value in kept.items():
            self._binding.bind_ortvalue_output(name, value)

    def run(self) -> dict[str, Any]:
        """Outputs by name, as values on the device.

        Raises:
            CancelledError: a stop was requested before or during the run.
        """
        for name, value in self._session.brought(self._elsewhere).items():
            self._binding.bind_ortvalue_input(name, value)
        for name in self._fresh:
            # Again for every run, or it would write over what the last one gave, which somebody may hold.
            self._binding.bind_output(name, self._session.device.name)
        return self._session.run_bound(self._binding, self._given, [*self._kept, *self._fresh], self._graph)

    def release(self) -> None:
        """Let go of everything; the session does it when it closes, whose memory the binding holds."""
        del self._binding
        for held in (self._given, self._elsewhere, self._kept):
            held.clear()


def put(buffer: Any, content: Any) -> None:
    """Fill a buffer with an array or with what a session gave; on a card that does not pass through the host."""
    if not _is_array(content) and (content.device_name() != buffer.device_name() or content.device_name() == "webgpu"):
        content = content.numpy()
    buffer.update_inplace(np.asarray(content, order="C") if _is_array(content) else content)


def _is_array(value: Any) -> TypeGuard[Array]:
    return isinstance(value, np.ndarray)


class ComponentSession:
    """A component of a bundle, open on a device.

    Tensors stay where they are: inputs may be arrays (bound without a copy on a CPU) or values that an earlier
    session left on the device, outputs are values on the device. Such a value keeps its session alive, weights and
    all, until it is gone itself; `detached` makes one that does not.
    """

    def __init__(
        self,
        bundle: Bundle,
        name: str,
        device: Device,
        threads: int,
        stop: Stop,
        observer: Observer | None = None,
        times: ComponentTimes | None = None,
        adapters: Mapping[str, Array] | None = None,
        packed: PackedWeights | None = None,
        expanded: bool = False,
        sparing: bool = False,
        captures: bool = False,
        at_once: int = 1,
    ) -> None:
        """Open it.

        Args:
            bundle: that it is of.
            name: of the component.
            device: to run on.
            threads: to run with.
            stop: by which a run can be ended.
            observer: told of every run.
            times: added to.
            adapters: low-rank changes by the names of the inputs that take them.
            packed: where packed weights are kept.
            expanded: compute with its weights expanded to 8 bits a number, which it must be able to.
            sparing: take little memory, in more time.
            captures: start runs that are bound once as CUDA graphs.
            at_once: strips to compute at the same time, where it has parts and runs on a CPU.
        """
        start = time.perf_counter()
        self.component = bundle.manifest.components[name]
        self._stop = stop
        self._sparing = sparing
        self._captures, self._threads, self._at_once = captures, threads, at_once
        self._bound: list[BoundRuns] = []
        self._observer = observer
        self._times = ComponentTimes() if times is None else times
        options = ort.RunOptions()
        stop.guard(options)
        how = Opening(threads, dict(adapters or {}), packed, expanded, options, sparing, captures, at_once)
        opened = open_component(bundle, self.component, device, how)
        self.device: Device = opened.device
        """Where it really runs."""
        self.placement: Placement = opened.placement
        self.note: str = opened.note
        """Why that is not where it was to run, if it is not."""
        self._session = opened.session
        # Where the graph wants its inputs: lengths stay on the host, which reads them, also beside a graphics card.
        self._homes = {
            port.name: "cpu" if info.name == "Cpu" else self.device.name
            for port, info in zip(self._session.get_inputs(), self._session.get_input_memory_infos(), strict=True)
        }
        # Adapters and expanded weights; bound as values, since run_with_iobinding ignores ONNX Runtime's own adapters.
        self._constants = {
            port: _value(value, self.device.name) if _is_array(value) else value
            for port, value in opened.constants.items()
        }
        # A run blocks its thread; from a second one, Ctrl-C and close() still get through.
        self._runner = ThreadPoolExecutor(1, thread_name_prefix=f"pochade-{name}")
        self._times.opened.append(time.perf_counter() - start)

    def run(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Outputs by name, as `OrtValue`s on the device, of a single run; see `bind` for many.

        Args:
            inputs: by name; those that the bundle declares optional may be left out.
            outputs: buffers that outputs are written to; those that have none are made anew.

        Raises:
            CancelledError: a stop was requested before or during the run.
        """
        return BoundRuns(self, inputs, outputs or {}, UNCAPTURED).run()

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any] | None = None) -> BoundRuns:
        """Runs with what `run` takes; what changes from one to the next lies in buffers, which `put` fills."""
        self._bound.append(BoundRuns(self, inputs, outputs or {}, len(self._bound) + 1))
        return self._bound[-1]

    def buffer(self, port: str, **lengths: int) -> Any:
        """A value for an input or an output, where the graph reads or writes it; what is in it is undefined.

        Args:
            port: name of the input or output.
            **lengths: of its named axes.
        """
        spec = next(spec for spec in (*self.component.inputs, *self.component.outputs) if spec.name == port)
        shape = [lengths[axis] if isinstance(axis, str) else axis for axis in spec.shape]
        return _empty(shape, spec.dtype, self.home(port))

    def home(self, port: str) -> str:
        """Name of the device where the graph reads an input or writes an output."""
        return self._homes.get(port, self.device.name)

    def brought(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs as values where the graph reads them; runs that are given those have nothing to bring there."""
        values = {}
        for name, value in inputs.items():
            if not _is_array(value) and value.device_name() not in ("cpu", self.device.name):
                value = value.numpy()
            values[name] = _value(value, self.home(name)) if _is_array(value) else value
        return values

    def run_numpy(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name, as arrays.

        Raises:
            UsageError: an input is missing, unknown, or of the wrong type or shape.
        """
        checked = check_inputs(self.component, inputs)
        return {name: to_array(value) for name, value in self.run(checked).items()}

    def detached(self, port: str, value: Any) -> Any:
        """Copy of what an output gave, on the same device, that may outlive this session without holding on to it."""
        if not self.device.on_gpu:
            return to_array(value)
        dtype = next(spec.dtype for spec in self.component.outputs if spec.name == port)
        copy = _empty(value.shape(), dtype, self.device.name)
        put(copy, value)
        return copy

    def close(self) -> None:
        """Give the memory back."""
        for runs in self._bound:
            runs.release()
        self._bound.clear()
        if isinstance(self._session, PartedSession):
            self._session.close()
        del self._session
        self._constants.clear()
        self._runner.submit(heap.return_memory_of_thread)
        self._runner.shutdown(wait=True)
        # Of those beside it, ONNX Runtime's or of strips.
        heap.return_memory_of_ended(max(self._threads, self._at_once + 1))

    def binding(self, inputs: Mapping[str, Any]) -> Any:
        """ONNX Runtime's binding of inputs as values, what is the same in every run among them."""
        binding = self._session.io_binding()
        for name, value in (self._constants | dict(inputs)).items():
            binding.bind_ortvalue_input(name, value)
        return binding

    def run_bound(self, binding: Any, inputs: Mapping[str, Any], names: Sequence[str], graph: int) -> dict[str, Any]:
        """Outputs of a binding that is complete.

        Args:
            binding: of this session.
            inputs: that it was made of, for whoever is told of runs.
            names: of the outputs, in the order in which they were bound.
            graph: that the run is captured as or started from, where the session captures.

        Raises:
            CancelledError: a stop was requested before or during the run.
        """
        start = time.perf_counter()
        with heap.sparing() if self._sparing else contextlib.nullcontext():
            self._run(binding, graph)
        self._times.ran.append(time.perf_counter() - start)
        outputs = dict(zip(names, binding.get_outputs(), strict=True))
        if self._observer is not None:
            # Copies of what is in buffers, which the next run writes over.
            told = [{name: to_array(value) for name, value in part.items()} for part in (inputs, outputs)]
            self._observer(self.component.name, *told)
        return outputs

    def _run(self, binding: Any, graph: int) -> None:
        options = ort.RunOptions()
        if self._captures:
            options.add_run_config_entry("gpu_graph_id", str(graph))
        self._stop.guard(options)
        future = self._runner.submit(self._session.run_with_iobinding, binding, options)
        try:
            future.result()
        except BaseException:
            # Whether Ctrl-C arrived here or the run failed: nothing may still use the buffers afterwards.
            options.terminate = True
            future.exception()
            self._stop.check()
            raise


def _value(array: Array, device: str) -> Any:
    """A value on a device; on a CPU it is the array's own memory."""
    return ort.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"), device, 0)


def _empty(shape: Sequence[int], dtype: str, device: str) -> Any:
    """A value on a device; what is in it is undefined."""
    return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), np.dtype(dtype), device, 0)


def to_array(value: Any) -> Array:
    """Copy of a value on the host that holds on to no session."""
    return value if _is_array(value) else value.numpy().copy()


def read_later(value: Any) -> Callable[[], Array]:
    """Gives a value's array when it is called: nothing leaves a card for a preview that nobody looks at.

    On a card only while somebody else holds the value: it would keep the weights of its session there.
    """
    if _is_array(value) or value.device_name() == "cpu":
        array = to_array(value)
        return lambda: array
    held = weakref.ref(value)

    def read() -> Array:
        if (present := held()) is None:
            raise UsageError("on a graphics card a preview has to be looked at before the next step")
        return to_array(present)

    return read


def check_inputs(component: Component, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The inputs in the declared types, once names and shapes are those the component declares.

    Raises:
        UsageError: they are not.
    """
    declared = {spec.name: spec for spec in component.inputs}
    needed = {name for name, spec in declared.items() if not spec.optional}
    if not needed <= inputs.keys() <= declared.keys():
        raise UsageError(f"{component.name} takes {', '.join(declared)}, not {', '.join(inputs) or 'nothing'}")
    checked = {}
    for name, spec in declared.items():
        if name not in inputs:
            continue
        array = np.asarray(inputs[name]).astype(spec.dtype, copy=False)
        fixed = [(a, d) for a, d in zip(array.shape, spec.shape, strict=False) if isinstance(d, int)]
        if array.ndim != len(spec.shape) or any(a != d for a, d in fixed):
            raise UsageError(f"{component.name}: {name} has shape {array.shape}, expected {spec.shape}")
        checked[name] = array
    return checked
