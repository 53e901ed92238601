"""What glibc does with memory that is free again; other C libraries are left as they are."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import threading
from collections.abc import Iterator
from typing import Any

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_STRIPS, KEPT = 32 << 20, 64 << 20
"""Bytes of the largest blocks that are taken from the heap, and how much of it is kept when free: strips of a codec
have 8 or 16 MB, the sums of their products up to 19."""
_PAD = 128 << 10
"""How much more of the heap is laid out than was asked for, as glibc has it."""
SPARING = 8 << 20
"""Of both where memory is short, in more time. With 20 MB a decoder held more than was planned for it, on a processor
without AMX (benchmarks/RESULTS.md)."""
_keeping = [_PAD, _PAD]
"""What is kept, and laid out beforehand, at present."""
_SMALL = 128 << 10
"""A block that is worth looking at what else is free, when it is."""


def set_up_heap() -> None:
    """Have whole layers mapped, which go back to the system once they are freed, and strips kept in the heap.

    glibc's threshold otherwise grows with the largest block freed, and gigabytes stay with the process. With one of a
    megabyte every strip was made of fresh pages: half of a decoder's time. A thread's heap is made of pieces of 64 MB,
    which go back as soon as they are free whatever the threshold, unless as much is to be laid out.
    """
    _set_up(_STRIPS, KEPT, KEPT)


@contextlib.contextmanager
def sparing() -> Iterator[None]:
    """Keep less of what is free, in all threads, until the end of the block."""
    _set_up(SPARING, SPARING, _PAD)
    try:
        yield
    finally:
        set_up_heap()


def return_freed_memory() -> None:
    """Give what is free on the heap back to the system."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


def return_memory_of_thread() -> None:
    """Give the free end of this thread's own heap back to the system, which `return_freed_memory` leaves.

    To be called in a thread of Python's before it ends: its heap may be its own still when it has been joined.
    """
    if (library := _glibc()) is not None:
        with _letting_go(library):
            library.free(library.malloc(_SMALL))


def return_memory_of_ended(threads: int) -> None:
    """Do what `return_freed_memory` does, and give back the free ends of heaps whose threads have ended.

    Every thread has a heap of its own, and one heap for all of them would break into holes: decoding 1024x1024 took 0.3
    of 1.0 GB more. It outlives its thread, and the next one that starts takes it over; so as many are started.

    Args:
        threads: that have ended.
    """
    if (library := _glibc()) is None:
        return
    together = threading.Barrier(threads)

    def release() -> None:
        block = library.malloc(_SMALL)
        # One that ended before another started would leave it the same heap. Where threads are short, some is left.
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(timeout=1)
        library.free(block)

    # Small blocks at a heap's end that are free, and not joined to what lies before them, would keep it all.
    library.malloc_trim(0)
    started = [threading.Thread(target=release) for _ in range(threads)]
    with _letting_go(library):
        try:
            for thread in started:
                thread.start()
        except RuntimeError:  # the system allows no more
            together.abort()
        for thread in started:
            if thread.ident is not None:
                thread.join()


@contextlib.contextmanager
def _letting_go(library: Any) -> Iterator[None]:
    """Let blocks of `_SMALL` that are freed give back all that is free at the end of their heap."""
    _keep(library, _SMALL, _PAD)
    try:
        yield
    finally:
        _keep(library, *_keeping)


def _set_up(largest: int, kept: int, pad: int) -> None:
    """Take blocks up to so many bytes from the heap, and keep of it as `_keep` does."""
    _keeping[:] = kept, pad
    if (library := _glibc()) is not None:
        library.mallopt(_M_MMAP_THRESHOLD, largest)
        _keep(library, kept, pad)


def _keep(library: Any, kept: int, pad: int) -> None:
    """Keep so many bytes of the heap when free, and lay so many more out than were asked for."""
    library.mallopt(_M_TRIM_THRESHOLD, kept)
    library.mallopt(_M_TOP_PAD, pad)


@functools.cache
def _glibc() -> Any:
    """The C library, None if it is another one."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):  # musl returns large blocks anyway
        return None
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    return library
