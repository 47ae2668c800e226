"""Temperature and clock frequency of what computes, from sysfs and NVML; None for what cannot be read.

Virtual machines show neither. /proc/cpuinfo has a frequency there too, which never changes; it is not used.
https://www.kernel.org/doc/html/latest/admin-guide/pm/cpufreq.html, https://www.kernel.org/doc/html/latest/hwmon/sysfs-interface.html
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from edgeq.runtime.cores import CPU_FOLDER, affinity, read_text
from edgeq.runtime.environment import nvml

THERMAL = Path("/sys/class/thermal")
HWMON = Path("/sys/class/hwmon")
# Sensors of processors by name: Intel, AMD, Raspberry Pi and other ARM boards. Other zones are batteries, radios and boards.
_ZONES = ("x86_pkg_temp", "cpu", "soc", "tcpu")
_CHIPS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")


def temperature_c(gpu: int | None = None) -> float | None:
    """Of the hottest processor sensor, or of a GPU by its index, in degrees Celsius."""
    if gpu is not None:
        return _nvml_value(gpu, "nvmlDeviceGetTemperature", "NVML_TEMPERATURE_GPU")
    return max(_cpu_temperatures(), default=None)


def frequency_mhz(gpu: int | None = None) -> float | None:
    """Mean clock of the CPUs this process may use, or a GPU's clock, now."""
    if gpu is not None:
        return _nvml_value(gpu, "nvmlDeviceGetClockInfo", "NVML_CLOCK_SM")
    cpus = affinity() or frozenset(range(os.cpu_count() or 1))
    found = [_number(CPU_FOLDER / f"cpu{cpu}" / "cpufreq" / "scaling_cur_freq") for cpu in cpus]
    known = [kilohertz for kilohertz in found if kilohertz]
    return sum(known) / len(known) / 1000 if known else None


def _cpu_temperatures() -> Iterator[float]:
    for zone in sorted(THERMAL.glob("thermal_zone*")):
        kind = (read_text(zone / "type") or "").lower()
        if kind.startswith(_ZONES):
            yield from _degrees(zone / "temp")
    for chip in sorted(HWMON.glob("hwmon*")):
        if read_text(chip / "name") in _CHIPS:
            for sensor in sorted(chip.glob("temp*_input")):
                yield from _degrees(sensor)


def _degrees(path: Path) -> Iterator[float]:
    """What a sensor says; nothing when it is off (0 or below, or no number)."""
    thousandths = _number(path)
    if thousandths is not None and thousandths > 0:
        yield thousandths / 1000


def _number(path: Path) -> int | None:
    text = read_text(path)
    return int(text) if text is not None and text.lstrip("-").isdecimal() else None


def _nvml_value(index: int, function: str, kind: str) -> float | None:
    with nvml() as n:
        if n is None:
            return None
        try:
            return float(getattr(n, function)(n.nvmlDeviceGetHandleByIndex(index), getattr(n, kind)))
        except n.NVMLError:
            return None
