"""Cuts that this process keeps in memory, so that going back to a rate, or loading it again, costs no more than loading a file.

A cut is known by the hash of its artifact, in the manifest, and by what it keeps. The least recently used ones go when all together take
more than a quarter of the machine's memory. A model that was loaded from a cut stays whole, and holds what it has mapped, until it closes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache

from edgeq.elastic import Kept
from edgeq.errors import EdgeqError
from edgeq.progress import Progress, silent
from edgeq.runtime.cut import MemoryCut
from edgeq.runtime.elastic_package import ElasticPackage, Size

Key = tuple[str, Kept]


class CutCache:
    """Cuts by key, the most recently used last. max_bytes: of all together; a larger one is not kept at all."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._cuts: OrderedDict[Key, MemoryCut] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        with self._lock:
            return self._total()

    def get(self, key: Key, make: Callable[[], MemoryCut]) -> MemoryCut:
        """The cut of this key, made now if it is not there. It lives at least as long as someone holds it."""
        with self._lock:
            if key in self._cuts:
                self._cuts.move_to_end(key)
                return self._cuts[key]
        cut = make()
        with self._lock:
            self._cuts[key] = cut
            self._cuts.move_to_end(key)
            self._trim()
        return cut

    def make_room(self) -> None:
        """Forget all cuts."""
        with self._lock:
            self._cuts.clear()

    def _trim(self) -> None:
        while self._total() > self.max_bytes:
            self._cuts.popitem(last=False)

    def _total(self) -> int:
        return sum(cut.result.bytes for cut in self._cuts.values())


@lru_cache(maxsize=1)
def process_cuts() -> CutCache:
    """The cache of this process."""
    import psutil

    return CutCache(psutil.virtual_memory().total // 4)


def cached_cut(elastic: ElasticPackage, size: Size, *, progress: Progress = silent) -> MemoryCut:
    """A cut in memory, from the cache of this process if it is there. Raises as `ElasticPackage.cut_to_memory`."""

    def make() -> MemoryCut:
        try:
            return elastic.cut_to_memory(size, progress=progress)
        except EdgeqError:
            if not cache.nbytes:
                raise
        cache.make_room()
        return elastic.cut_to_memory(size, progress=progress)

    cache = process_cuts()
    return cache.get((elastic.record.sha256, size.kept), make)
