"""The C library's heap, for a process that makes and drops large arrays all the time and ends soon."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_KEPT, _FROM_HEAP = 256 << 20, 32 << 20


def keep_freed_memory() -> None:
    """Use freed memory again instead of giving it back, where the C library is glibc.

    Otherwise every temporary array of more than a few hundred kB is fresh memory, whose pages the system has to clear one by one: a tenth
    of the processor time of a cut.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _KEPT)
        mallopt(_MMAP_THRESHOLD, _FROM_HEAP)
