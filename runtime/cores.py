"""The CPU cores a process may use: affinity, container quota, and hyperthreads that share a core."""

from __future__ import annotations

import math
import os
from pathlib import Path

CPU_FOLDER = Path("/sys/devices/system/cpu")
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Physical cores this process may run on: affinity and container quota respected, hyperthreads of a core counted once."""
    cpus = affinity()
    cores = len({_core_of(cpu) for cpu in cpus}) if cpus else _physical_cores()
    quota = _quota()
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def _physical_cores() -> int:
    import psutil

    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def affinity() -> frozenset[int]:
    """Logical CPUs this process may run on; empty where the system does not say."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def _core_of(cpu: int) -> tuple[str, str]:
    """(package, core) of a logical CPU; its own core where the system does not say."""
    folder = CPU_FOLDER / f"cpu{cpu}" / "topology"
    return read_text(folder / "physical_package_id") or "", read_text(folder / "core_id") or f"cpu{cpu}"


def _quota() -> float | None:
    """CPU limit of the container in cores, from cgroup v2; None without one."""
    words = (read_text(CPU_MAX) or "").split()
    if len(words) != 2 or words[0] == "max":
        return None
    return int(words[0]) / int(words[1])


def read_text(path: Path) -> str | None:
    """Text of a small system file, stripped; None when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
