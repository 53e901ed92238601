"""What every pipeline has: an opened bundle, sessions that live for one phase, and one shape of result."""

from __future__ import annotations

import contextlib
import inspect
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pochade.bundle import Bundle
from pochade.errors import BundleInvalidError, UsageError
from pochade.machine import usable_cores
from pochade.runtime.arguments import check_number
from pochade.runtime.expanded import Expand
from pochade.runtime.heap import return_freed_memory, return_memory_of_ended
from pochade.runtime.lora import Lora, LoraNames, open_lora, stacked
from pochade.runtime.memory import BARE_PROCESS, resident_memory
from pochade.runtime.packed import PackedWeights
from pochade.runtime.plan import ON_CPU, Plan, Way, choose, with_split
from pochade.runtime.providers import CPU, Device
from pochade.runtime.session import ComponentSession, ComponentTimes, Observer, Stop

Tiling = Literal["auto", "on", "off"]
"""How a codec works on a picture: `auto` and `on` a strip of rows at a time, `on` with as little memory as possible,
`auto` if the limit of memory asks for that; `off` the whole picture at once. All paint the same picture, up to the
rounding of what quantized codecs keep in float16."""


OPEN_AT_ONCE = 4
"""Sessions that a call has open at the same time, at most: transformer, sampler, a ControlNet, a preview's decoder."""

MAX_SCALE = 1000.0
"""Of an adapter; far beyond what leaves a picture."""


@dataclass(frozen=True)
class StepEvent:
    """One denoise step is done."""

    index: int
    """Steps done so far, over all images of the call: 1 ... total."""
    total: int
    """Steps of the whole call."""
    elapsed: float
    """Seconds since the call began."""
    image_index: int
    """Which image of the call the step belongs to."""
    preview: Callable[[], Image.Image] = field(repr=False)
    """Small picture of the state, decoded when called; at the price of a decode. On a graphics card before the next
    step only, where what a step gave makes room for the next."""


@dataclass(frozen=True)
class Result:
    """What a call made, and how."""

    images: list[Image.Image]
    seeds: list[int]
    """Seed of each image; given alone it paints that image again."""
    settings: Mapping[str, Any]
    """Every value that was used, defaults filled in."""
    timings: Mapping[str, float]
    """Seconds per phase."""
    peak_memory: int | None
    """Largest resident set of the process so far, bytes; None where the system does not tell."""
    providers: Mapping[str, str]
    """Execution provider that really ran each component, and which nodes of it ran elsewhere, if any."""
    notes: tuple[str, ...]
    """What the user should know: a prompt that was cut, a device that was not taken."""
    components: Mapping[str, ComponentTimes] = field(default_factory=dict, repr=False)
    """What opening and running each component took."""
    tokens: tuple[NDArray[np.int64], ...] = field(default=(), repr=False)
    """Final token grid of each image, for models that have one."""


class Pipeline(ABC):
    """An opened bundle. Sessions are opened when their phase begins and closed when it ends."""

    revisions: ClassVar[tuple[int, ...]]
    """Of component and tensor names, as far as they are read, the newest last; a bundle of another one is refused."""
    components: ClassVar[tuple[str, ...]] = ()
    """Names that a bundle of the family must have."""
    lora_names: ClassVar[LoraNames]
    """How adapters name the layers of the family."""

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        threads: int | None = None,
        memory_limit: int | None = None,
        tiling: Tiling = "auto",
    ) -> None:
        missing = [name for name in self.components if name not in bundle.manifest.components]
        if missing:
            raise BundleInvalidError(str(bundle.path), [f"component {name} is missing" for name in missing])
        self.bundle = bundle
        self.device = device
        self.threads = threads or usable_cores()
        self.memory_limit = memory_limit
        """Bytes that calls are planned for: of this process on a CPU, else of the card."""
        self.tiling = tiling
        self.expand: Expand = "auto"
        """Whether weights of few bits are expanded to 8 bits a number."""
        self.cuda_graphs = False
        """Whether passes of the transformer are started as CUDA graphs; `use_cuda_graphs` says so."""
        self.plan: Plan | None = None
        """How the latest call keeps within the limit, known before it begins; None if the bundle tells too little."""
        self.observer: Observer | None = None
        self.packed: PackedWeights | None = None
        """Where weights are kept packed, for sessions on a CPU."""
        self._loras: list[Lora] = []
        self._stop = Stop()
        self._closed = False
        self._providers: dict[str, str] = {}
        self._timings: dict[str, float] = {}
        self._components: dict[str, ComponentTimes] = {}
        self._now: str | None = None
        """The phase that the present call is in, as far as it runs in one piece."""
        self._fallen: dict[str, str] = {}
        """Why a component does not run on the device."""
        self._read_bundle(bundle)

    @abstractmethod
    def _read_bundle(self, bundle: Bundle) -> None:
        """Keep what the family needs of a bundle beside its components.

        Raises:
            BundleInvalidError: it is not there.
        """

    def add_controlnet(self, net: Pipeline) -> None:
        """Let the calls to come follow a picture with this opened ControlNet, beside those that were added before.

        Raises:
            UsageError: the family takes none, or not this one.
        """
        family = self.bundle.manifest.family
        raise UsageError(f"{self.bundle.path}, a model of {family}, takes no ControlNet; leave {net.bundle.path} away")

    def use_cuda_graphs(self) -> None:
        """Capture each pass of the transformer on its first step and start it as a whole on all others, from now on.

        Raises:
            UsageError: the device is not `cuda`, or the model is of a family that runs nothing again and again.
        """
        if self.device.name != "cuda":
            raise UsageError(f"CUDA graphs need device cuda, not {self.device.name}; leave them away")
        self.cuda_graphs = True

    def run_component(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run one component alone, arrays in and out; `bundle.manifest` tells names, types and shapes.

        Raises:
            UsageError: no such component, inputs that do not fit it, or the pipeline is closed.
        """
        return self.run_calls(name, [inputs])[0]

    def run_calls(self, name: str, calls: Sequence[Mapping[str, NDArray[Any]]]) -> list[dict[str, NDArray[Any]]]:
        """Run one component on several inputs; it is opened once, and not at all for none.

        Raises:
            UsageError: as `run_component`.
        """
        if name not in self.bundle.manifest.components:
            raise UsageError(f"there is no component {name!r}; there are {', '.join(self.bundle.manifest.components)}")
        if not calls:
            return []
        self._begin()
        with self._open(name) as session:
            return [session.run_numpy(inputs) for inputs in calls]

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        callback_on_step_end: Callable[[StepEvent], None] | None = None,
        **arguments: Any,
    ) -> Result:
        """Paint; takes the arguments of `stream`.

        Args:
            prompt: what to paint, or several prompts for as many pictures.
            callback_on_step_end: called after every denoise step; what it raises ends the call.
            **arguments: see `stream` of the family.
        """
        for event in self.stream(prompt, **arguments):
            if isinstance(event, Result):
                return event
            if callback_on_step_end:
                callback_on_step_end(event)
        raise AssertionError("stream ended without a result")

    @abstractmethod
    def stream(self, prompt: str | Sequence[str], *_: Any, **arguments: Any) -> Iterator[StepEvent | Result]:
        """Yield a `StepEvent` after every denoise step and last the `Result`; each family documents its arguments."""

    def read_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of `stream` that a picture's settings stand for, so that it can be painted again.

        Raises:
            UsageError: a picture that cannot be painted from its settings alone.
        """
        if settings.get("loras"):
            raise UsageError("it was painted with a LoRA, which it does not carry")
        names = inspect.signature(self.stream).parameters.keys() - {"prompt"}
        return {name: settings[name] for name in names if settings.get(name) is not None}

    @property
    def loras(self) -> tuple[Lora, ...]:
        """Adapters that the next call paints with, their changes added up."""
        return tuple(self._loras)

    def load_lora(self, path: str | os.PathLike[str], scale: float = 1.0, *, partial: bool = False) -> Lora:
        """Paint with an adapter from the next call on, beside those that are loaded; the bundle stays as it is.

        Args:
            path: a `.safetensors` file of PEFT, diffusers, Kohya or Tencent, or the folder that PEFT writes.
            scale: strength, any finite number.
            partial: use the keys that can be used, where otherwise one that cannot refuses the file.

        Returns:
            What was found; hand it to `unload_lora`.

        Raises:
            InputRefusedError: it is no LoRA of this model.
            UsageError: a scale that is no number, or a bundle that takes no LoRA.
        """
        check_number("scale", scale, -MAX_SCALE, MAX_SCALE)
        lora = open_lora(Path(path), float(scale), self.bundle, self.lora_names, partial)
        self._loras.append(lora)
        return lora

    def unload_lora(self, lora: Lora | None = None) -> None:
        """Paint without an adapter again, or without any.

        Raises:
            UsageError: it is not loaded.
        """
        if lora is not None and not any(lora is loaded for loaded in self._loras):
            raise UsageError(f"{lora} is not loaded")
        self._loras = [loaded for loaded in self._loras if lora is not None and loaded is not lora]

    def cancel(self) -> None:
        """Stop the call that is under way, from any thread: it raises `CancelledError` within a graph node."""
        self._stop.request()

    def close(self) -> None:
        """End the pipeline and give its memory back; a call under way is cancelled."""
        self._closed = True
        self._stop.request()
        # Of sessions that were open at the same time each left heaps, which still held what another one read.
        return_memory_of_ended(OPEN_AT_ONCE * self.threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> None:
        """Start a call with a clean slate.

        Raises:
            UsageError: the pipeline is closed.
        """
        if self._closed:
            raise UsageError("the pipeline is closed; load the bundle again")
        self._stop = Stop()
        self._providers, self._timings, self._components, self._fallen = {}, {}, {}, {}

    def _plan(self, ways: Callable[[int], Mapping[str, Sequence[Way]]] | None) -> Plan | None:
        """How to keep a call within the limit; None where there is none and the bundle does not tell enough.

        Args:
            ways: to run each phase, by what is taken already; None where the bundle does not tell.

        Raises:
            BundleInvalidError: there is a limit, and the bundle does not tell.
            OutOfBudgetError: nothing fits.
        """
        if ways is None:
            if self.memory_limit is None:
                return None
            raise BundleInvalidError(
                str(self.bundle.path), ["a memory limit needs what it does not tell, being an old one; export it again"]
            )
        if self.device.on_gpu:
            # A card's limit counts what sessions take, beside the context that CUDA makes for any program.
            return choose(with_split(ways(0)), self.memory_limit)
        return choose(ways(resident_memory() or BARE_PROCESS), self.memory_limit)

    def _lora_settings(self) -> dict[str, Any]:
        """For a picture's settings; nothing without adapters."""
        loras = [{"file": lora.path.name, "scale": lora.scale} for lora in self._loras]
        return {"loras": loras} if loras else {}

    def _adapter_bytes(self, component: str) -> int:
        """Bytes of all changes of a component."""
        return sum(lora.nbytes(component) for lora in self._loras)

    def _way(self, phase: str) -> Way:
        """How to run a phase of the present call."""
        return self.plan.phases[phase] if self.plan is not None else Way(0)

    def _device_for(self, phase: str | None) -> Device:
        """Where to run a phase of the present call; None for what belongs to none."""
        return CPU if phase is not None and self._way(phase).on_cpu else self.device

    @contextlib.contextmanager
    def _phase(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to the phase's timing; what is opened inside runs where the plan says."""
        start = time.perf_counter()
        self._now = phase
        try:
            yield
        finally:
            self._now = None
            self._timings[phase] = self._timings.get(phase, 0.0) + time.perf_counter() - start

    @contextlib.contextmanager
    def _open(
        self,
        name: str,
        bundle: Bundle | None = None,
        called: str | None = None,
        expanded: bool = False,
        captures: bool = False,
    ) -> Iterator[ComponentSession]:
        """A session of a component.

        Args:
            name: of the component.
            bundle: another one, if it is not the pipeline's.
            called: what it is told of as, if that is not its name.
            expanded: compute with weights that are expanded to 8 bits.
            captures: start runs that are bound once as CUDA graphs.
        """
        # What earlier phases freed in small pieces; up to 30 MB below the weights to come.
        return_freed_memory()
        times = self._components.setdefault(called or name, ComponentTimes())
        source = bundle or self.bundle
        lora = source.manifest.components[name].lora if source is self.bundle else None
        adapters = stacked(self._loras, name, lora.dtype) if lora is not None else {}
        device = self._device_for(self._now)
        way = self._way(self._now) if self._now is not None else Way(0)
        session = ComponentSession(
            source,
            name,
            device,
            self.threads,
            self._stop,
            self.observer,
            times,
            adapters,
            self.packed,
            expanded,
            sparing=way.recompute,
            captures=captures,
            at_once=way.at_once,
        )
        self._providers[called or name] = str(session.placement)
        if note := session.note or ("" if device is self.device else f"{name} runs {ON_CPU.means}"):
            self._fallen[called or name] = note
        try:
            yield session
        finally:
            session.close()
