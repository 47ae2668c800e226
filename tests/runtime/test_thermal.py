from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgeq.runtime import thermal
from edgeq.runtime.thermal import frequency_mhz, temperature_c


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("THERMAL", "HWMON", "CPU_FOLDER"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(thermal, name, tmp_path / name)
    monkeypatch.setattr(thermal, "affinity", lambda: frozenset({0, 2}))
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def test_nothing_readable_is_none(sysfs: Path) -> None:
    assert temperature_c() is None
    assert frequency_mhz() is None


def test_the_hottest_processor_sensor_counts_and_no_other(sysfs: Path) -> None:
    for i, (kind, thousandths) in enumerate((("acpitz", 99000), ("cpu-thermal", 61250), ("x86_pkg_temp", 58000), ("iwlwifi_1", 90000))):
        write(sysfs / "THERMAL" / f"thermal_zone{i}" / "type", kind)
        write(sysfs / "THERMAL" / f"thermal_zone{i}" / "temp", str(thousandths))
    assert temperature_c() == 61.25
    for name, values in (("k10temp", ("64500", "-1000")), ("nvme", ("80000",))):
        write(sysfs / "HWMON" / f"hwmon-{name}" / "name", name)
        for i, value in enumerate(values, 1):
            write(sysfs / "HWMON" / f"hwmon-{name}" / f"temp{i}_input", value)
    assert temperature_c() == 64.5


def test_a_sensor_that_is_off_says_nothing(sysfs: Path) -> None:
    for i, value in enumerate(("0", "-273000", "n/a")):
        write(sysfs / "THERMAL" / f"thermal_zone{i}" / "type", "cpu-thermal")
        write(sysfs / "THERMAL" / f"thermal_zone{i}" / "temp", value)
    assert temperature_c() is None


def test_the_clock_is_the_mean_of_the_cpus_that_may_be_used(sysfs: Path) -> None:
    for cpu, kilohertz in ((0, 2400000), (1, 9000000), (2, 1800000)):
        write(sysfs / "CPU_FOLDER" / f"cpu{cpu}" / "cpufreq" / "scaling_cur_freq", str(kilohertz))
    assert frequency_mhz() == 2100.0


def test_gpus_answer_by_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeError(Exception):
        pass

    def temperature(handle: int, kind: str) -> int:
        if handle:
            raise FakeError
        assert kind == "gpu"
        return 71

    module = SimpleNamespace(
        NVMLError=FakeError,
        NVML_TEMPERATURE_GPU="gpu",
        NVML_CLOCK_SM="sm",
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetTemperature=temperature,
        nvmlDeviceGetClockInfo=lambda handle, kind: 1755 if kind == "sm" else 0,
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert temperature_c(0) == 71.0 and frequency_mhz(0) == 1755.0
    assert temperature_c(1) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert temperature_c(0) is None and frequency_mhz(0) is None
