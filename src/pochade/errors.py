"""Everything pochade raises on purpose.

    PochadeError
    ├── UsageError               (ValueError)          exit 2: an argument that cannot be meant
    ├── BundleError                                    exit 3
    │   ├── BundleNotFoundError  (FileNotFoundError)           no such folder or installed name
    │   └── BundleInvalidError   (ValueError)                  damaged, altered, too new, or unsafe
    ├── DeviceUnavailableError   (RuntimeError)        exit 4: the device asked for by name cannot be had
    ├── OutOfBudgetError         (MemoryError)         exit 5: does not fit the memory budget
    ├── InputRefusedError        (ValueError)          exit 6: a checkpoint, picture or other input file
    ├── NetworkNeededError       (ConnectionError)     exit 7: would have to open a socket
    ├── OutputError              (OSError)             exit 1: a result cannot be written
    ├── MissingExtraError        (ImportError)         exit 1: an optional dependency is not installed
    └── CancelledError           (RuntimeError)        exit 130

Leaves also inherit the builtin a caller would expect to catch.
"""

from __future__ import annotations

from collections.abc import Sequence


class PochadeError(Exception):
    """Base of every deliberate error; its text is one sentence that names the thing, the reason and the fix."""

    exit_code = 1


class UsageError(PochadeError, ValueError):
    """An argument that cannot be meant."""

    exit_code = 2


class BundleError(PochadeError):
    """A bundle that cannot be used."""

    exit_code = 3


class BundleNotFoundError(BundleError, FileNotFoundError):
    """Neither a folder nor an installed name."""


class BundleInvalidError(BundleError, ValueError):
    """Damaged, altered, too new or unsafe; `faults` lists every reason found."""

    def __init__(self, where: str, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__(f"bundle {where} is refused: " + "; ".join(faults))


class DeviceUnavailableError(PochadeError, RuntimeError):
    """The device asked for by name cannot be had here."""

    exit_code = 4


class OutOfBudgetError(PochadeError, MemoryError):
    """The request does not fit the memory budget."""

    exit_code = 5


class InputRefusedError(PochadeError, ValueError):
    """A file handed in (checkpoint, picture) that is not what it should be; `faults` lists every reason found."""

    exit_code = 6

    def __init__(self, where: str, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__(f"{where} is refused: " + "; ".join(faults))


class NetworkNeededError(PochadeError, ConnectionError):
    """The request would have to open a socket."""

    exit_code = 7


class OutputError(PochadeError, OSError):
    """A result cannot be written where it was asked for."""


class MissingExtraError(PochadeError, ImportError):
    """An optional dependency is not installed."""


class CancelledError(PochadeError, RuntimeError):
    """Stopped on request."""

    exit_code = 130
