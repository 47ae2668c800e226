"""Cuts that this process keeps in memory, and the models loaded from them: going back to a rate, or loading it again, costs a context.

A cut is known by the hash of its artifact, in the manifest, and by what it keeps. The least recently used ones go when all together take
more than a quarter of the machine's memory; a model counts as much as its file, for some runtimes rearrange all of it. Sessions share a
model: it goes when the cache and all of them have closed it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from edgeq.elastic import Kept
from edgeq.errors import EdgeqError
from edgeq.progress import Progress, silent
from edgeq.runtime.cut import MemoryCut
from edgeq.runtime.elastic_package import ElasticPackage, Size
from edgeq.runtime.engine import Model

Key = tuple[str, Kept]


@dataclass(frozen=True)
class _Held:
    """A cut, and what was loaded from it by GPU; None is the CPU."""

    cut: MemoryCut
    models: dict[int | None, Model] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return self.cut.result.bytes + sum(model.size_bytes for model in self.models.values())


class CutCache:
    """Cuts by key, the most recently used last. max_bytes: of all together; a larger one is not kept at all."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._held: OrderedDict[Key, _Held] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        with self._lock:
            return self._total()

    def get(self, key: Key, make: Callable[[], MemoryCut]) -> MemoryCut:
        """The cut of this key, made now if it is not there. It lives at least as long as someone holds it."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key].cut
        cut = make()
        with self._lock:
            self._drop(key)
            self._held[key] = _Held(cut)
            self._trim()
        return cut

    def model(self, key: Key, gpu: int | None, load: Callable[[], Model]) -> Model:
        """The model of a cut, loaded now if it is not there. Close it as if it were the caller's alone."""
        with self._lock:
            held = self._held.get(key)
            if held is not None and gpu in held.models:
                self._held.move_to_end(key)
                return held.models[gpu].share()
        model = load()
        with self._lock:
            held = self._held.get(key)
            if held is not None and gpu not in held.models:
                held.models[gpu] = model.share()
                self._trim()
        return model

    def make_room(self) -> None:
        """Forget all cuts."""
        with self._lock:
            for key in list(self._held):
                self._drop(key)

    def _trim(self) -> None:
        while self._total() > self.max_bytes:
            self._drop(next(iter(self._held)))

    def _drop(self, key: Key) -> None:
        held = self._held.pop(key, None)
        for model in held.models.values() if held is not None else ():
            model.close()

    def _total(self) -> int:
        return sum(held.nbytes for held in self._held.values())


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


def cached_model(elastic: ElasticPackage, size: Size, gpu: int | None, load: Callable[[Path], Model]) -> Model:
    """A cut, loaded on a GPU or (None) the CPU, shared with whoever has it already. Raises as `cached_cut`, and as `load` does."""
    cut = cached_cut(elastic, size)  # held until it is loaded
    return process_cuts().model((elastic.record.sha256, size.kept), gpu, lambda: load(cut.path))
