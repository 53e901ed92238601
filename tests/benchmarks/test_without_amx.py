"""Commands that are kept from AMX."""

from __future__ import annotations

import errno
import platform
import subprocess
import sys

import pytest

from pochade.machine import ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, TILE_DATA, cpu_features

ASK = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print(libc.syscall({ARCH_PRCTL}, {ARCH_REQ_XCOMP_PERM}, {TILE_DATA}), ctypes.get_errno())
"""

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="the number of the call is that of Linux on x86-64",
)


def ask(*before: str) -> tuple[int, int]:
    command = [*before, sys.executable, "-c", ASK]
    result, error = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(result), int(error)


def test_tiles_are_refused_to_a_command_and_its_children() -> None:
    outer = [sys.executable, "-m", "pochade.benchmarks.without_amx"]
    assert ask(*outer) == (-1, errno.EPERM)
    assert ask(*outer, "sh", "-c", '"$@"', "sh") == (-1, errno.EPERM)
    # Without, it is granted, or the processor or the kernel has none; nobody forbids it.
    assert ask() in ((0, 0), (-1, errno.EOPNOTSUPP), (-1, errno.EINVAL))


def test_other_calls_are_not_touched() -> None:
    outer = [sys.executable, "-m", "pochade.benchmarks.without_amx"]
    done = subprocess.run(
        [*outer, sys.executable, "-c", "print(open('/proc/self/status').read())"], capture_output=True
    )
    assert done.returncode == 0 and b"Seccomp:\t2" in done.stdout


def test_a_command_is_needed() -> None:
    done = subprocess.run([sys.executable, "-m", "pochade.benchmarks.without_amx"], capture_output=True, text=True)
    assert done.returncode == 1 and "usage" in done.stderr


def test_a_process_that_is_refused_tiles_has_none() -> None:
    code = "from pochade.machine import cpu_features, has_tiles; print(has_tiles(), 'amx_int8' in cpu_features())"
    ask_ours = [sys.executable, "-c", code]
    outer = [sys.executable, "-m", "pochade.benchmarks.without_amx"]
    assert subprocess.run([*outer, *ask_ours], capture_output=True, text=True, check=True).stdout == "False False\n"
    granted = ask() == (0, 0) and "amx_int8" in cpu_features()
    assert subprocess.run(ask_ours, capture_output=True, text=True, check=True).stdout == f"{granted} {granted}\n"
