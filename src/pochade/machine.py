"""What machine this is: processor and memory, as far as the system tells without extra packages."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Names as in /proc/cpuinfo of those that ONNX Runtime's kernels choose by, x86 first, then Arm.
# fmt: off
_FEATURES = (
    "sse4_1", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f",
    "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2",
)
# fmt: on


@dataclass(frozen=True)
class Memory:
    """Main memory in bytes; None where the system does not tell."""

    total: int | None
    available: int | None


def cpu_model() -> str:
    """Name of the processor, or of its architecture where there is no better."""
    if sys.platform == "darwin":
        name = _output("sysctl", "-n", "machdep.cpu.brand_string")
    elif sys.platform == "win32":
        name = platform.processor()
    else:
        name = _cpuinfo().get("model name", "")
    return name or platform.machine() or "unknown"


def cpu_features() -> list[str]:
    """Vector extensions that matter for speed and that this process may use, in the system's own words."""
    if sys.platform == "linux":
        return [name for name in _listed() if not name.startswith("amx") or has_tiles()]
    # NumPy asks the processor itself, but it names groups of extensions rather than each one.
    import numpy

    extensions = (numpy.show_config(mode="dicts") or {}).get("SIMD Extensions", {})
    return [*extensions.get("baseline", []), *extensions.get("found", [])]


def _listed() -> list[str]:
    """Vector extensions that Linux says the processor has."""
    info = _cpuinfo()
    flags = set(f"{info.get('flags', '')} {info.get('Features', '')}".split())
    return [name for name in _FEATURES if name in flags]


def usable_cores() -> int:
    """Cores this process may run on, which a container or taskset can make fewer than there are."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> Memory:
    """Memory of this machine, or what is left of it inside a container with a limit."""
    if sys.platform == "linux":
        return _linux_memory()
    if sys.platform == "win32":
        return _windows_memory()
    return Memory(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None)


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo."""
    first = _read("/proc/cpuinfo").split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _linux_memory() -> Memory:
    """What /proc/meminfo says, cut to the limit of the control group."""
    kilobytes = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines())
    total = _number(kilobytes.get("MemTotal", ""), 1024)
    available = _number(kilobytes.get("MemAvailable", ""), 1024)
    limit = _number(_read("/sys/fs/cgroup/memory.max"))
    used = _number(_read("/sys/fs/cgroup/memory.current"))
    if limit is None or total is None or limit >= total:
        return Memory(total, available)
    left = max(0, limit - (used or 0))
    return Memory(limit, left if available is None else min(available, left))


def _windows_memory() -> Memory:
    """What GlobalMemoryStatusEx says."""

    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            ("total", ctypes.c_uint64),
            ("available", ctypes.c_uint64),
            ("rest", ctypes.c_uint64 * 5),
        )

    status = Status(length=ctypes.sizeof(Status))
    ctypes.CDLL("kernel32").GlobalMemoryStatusEx(ctypes.byref(status))
    return Memory(int(status.total) or None, int(status.available) or None)


def _number(text: str, unit: int = 1) -> int | None:
    """The number a text begins with, in units; None for 'max' and for nothing."""
    digits = text.split()[0] if text.split() else ""
    return int(digits) * unit if digits.isdecimal() else None


def _read(path: str) -> str:
    """Content of a file of the system, empty where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _output(*command: str) -> str:
    """What a command of the system prints, empty where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, TILE_DATA = 158, 0x1023, 18
"""Number of the system call on x86-64, what it is asked for, and the part of a thread's state that tiles are."""


@functools.cache
def has_tiles() -> bool:
    """Whether this process may multiply tiles of 8-bit numbers (Intel AMX), an order of magnitude faster than others.

    The system grants them to a process that asks, which ONNX Runtime does as well.
    """
    if sys.platform != "linux" or "amx_int8" not in _listed():
        return False
    return bool(ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0)


@functools.cache
def saturates() -> bool:
    """Whether 8-bit products may overflow 16 bits here: on x86 unless the processor is known to have VNNI.

    The exact kernel takes twice the time, the other one gives plainly wrong pictures.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not any("vnni" in name.lower() for name in cpu_features())
