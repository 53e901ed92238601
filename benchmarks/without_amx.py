"""Run a command as if the processor had no AMX: `python -m pochade.benchmarks.without_amx COMMAND ...`, on Linux.

Few processors that people paint with have AMX (Intel's tile registers), so what a server with it measures says little
about them. A program may use the tiles only once the system has granted them (`arch_prctl`, ARCH_REQ_XCOMP_PERM), which
ONNX Runtime, PyTorch and OpenVINO all ask for; a filter on system calls (seccomp) refuses that, for the command and
everything that it starts.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

from pochade.machine import ARCH_PRCTL, ARCH_REQ_XCOMP_PERM

AUDIT_ARCH_X86_64 = 0xC000003E
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | 1  # with EPERM
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
NUMBER, ARCHITECTURE, ARGUMENT = 0, 4, 16
"""Offsets in `struct seccomp_data`."""

PROGRAM = (
    (LOAD, 0, 0, ARCHITECTURE),
    (JUMP_IF_EQUAL, 0, 5, AUDIT_ARCH_X86_64),
    (LOAD, 0, 0, NUMBER),
    (JUMP_IF_EQUAL, 0, 3, ARCH_PRCTL),
    (LOAD, 0, 0, ARGUMENT),
    (JUMP_IF_EQUAL, 0, 1, ARCH_REQ_XCOMP_PERM),
    (RETURN, 0, 0, REFUSE),
    (RETURN, 0, 0, ALLOW),
)
"""Instructions of the filter: code, steps to skip if equal and if not, operand."""


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def refuse_amx() -> None:
    """Keep the tiles from this process and its children, from now on.

    Raises:
        OSError: the system cannot filter its calls.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    content = b"".join(struct.pack("=HBBI", *instruction) for instruction in PROGRAM)
    held = ctypes.create_string_buffer(content, len(content))
    described = _Filter(len(PROGRAM), ctypes.addressof(held))
    for call in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(described), 0, 0),
    ):
        if libc.prctl(*call) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"no filter of system calls: {os.strerror(error)}")


def main() -> None:
    """Command line."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m pochade.benchmarks.without_amx COMMAND ...")
    refuse_amx()
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
