"""What it costs to change adapters: the time to compute something after a change, beside the same without one.

    same      two tokens decoded into an empty cache, the adapter on as before
    switched  `set_adapter` to an adapter in memory, then the same: llama.cpp reserves its graph anew
    loaded    `set_adapter` to one that is not in memory, then the same: its file is read as well

Medians of `repeat` rounds in turns. What a switch costs is switched - same, and a first use loaded - same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from edgeq.errors import UsageError
from edgeq.runtime.adapter_formats import AnyAdapter
from edgeq.runtime.engine import Context
from edgeq.runtime.session import Session


@dataclass(frozen=True, kw_only=True)
class SwitchTimes:
    """Seconds, medians of all rounds."""

    same_s: float
    switched_s: float
    loaded_s: float
    repeat: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def switch_times(session: Session, adapter: str, *, repeat: int = 5) -> SwitchTimes:
    """Time changes between an adapter of the session and none. The adapters set before are set again; the cache is lost."""
    if repeat < 1:
        raise UsageError(f"repeat is {repeat}; expected at least 1")
    before = {info.name: info.scale for info in session.adapters if info.scale is not None}
    times: dict[str, list[float]] = {"loaded": [], "same": [], "switched": []}
    try:
        for _ in range(repeat):
            session.set_adapter(None)
            _compute(session)
            session.adapter_pool.drop(adapter)
            times["loaded"].append(_seconds(session, lambda: session.set_adapter(adapter)))
            times["same"].append(_seconds(session, lambda: None))
            session.set_adapter(None)
            _compute(session)
            times["switched"].append(_seconds(session, lambda: session.set_adapter(adapter)))
    finally:
        session.set_adapter(before)
    medians = {f"{name}_s": statistics.median(samples) for name, samples in times.items()}
    return SwitchTimes(**medians, repeat=repeat)


def switch_seconds(context: Context, adapter: AnyAdapter, *, repeat: int) -> float:
    """What a switch costs on a bare context: median of switched - same, never below 0. The cache is lost, the adapter is set at the end."""
    differences = []
    for _ in range(repeat):
        seconds = []
        for before in ({adapter: 1.0}, {}):
            context.set_adapters(before)
            context.clear()
            context.decode([0, 0])
            began = time.perf_counter()
            context.set_adapters({adapter: 1.0})
            context.clear()
            context.decode([0, 0])
            seconds.append(time.perf_counter() - began)
        differences.append(seconds[1] - seconds[0])
    return max(0.0, statistics.median(differences))


def _seconds(session: Session, change: Callable[[], object]) -> float:
    began = time.perf_counter()
    change()
    _compute(session)
    return time.perf_counter() - began


def _compute(session: Session) -> None:
    session.score([0, 0])
