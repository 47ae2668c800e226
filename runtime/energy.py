"""Counters of energy, in joules since some moment in the past: processor packages (RAPL) and NVIDIA GPUs (NVML).

RAPL counts everything the packages do, other processes included, and its files are readable by root only on most systems; without
them, and on other processors, there is no figure. https://www.kernel.org/doc/html/latest/power/powercap/powercap.html
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgeq.runtime.cores import read_text
from edgeq.runtime.environment import nvml

POWERCAP = Path("/sys/class/powercap")


def cpu_meter() -> Callable[[], float] | None:
    """Start metering the processor packages: a function that returns joules since now. None without readable counters."""
    zones = [zone for zone in sorted(POWERCAP.glob("*-rapl:*")) if (read_text(zone / "name") or "").startswith("package")]
    start = {zone: _microjoules(zone / "energy_uj") for zone in zones}
    if not zones or None in start.values():
        return None

    def joules() -> float:
        total = 0
        for zone, began in start.items():
            now, limit = _microjoules(zone / "energy_uj"), _microjoules(zone / "max_energy_range_uj")
            assert now is not None and began is not None
            total += now - began if now >= began else now - began + (limit or 0)  # the counter wraps
        return total / 1e6

    return joules


def gpu_meter(index: int) -> Callable[[], float] | None:
    """Start metering an NVIDIA GPU: a function that returns joules since now. None without NVML or a counter."""
    start = _gpu_millijoules(index)
    return None if start is None else lambda: ((_gpu_millijoules(index) or 0) - start) / 1e3


def vram_bytes(index: int, pid: int) -> int | None:
    """GPU memory a process holds; None without NVML, or where a container hides its process ids from the driver."""
    with nvml() as n:
        if n is None:
            return None
        try:
            processes = n.nvmlDeviceGetComputeRunningProcesses(n.nvmlDeviceGetHandleByIndex(index))
        except n.NVMLError:
            return None
        return next((p.usedGpuMemory for p in processes if p.pid == pid), None)


def _gpu_millijoules(index: int) -> int | None:
    with nvml() as n:
        if n is None:
            return None
        try:
            return n.nvmlDeviceGetTotalEnergyConsumption(n.nvmlDeviceGetHandleByIndex(index))
        except n.NVMLError:
            return None


def _microjoules(path: Path) -> int | None:
    text = read_text(path)
    return int(text) if text is not None and text.isdecimal() else None
