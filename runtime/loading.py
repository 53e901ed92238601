"""From a folder or an installed name to an opened pipeline."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from pochade.bundle import Bundle
from pochade.errors import BundleInvalidError, UsageError
from pochade.runtime.companion import Companion
from pochade.runtime.expanded import Expand
from pochade.runtime.families import FAMILIES
from pochade.runtime.locate import resolve
from pochade.runtime.packed import PackedWeights
from pochade.runtime.pipeline import Pipeline, Tiling
from pochade.runtime.providers import choose
from pochade.sizes import read_bytes

MAX_THREADS = 1024
"""More than any machine has cores; a pool of millions would take the system down."""


def load(
    model: str | os.PathLike[str] = "starter",
    *,
    device: str = "auto",
    threads: int | None = None,
    ram: int | str | None = None,
    vram: int | str | None = None,
    tiling: Tiling = "auto",
    expand: Expand = "auto",
    packed_cache: int | str | None = None,
    cuda_graphs: bool = False,
    controlnets: Sequence[str | os.PathLike[str]] = (),
) -> Pipeline:
    """Pipeline of a bundle; use it as a context manager, or `close` it.

    Args:
        model: a bundle folder or an installed name.
        device: `auto`, `cpu`, `cuda` or `webgpu`. A device asked for by name is had or refused; `auto` may fall back to
            the CPU and says so in the result. WebGPU computes what it has kernels for, component by component, and the
            result says what the CPU did.
        threads: per session; None takes the cores this process may use.
        ram: limit of this process's resident set, bytes or a size such as "1.5G"; calls are planned to stay below it,
            or refused. None for no limit.
        vram: the same of the card's memory that sessions take, beside the context that CUDA makes for any program;
            their allocators are held to it, on CUDA. Without effect where `auto` falls back to the CPU, which the
            result says.
        tiling: how the codec works, see `Tiling`.
        expand: whether a model of 4 bits a weight expands them to 8 when it is opened, see `Expand`: two thirds of the
            time, at twice the memory for weights, and on a CPU with VNNI alone. What was rounded to 4 bits stays so.
        packed_cache: disk to keep weights on as ONNX Runtime packs them, bytes or a size such as "4G", so that models
            open in a fraction of the time the next time on a CPU (`pochade.runtime.packed`); None for none. It is
            twice the size of the model's files. Under a limit of memory only what is there is used: writing takes more.
        cuda_graphs: on CUDA, capture each pass of the transformer on its first step and start it as a whole on all
            others: one call of the driver instead of some thousand, at two more passes a text. Without effect where
            `auto` falls back to the CPU, which the result says.
        controlnets: bundles of ControlNets, folders or installed names, for models that can follow a picture.

    Raises:
        BundleNotFoundError: neither a folder nor an installed name.
        BundleInvalidError: damaged, unsafe, or of a family or format this version does not know.
        DeviceUnavailableError: the device cannot be had here.
        UsageError: a value that cannot be meant, a limit of a memory that the device does not have, CUDA graphs where
            they cannot be, a bundle that is no model to paint with, or a ControlNet that does not fit it.
    """
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"threads is {threads}; it must be from 1 to {MAX_THREADS}")
    if tiling not in get_args(Tiling):
        raise UsageError(f"tiling is {tiling!r}; choose {', '.join(get_args(Tiling))}")
    if expand not in get_args(Expand):
        raise UsageError(f"expand is {expand!r}; choose {', '.join(get_args(Expand))}")
    sizes = (("ram", ram), ("vram", vram), ("packed_cache", packed_cache))
    limits = {name: _limit(name, value) for name, value in sizes}
    bundle, family = _open(model)
    if issubclass(family, Companion):
        raise UsageError(f"{bundle.path} {family.use}")
    nets = [_open(net) for net in controlnets]
    chosen = choose(device)
    own, other = ("ram", "vram") if chosen.name == "cpu" else ("vram", "ram")
    if limits[other] is not None and not (other == "vram" and device == "auto"):
        raise UsageError(f"{other} limits a memory that device {chosen.name} does not use; give {own}, or no limit")
    if limits[other] is not None:
        chosen = replace(chosen, note=chosen.note or "there is no card that vram could be a limit of")
    graphs = cuda_graphs and (chosen.on_gpu or device != "auto")
    if cuda_graphs and not graphs:
        chosen = replace(chosen, note=chosen.note or "there is no card that CUDA graphs could run on")
    chosen = replace(chosen, memory_limit=limits["vram"])
    pipeline = family(bundle, chosen, threads, limits[own], tiling)
    pipeline.expand = expand
    if graphs:
        pipeline.use_cuda_graphs()
    if limits["packed_cache"] is not None:
        pipeline.packed = PackedWeights(limits["packed_cache"], adds=limits[own] is None)
    for net, kind in nets:
        pipeline.add_controlnet(kind(net, chosen, threads))
    return pipeline


def _open(model: str | os.PathLike[str]) -> tuple[Bundle, type[Pipeline]]:
    """A bundle and the class of its family."""
    bundle = Bundle.open(resolve(os.fspath(model)))
    family, revision = bundle.manifest.family, bundle.manifest.family_revision
    if family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise BundleInvalidError(str(bundle.path), [f"family {family!r} is unknown here; known are {known}"])
    reads = FAMILIES[family].revisions
    if revision not in reads:
        known = " and ".join(map(str, reads))
        raise BundleInvalidError(
            str(bundle.path), [f"revision {revision} of family {family}, this version reads {known}; export it again"]
        )
    return bundle, FAMILIES[family]


def _limit(name: str, value: int | str | None) -> int | None:
    """Bytes.

    Raises:
        UsageError: none, or no size.
    """
    limit = read_bytes(value, name) if isinstance(value, str) else value
    if limit is not None and (isinstance(limit, bool) or limit <= 0):
        raise UsageError(f"{name} is {limit}; it must be above 0 bytes")
    return limit
