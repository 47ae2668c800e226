"""How much of the machine other processes used while we measured, from the kernel's counters."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from edgeq.runtime.cores import read_text

THRESHOLD = 0.05  # of one core: above it a measurement says so
BUSY_BEFORE = 0.15  # of one core: above it a machine counts as busy before a run; coarser, for the look is short
WINDOW_S = 0.3
_BUSY = (0, 1, 2, 5, 6, 7)  # columns of /proc/stat: user, nice, system, irq, softirq, steal
PROC_STAT = Path("/proc/stat")


def others_meter() -> Callable[[], float | None]:
    """Start watching: a function that returns how many cores others used on average since now; None where the system does not say.

    Others are all but this process; time that a hypervisor took away counts as theirs. The kernel counts in ticks of 10 ms.
    """
    began, busy, own = time.monotonic(), _busy_s(), time.process_time()

    def cores() -> float | None:
        elapsed, busy_now = time.monotonic() - began, _busy_s()
        if busy is None or busy_now is None or elapsed <= 0:
            return None
        return max(0.0, busy_now - busy - (time.process_time() - own)) / elapsed

    return cores


def _busy_s() -> float | None:
    """Busy time of all CPUs since boot, in seconds."""
    words = (read_text(PROC_STAT) or "").split("\n", 1)[0].split()
    if len(words) < 9 or words[0] != "cpu":
        return None
    return sum(int(words[1 + column]) for column in _BUSY) / os.sysconf("SC_CLK_TCK")


def others_now(seconds: float = WINDOW_S) -> float | None:
    """How many cores others use while this process waits; None where the system does not say."""
    meter = others_meter()
    time.sleep(seconds)
    return meter()


def wait_for_quiet(patience_s: float) -> tuple[float | None, float]:
    """Wait until others use at most BUSY_BEFORE of a core, but no longer than patience_s: (cores others used last, seconds waited).

    Looks once even without patience. Looking takes WINDOW_S.
    """
    began = time.monotonic()
    while True:
        cores, waited = others_now(), time.monotonic() - began
        if cores is None or cores <= BUSY_BEFORE or waited + WINDOW_S > patience_s:
            return cores, waited
