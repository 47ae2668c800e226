"""Whether a file's pages are in the system's page cache, and how to get them out of it or into it.

Linux only: `posix_fadvise` with DONTNEED drops pages that are clean and that nobody has mapped, without a word about those it leaves, so
`mincore` is asked afterwards. Without write access to a file mincore answers that everything is resident (Linux 5.2 and newer): what
cannot be shown to have left the cache counts as still there. What lies beneath, a disk's own cache or a virtual machine's host, stays.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_CHUNK = 1 << 20


def resident_fraction(files: Iterable[Path]) -> float | None:
    """Fraction of the files' pages that are in the cache, 0 to 1; None where the system does not say."""
    pages = resident = 0
    for file in files:
        found = _resident_pages(file)
        if found is None:
            return None
        resident, pages = resident + found[0], pages + found[1]
    return resident / pages if pages else None


def drop_pages(files: Iterable[Path]) -> bool:
    """Take the files out of the cache; whether all of their pages have verifiably left."""
    files = tuple(files)
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in files:
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except OSError:
            return False
        try:
            os.fsync(descriptor)  # pages that are not on the disk yet do not go
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            return False
        finally:
            os.close(descriptor)
    return resident_fraction(files) == 0


def read_pages(files: Iterable[Path]) -> None:
    """Read the files once, so that they are in the cache as far as they fit."""
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.read(_CHUNK):
                pass


def _resident_pages(file: Path) -> tuple[int, int] | None:
    """(resident pages, pages) of a file."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        with file.open("rb") as stream:
            n_bytes = os.fstat(stream.fileno()).st_size
            if not n_bytes:
                return 0, 0
            mapped = mmap.mmap(stream.fileno(), n_bytes, access=mmap.ACCESS_READ)
    except OSError:
        return None
    n_pages = -(-n_bytes // mmap.PAGESIZE)
    states = np.zeros(n_pages, dtype=np.uint8)
    view = np.frombuffer(mapped, dtype=np.uint8)
    try:
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(n_bytes), ctypes.c_void_p(states.ctypes.data))
    finally:
        del view  # a mapping that is looked at cannot be closed
        mapped.close()
    return None if failed else (int((states & 1).sum()), n_pages)
