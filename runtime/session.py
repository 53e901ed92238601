"""One open component: sessions with IO binding that can be stopped within a node."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pochade.bundle import Bundle, Component
from pochade.errors import CancelledError, UsageError
from pochade.runtime import heap
from pochade.runtime.opening import Opening, open_component
from pochade.runtime.ort import ort
from pochade.runtime.packed import PackedWeights
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
        """
        start = time.perf_counter()
        self.component = bundle.manifest.components[name]
        self._stop = stop
        self._sparing = sparing
        self._observer = observer
        self._times = ComponentTimes() if times is None else times
        options = ort.RunOptions()
        stop.guard(options)
        opened = open_component(
            bundle, self.component, device, Opening(threads, dict(adapters or {}), packed, expanded, options, sparing)
        )
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
            port: _value(value, self.device.name) if isinstance(value, np.ndarray) else value
            for port, value in opened.constants.items()
        }
        # A run blocks its thread; from a second one, Ctrl-C and close() still get through.
        self._runner = ThreadPoolExecutor(1, thread_name_prefix=f"pochade-{name}")
        self._times.opened.append(time.perf_counter() - start)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name, as `OrtValue`s on the device; inputs that the bundle declares optional may be left out.

        Raises:
            CancelledError: a stop was requested before or during the run.
        """
        binding = self._session.io_binding()
        for name, value in self._constants.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in self.brought(inputs).items():
            binding.bind_ortvalue_input(name, value)
        names = [output.name for output in self.component.outputs]
        for name in names:
            binding.bind_output(name, self.device.name)
        start = time.perf_counter()
        with heap.sparing() if self._sparing else contextlib.nullcontext():
            self._run(binding)
        self._times.ran.append(time.perf_counter() - start)
        outputs = dict(zip(names, binding.get_outputs(), strict=True))
        if self._observer is not None:
            self._observer(self.component.name, _arrays(inputs), _arrays(outputs))
        return outputs

    def brought(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs as values where the graph reads them; runs that are given those have nothing to bring there."""
        values = {}
        for name, value in inputs.items():
            if not isinstance(value, np.ndarray) and value.device_name() not in ("cpu", self.device.name):
                value = value.numpy()
            values[name] = _value(value, self._homes[name]) if isinstance(value, np.ndarray) else value
        return values

    def run_numpy(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name, as arrays.

        Raises:
            UsageError: an input is missing, unknown, or of the wrong type or shape.
        """
        checked = check_inputs(self.component, inputs)
        return {name: to_array(value) for name, value in self.run(checked).items()}

    def detached(self, value: Any) -> Any:
        """Copy of an output on the same device that may outlive this session without holding on to it."""
        # By way of the host, once for each text: ONNX Runtime cannot copy between two values on a card.
        array = to_array(value)
        return array if not self.device.on_gpu else _value(array, self.device.name)

    def close(self) -> None:
        """Give the memory back."""
        del self._session
        self._constants.clear()
        # What runs took from the heap of the thread they ran in.
        self._runner.submit(heap.return_memory_of_thread)
        self._runner.shutdown(wait=True)

    def _run(self, binding: Any) -> None:
        options = ort.RunOptions()
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
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device, 0)


def to_array(value: Any) -> Array:
    """Copy of a value on the host that holds on to no session."""
    return value if isinstance(value, np.ndarray) else value.numpy().copy()


def read_later(value: Any) -> Callable[[], Array]:
    """Gives a value's array when it is called: nothing leaves a card for a preview that nobody looks at.

    On a card only while somebody else holds the value: it would keep the weights of its session there.
    """
    if isinstance(value, np.ndarray) or value.device_name() == "cpu":
        array = to_array(value)
        return lambda: array
    held = weakref.ref(value)

    def read() -> Array:
        if (present := held()) is None:
            raise UsageError("on a graphics card a preview has to be looked at before the next step")
        return to_array(present)

    return read


def _arrays(values: Mapping[str, Any]) -> dict[str, Array]:
    return {name: v if isinstance(v, np.ndarray) else v.numpy() for name, v in values.items()}


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
