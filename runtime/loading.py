"""From a folder or an installed name to an opened pipeline."""

from __future__ import annotations

import os

from pochade.bundle import Bundle
from pochade.errors import BundleInvalidError, UsageError
from pochade.runtime.families import FAMILIES
from pochade.runtime.families.meissonic import MeissonicPipeline
from pochade.runtime.locate import resolve
from pochade.runtime.providers import choose

MAX_THREADS = 1024
"""More than any machine has cores; a pool of millions would take the system down."""


def load(
    model: str | os.PathLike[str] = "starter", *, device: str = "auto", threads: int | None = None
) -> MeissonicPipeline:
    """Pipeline of a bundle; use it as a context manager, or `close` it.

    Args:
        model: a bundle folder or an installed name.
        device: `auto`, `cpu` or `cuda`. A device asked for by name is had or refused; `auto` may fall back to the
            CPU and says so in the result.
        threads: per session; None takes the cores this process may use.

    Raises:
        BundleNotFoundError: neither a folder nor an installed name.
        BundleInvalidError: damaged, unsafe, or of a family or format this version does not know.
        DeviceUnavailableError: the device cannot be had here.
    """
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"threads is {threads}; it must be from 1 to {MAX_THREADS}")
    bundle = Bundle.open(resolve(os.fspath(model)))
    family, revision = bundle.manifest.family, bundle.manifest.family_revision
    if family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise BundleInvalidError(str(bundle.path), [f"family {family!r} is unknown here; known are {known}"])
    if revision != FAMILIES[family].revision:
        reads = FAMILIES[family].revision
        raise BundleInvalidError(
            str(bundle.path), [f"revision {revision} of family {family}, this version reads {reads}; export it again"]
        )
    return FAMILIES[family](bundle, choose(device), threads)
