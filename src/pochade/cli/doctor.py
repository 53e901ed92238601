"""`pochade doctor`: whether pictures can be painted here, on what, and how to mend it if not."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from pochade import __version__, machine
from pochade.bundle import Bundle
from pochade.cli.options import add_json
from pochade.cli.text import human_size, plural, table
from pochade.errors import BundleError, DeviceUnavailableError

_PACKAGES = ("numpy", "tokenizers", "pillow")
# In every wheel, but it sends tensors to a server instead of computing anything here.
_NOT_A_DEVICE = "AzureExecutionProvider"


@dataclass(frozen=True)
class OnnxRuntime:
    """What is installed of ONNX Runtime."""

    version: str | None
    """Of the module that was imported; None where none could be."""
    distributions: dict[str, str]
    """Installed packages that bring the module, and their versions."""
    telemetry: bool
    problem: str | None
    fix: tuple[str, ...]


@dataclass(frozen=True)
class Provider:
    """An execution provider that the installed onnxruntime lists."""

    name: str
    device: str | None
    """What `--device` calls it; None where pochade does not use it."""
    loads: bool
    reason: str | None
    """Why it does not."""
    fix: str | None


@dataclass(frozen=True)
class InstalledBundle:
    """A bundle that can be asked for by name."""

    name: str
    path: str
    size: int | None
    problem: str | None


@dataclass(frozen=True)
class Report:
    """Everything the doctor found."""

    ok: bool
    pochade: str
    python: str
    system: str
    packages: dict[str, str | None]
    onnxruntime: OnnxRuntime
    providers: tuple[Provider, ...]
    cpu: str
    cores: int
    usable_cores: int
    cpu_features: list[str]
    memory_total: int | None
    memory_available: int | None
    bundles: tuple[InstalledBundle, ...]
    packed_folder: str
    packed_bytes: int
    """Of weights that are kept packed, see `load(packed_cache=)`."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "doctor",
        help="tell whether pictures can be painted here, and how to mend it if not",
        description="Look at this installation: which devices really load, which packages are in each other's way, "
        "what the processor can do, which bundles are installed. Ends with exit code 4 if nothing can be painted.",
    )
    add_json(parser, "the findings as JSON")
    parser.add_argument("--clear-packed", action="store_true", help="first empty the cache of packed weights")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Examine this installation and print the findings."""
    if arguments.clear_packed:
        from pochade.runtime.packed import PackedWeights

        print(f"removed {human_size(PackedWeights(0).clear())} of packed weights", file=sys.stderr)
    report = examine()
    print(json.dumps(asdict(report), ensure_ascii=False, indent=2) if arguments.json else "\n".join(_lines(report)))
    return 0 if report.ok else DeviceUnavailableError.exit_code


def examine() -> Report:
    """What there is to know about this installation."""
    from pochade.runtime.packed import PackedWeights

    packed = PackedWeights(0)
    try:
        from pochade.runtime.ort import ort
    except Exception as error:  # half-installed wheels fail in many ways, and a doctor must survive them all
        onnxruntime = _onnxruntime(None, str(error))
        providers: tuple[Provider, ...] = ()
        bundles: tuple[InstalledBundle, ...] = ()
    else:
        onnxruntime = _onnxruntime(ort.__version__, None)
        names = [name for name in ort.get_available_providers() if name != _NOT_A_DEVICE]
        providers = tuple(_providers(names))
        bundles = tuple(_bundles())
    memory = machine.memory()
    return Report(
        ok=any(provider.loads and provider.device for provider in providers),
        pochade=__version__,
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        system=platform.platform(),
        packages={name: _version(name) for name in _PACKAGES},
        onnxruntime=onnxruntime,
        providers=providers,
        cpu=machine.cpu_model(),
        cores=os.cpu_count() or 1,
        usable_cores=machine.usable_cores(),
        cpu_features=machine.cpu_features(),
        memory_total=memory.total,
        memory_available=memory.available,
        bundles=bundles,
        packed_folder=str(packed.folder),
        packed_bytes=packed.size,
    )


def _onnxruntime(version: str | None, problem: str | None) -> OnnxRuntime:
    """The installed packages, and what is wrong with them."""
    # Asked by module name: onnxruntime-gpu, -directml and others all bring the module onnxruntime.
    names = sorted(set(importlib.metadata.packages_distributions().get("onnxruntime", ())))
    fix: tuple[str, ...] = ()
    if len(names) > 1:
        problem = f"{' and '.join(names)} are installed at once and overwrite each other's files"
        fix = (f"pip uninstall -y {' '.join(names)}", 'pip install "pochade[gpu]", or "pochade[cpu]" without a GPU')
    elif version is None and names:
        # Uninstalling one of two takes the shared files away and leaves the other's name behind.
        fix = (f"pip install --force-reinstall --no-deps {names[0]}",)
    elif version is None:
        fix = ('pip install "pochade[cpu]", or "pochade[gpu]" for an NVIDIA GPU',)
    return OnnxRuntime(
        version=version,
        distributions={name: importlib.metadata.version(name) for name in names},
        telemetry=os.environ.get("ORT_DISABLE_TELEMETRY") != "1",
        problem=problem,
        fix=fix,
    )


def _providers(listed: Sequence[str]) -> Iterator[Provider]:
    """Whether each provider really loads; that it is listed only says which wheel is installed."""
    from pochade.runtime import webgpu
    from pochade.runtime.providers import PROVIDERS, fix, why_not_listed

    reasons = {name: why_not_listed(name) for name in listed if name != webgpu.PROVIDER}
    # A plug-in, which no onnxruntime lists before it is registered; nothing is missing where nobody installed it.
    if webgpu.is_installed():
        reasons[webgpu.PROVIDER] = webgpu.why_not_webgpu()
    devices = {provider: device for device, provider in PROVIDERS.items()}
    for name, reason in reasons.items():
        device = devices.get(name)
        mend = fix(device, reason) if device and reason else None
        yield Provider(name=name, device=device, loads=reason is None, reason=reason, fix=mend)


def _bundles() -> Iterator[InstalledBundle]:
    """The installed bundles, each opened to see whether it is sound."""
    from pochade.runtime.locate import installed

    for folder in installed():
        try:
            size, problem = Bundle.open(folder).size, None
        except BundleError as error:
            size, problem = None, str(error)
        yield InstalledBundle(name=folder.name, path=str(folder), size=size, problem=problem)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lines(report: Report) -> Iterator[str]:
    """The findings for people."""
    packages = ", ".join(f"{name} {version or 'missing'}" for name, version in report.packages.items())
    memory = "unknown" if report.memory_total is None else human_size(report.memory_total)
    if report.memory_available is not None:
        memory += f", {human_size(report.memory_available)} available"
    cores = f"{plural(report.cores, 'core')}, {report.usable_cores} usable"
    facts = {
        "pochade": report.pochade,
        "python": f"{report.python} on {report.system}",
        "packages": packages,
        "processor": f"{report.cpu}, {cores}",
        "extensions": " ".join(report.cpu_features) or "unknown",
        "memory": memory,
        "onnxruntime": _onnxruntime_line(report.onnxruntime),
    }
    yield table(facts.items())
    yield from _remedy(report.onnxruntime.problem, report.onnxruntime.fix)
    yield ""
    yield "providers"
    for provider in report.providers:
        device = f"--device {provider.device}" if provider.device else "not used by pochade"
        yield f"  {provider.name} ({device}): {'loads' if provider.loads else 'does not load'}"
        yield from _remedy(provider.reason, (provider.fix,) if provider.fix else ())
    if not report.providers:
        yield "  none"
    yield ""
    yield "bundles"
    for bundle in report.bundles:
        yield f"  {bundle.name}: {bundle.path}, {'damaged' if bundle.size is None else human_size(bundle.size)}"
        yield from _remedy(bundle.problem, ())
    if not report.bundles:
        yield "  none installed"
    yield ""
    if report.packed_bytes:
        size = human_size(report.packed_bytes)
        yield f"packed weights: {size} in {report.packed_folder} (--clear-packed removes them)"
        yield ""
    devices = [provider.device for provider in report.providers if provider.loads and provider.device]
    yield f"ready to paint on {', '.join(devices)}" if report.ok else "not ready: no device works"


def _onnxruntime_line(found: OnnxRuntime) -> str:
    installed = " and ".join(f"{name} {version}" for name, version in found.distributions.items()) or "no package"
    telemetry = "on" if found.telemetry else "off"
    return f"{found.version or 'cannot be imported'} ({installed}), telemetry {telemetry}"


def _remedy(problem: str | None, fix: tuple[str, ...]) -> Iterator[str]:
    """What is wrong, indented below what it is about, and the commands that mend it."""
    if problem:
        yield f"    {problem}"
    for command in fix:
        yield f"    fix: {command}"
