"""Which adapters act on a session, and from which token of a prompt on.

A set of adapters is a `Key`: (name, version, scale) of each, in order of names. Keys and values in a cache are good for another prompt
only where both the tokens and the keys that they were computed under are the same, so a session remembers a `Cell` per token.

An aLoRA (Greenewald et al. 2025, arXiv:2504.12397) acts from the last place on where its invocation tokens stand in the prompt, and
what comes before is computed, and can be reused, without it. A prompt without them is answered without the adapter. Counting starts
with the first of the invocation tokens, as in PEFT; llama.cpp's server starts one token earlier.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from edgeq.errors import UsageError
from edgeq.runtime.adapter_pool import AdapterCut, AdapterPool
from edgeq.runtime.engine import Model

Key = tuple[tuple[str, int, float], ...]
Cell = tuple[int, Key]
Scales = tuple[tuple[str, float], ...]
AdapterChoice = str | Mapping[str, float] | None  # one at full strength, several with scales, or none

Prompt = str | Sequence[int]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segment:
    """Tokens start..stop of a prompt and the adapters that act on them."""

    start: int
    stop: int
    key: Key


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """An adapter that a session knows. scale: None while it is not set. resident: whether it takes memory."""

    name: str
    path: Path
    scale: float | None
    resident: bool


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and the adapters to answer it with."""

    prompt: Prompt
    adapter: AdapterChoice = None


def grouped(requests: Sequence[Request], *, now: Scales = (), resident: Collection[str] = ()) -> list[int]:
    """An order of requests in which each set of adapters is switched to once: places in `requests`.

    Those that want what is set `now` come first, then those whose adapters are all in memory, so that they are used before they must go;
    within a set, and among sets otherwise alike, first come, first served.
    """
    wanted = [tuple(scales_of(request.adapter).items()) for request in requests]
    first = {scales: i for i, scales in reversed(list(enumerate(wanted)))}

    def rank(i: int) -> tuple[bool, bool, int, int]:
        absent = any(name not in resident for name, _ in wanted[i])
        return wanted[i] != tuple(now), absent, first[wanted[i]], i

    return sorted(range(len(requests)), key=rank)


def scales_of(choice: AdapterChoice) -> dict[str, float]:
    """Adapters and scales in order of names, without those of scale 0, which have no effect. Raises UsageError for a bad scale."""
    scales = {} if choice is None else {choice: 1.0} if isinstance(choice, str) else dict(choice)
    for name, scale in scales.items():
        if not isinstance(scale, int | float) or not math.isfinite(scale):
            raise UsageError(f"the scale of adapter {name!r} is {scale!r}; expected a finite number")
    return {name: float(scales[name]) for name in sorted(scales) if scales[name]}


class Adaptable(Protocol):
    """What adapters are put on: a context."""

    def set_adapters(self, scales: Mapping[Any, float]) -> None: ...


class ActiveAdapters:
    """The adapters set on a session: acquired from the pool, put on the context piece by piece of a prompt."""

    def __init__(self, pool: AdapterPool, context: Adaptable) -> None:
        self.pool, self._context = pool, context
        self._scales: dict[str, float] = {}

    @property
    def scales(self) -> Mapping[str, float]:
        return dict(self._scales)

    @property
    def key(self) -> Key:
        return tuple((name, self.pool.version(name), scale) for name, scale in self._scales.items())

    def set(self, choice: AdapterChoice) -> None:
        """Make these the adapters from here on. When that fails the ones before stay, and an error says why (see AdapterPool.acquire)."""
        scales, before = scales_of(choice), self._scales
        self.pool.check_known(scales)
        if scales == before:
            return
        self._context.set_adapters({})
        self._scales = {}
        self.pool.release(before)
        try:
            self.pool.acquire(scales)
        except BaseException:
            self.pool.acquire(before)
            self._scales = before
            raise
        self._scales = scales

    def moved(self, model: Model, context: Adaptable, cut: AdapterCut | None) -> ActiveAdapters:
        """The same adapters, and the same of them set, on another size of the model. Raises as `AdapterPool.add` and `set`."""
        pool = AdapterPool(model, budget_bytes=self.pool.budget_bytes, cut=cut)
        for name in self.pool.files:
            pool.add(self.pool.files[name].path, name)
        there = ActiveAdapters(pool, context)
        there.set(self._scales)
        return there

    def segments(self, ids: Sequence[int]) -> list[Segment]:
        """A prompt in pieces of one set of adapters each. The last piece's set also acts on what is generated."""
        starts: list[int] = []
        for name, _, _ in self.key:
            invocation = self.pool.files[name].invocation
            start = _last_place(ids, invocation) if invocation else 0
            if start is None:
                logger.warning("adapter %s stays off: the prompt does not hold its invocation tokens %s", name, list(invocation))
            starts.append(len(ids) if start is None else start)
        bounds = sorted({0, len(ids), *starts})
        return [
            Segment(start, stop, tuple(part for part, begin in zip(self.key, starts, strict=True) if begin <= start))
            for start, stop in pairwise(bounds)
        ]

    def apply(self, key: Key) -> None:
        """Let the adapters of a segment act on what the context decodes next."""
        self._context.set_adapters({self.pool.handle(name): scale for name, _, scale in key})


def _last_place(ids: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Where `wanted` stands last in `ids`."""
    n, wanted = len(wanted), list(wanted)
    return next((i for i in range(len(ids) - n, -1, -1) if list(ids[i : i + n]) == wanted), None)
