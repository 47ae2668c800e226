"""Adapters of one model by name, in memory as far as a byte budget allows.

    pool = AdapterPool(model, budget_bytes=64 << 20)
    pool.add(Path("sql.gguf"))
    context.set_adapters({pool.acquire(["sql"])["sql"]: 1.0}); ...; context.set_adapters({}); pool.release(["sql"])

A file is checked when it is added, loaded when it is first acquired, and dropped, least recently used first, when another needs its
room. Acquired adapters stay. The budget is for the adapters' own buffers; beside them llama.cpp keeps a few kilobytes of graph per
pair. An idea of S-LoRA (Sheng et al. 2023, arXiv:2311.03285), for one device and one request at a time.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgeq.errors import AdapterError, UsageError
from edgeq.runtime.adapter_file import file_stamp
from edgeq.runtime.adapter_formats import AnyAdapter, AnyFile, check_base, load_adapter, read_adapter
from edgeq.runtime.cut import MemoryCut
from edgeq.runtime.engine import Model

DEFAULT_BUDGET = 256 << 20

AdapterCut = Callable[[Path], MemoryCut]


@dataclass(frozen=True, kw_only=True)
class PoolStats:
    """hits, misses: adapters that were, or were not, in memory when they were acquired. peak_bytes: most that was ever resident."""

    budget_bytes: int
    resident_bytes: int
    peak_bytes: int
    hits: int
    misses: int
    evictions: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class AdapterPool:
    """Adapters that belong to a model. Not for two threads at once.

    cut: for a model that is a cut of another: brings an adapter of the whole one to the same size. It is tried on files that do not fit.
    """

    def __init__(self, model: Model, *, budget_bytes: int = DEFAULT_BUDGET, cut: AdapterCut | None = None) -> None:
        if budget_bytes < 0:
            raise UsageError(f"the budget for adapters is {budget_bytes} bytes; expected at least 0")
        self.model, self._cut = model, cut
        self._files: dict[str, AnyFile] = {}
        self._whole: set[str] = set()  # those that are cut when they are loaded
        self._resident: OrderedDict[str, AnyAdapter] = OrderedDict()  # least recently used first
        self._bytes: dict[str, int] = {}
        self._pins: Counter[str] = Counter()
        self._versions: Counter[str] = Counter()
        self.budget_bytes = budget_bytes
        self._peak_bytes = self._hits = self._misses = self._evictions = 0

    @property
    def files(self) -> Mapping[str, AnyFile]:
        """What is known, by name in the order added."""
        return MappingProxyType(self._files)

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of what is in memory, least recently used first."""
        return tuple(self._resident)

    @property
    def stats(self) -> PoolStats:
        return PoolStats(
            budget_bytes=self.budget_bytes,
            resident_bytes=self._resident_bytes,
            peak_bytes=self._peak_bytes,
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
        )

    @property
    def _resident_bytes(self) -> int:
        return sum(self._bytes.values())

    def version(self, name: str) -> int:
        """A number that changes whenever the name comes to mean another file or content."""
        return self._versions[name]

    def add(self, path: Path, name: str | None = None) -> str:
        """Make an adapter known under a name (by default the file's, without its suffix), and return that.

        Raises AdapterError or SourceError for a bad file, one that does not fit the model, or one larger than the budget; UsageError
        for a name that is taken.
        """
        name = path.stem if name is None else name
        if not name:
            raise UsageError(f"{path}: the adapter's name is empty. Give one.")
        if name in self._files:
            raise UsageError(
                f"an adapter named {name!r} is loaded already, from {self._files[name].path}. Unload it or choose another name."
            )
        self._read(name, path)
        return name

    def remove(self, name: str) -> None:
        """Forget an adapter. Raises UsageError when it is not known or in use."""
        self.drop(name)
        del self._files[name]
        self._whole.discard(name)

    def drop(self, name: str) -> None:
        """Free an adapter's memory; it is loaded again at its next use. Raises UsageError when it is not known or in use."""
        self.check_known([name])
        if self._pins[name]:
            raise UsageError(f"adapter {name!r} is in use. Set another one first.")
        if name in self._resident:
            self._free(name)

    def close(self) -> None:
        """Free all memory. Raises RuntimeFailure while a context uses one of them."""
        for name in self.resident:
            self._free(name)

    def check_known(self, names: Collection[str]) -> None:
        """Raise UsageError that lists what there is when a name is not known."""
        for name in names:
            if name not in self._files:
                known = f"there are {', '.join(map(repr, self._files))}" if self._files else "none is loaded"
                raise UsageError(f"no adapter is named {name!r}; {known}. Load it from its file first.")

    def acquire(self, names: Collection[str]) -> dict[str, AnyAdapter]:
        """Bring adapters into memory, together, and keep them there until they are released.

        Raises UsageError for an unknown name; AdapterError when they do not fit the budget beside those in use, or when a file has
        changed since it was added and is bad now; RuntimeFailure when llama.cpp refuses one. Nothing stays acquired then.
        """
        wanted = list(dict.fromkeys(names))
        self.check_known(wanted)
        for name in wanted:
            if name not in self._resident:
                self._refresh(name)
        self._check_room(wanted)
        self._pins.update(wanted)
        try:
            found = {name: self._loaded(name) for name in wanted}
        except BaseException:
            self.release(wanted)
            raise
        return found

    def release(self, names: Collection[str]) -> None:
        """Let acquired adapters go: they stay in memory until their room is needed."""
        for name in dict.fromkeys(names):
            assert self._pins[name] > 0, f"{name} was not acquired"
            self._pins[name] -= 1

    def handle(self, name: str) -> AnyAdapter:
        """An acquired adapter."""
        assert self._pins[name] > 0, f"{name} was not acquired"
        return self._resident[name]

    def _read(self, name: str, path: Path) -> None:
        """Take note of a file, after checking it and what is left of it when it is cut."""
        file, whole = read_adapter(path, self.model.facts), False
        try:
            check_base(file, self.model.facts)
        except AdapterError:
            if self._cut is None:
                raise
            whole = True
            with self._cut(path) as cut:
                left = read_adapter(cut.path, self.model.facts)
                check_base(left, self.model.facts)
            file = replace(left, path=path, stamp=file.stamp)
        if file.resident_bytes > self.budget_bytes:
            raise AdapterError(
                f"{path}: takes {file.resident_bytes:,} bytes, the budget for adapters is {self.budget_bytes:,}. Raise the budget."
            )
        self._files[name] = file
        self._versions[name] += 1
        self._whole.discard(name)
        if whole:
            self._whole.add(name)

    def _refresh(self, name: str) -> None:
        """Read a file again that has changed since."""
        file = self._files[name]
        if file_stamp(file.path) != file.stamp:
            self._read(name, file.path)

    def _check_room(self, wanted: Collection[str]) -> None:
        pinned = [name for name, count in self._pins.items() if count and name not in wanted]
        needed = sum(self._bytes.get(name) or self._files[name].resident_bytes for name in (*wanted, *pinned))
        if needed > self.budget_bytes:
            names = ", ".join((*wanted, *pinned))
            raise AdapterError(
                f"adapters {names} take {needed:,} bytes together, the budget for adapters is {self.budget_bytes:,}. "
                "Use fewer at once or raise the budget."
            )

    def _loaded(self, name: str) -> AnyAdapter:
        if name in self._resident:
            self._resident.move_to_end(name)
            self._hits += 1
            return self._resident[name]
        n_bytes = self._files[name].resident_bytes
        self._misses += 1
        for other in [other for other in self._resident if not self._pins[other]]:
            if self._resident_bytes + n_bytes <= self.budget_bytes:
                break
            self._free(other)
            self._evictions += 1
        self._resident[name] = self._load(name)
        self._bytes[name] = n_bytes
        self._peak_bytes = max(self._peak_bytes, self._resident_bytes)
        return self._resident[name]

    def _load(self, name: str) -> AnyAdapter:
        path = self._files[name].path
        if name not in self._whole:
            return load_adapter(self.model, path)
        assert self._cut is not None
        with self._cut(path) as cut:
            return load_adapter(self.model, cut.path)

    def _free(self, name: str) -> None:
        self._resident.pop(name).close()
        del self._bytes[name]
