from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from edgeq import __version__
from edgeq.runtime import contention, cores, energy, environment
from edgeq.runtime.cores import affinity, usable_cores
from edgeq.runtime.environment import cpu_flags, cpu_name, describe, gpus, software

LINUX = pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux")


def test_the_description_is_json_and_says_nothing_of_host_or_time() -> None:
    found = describe(artifact_sha256="ab" * 32)
    text = json.dumps(found, allow_nan=False)
    assert json.loads(text) == found
    assert describe(artifact_sha256="ab" * 32) == found, "two descriptions of the same machine are equal"
    assert set(found) == {"cpu", "memory_bytes", "gpus", "os", "software", "artifact_sha256"}
    host = socket.gethostname()
    assert len(host) < 4 or host not in text
    assert found["memory_bytes"] == psutil.virtual_memory().total
    assert found["os"].startswith(platform.system())


def test_software_names_versions_and_build() -> None:
    import llama_cpp

    found = software()
    assert found["edgeq"] == __version__
    assert found["llama_cpp"] == llama_cpp.__version__
    assert found["gpu_build"] is bool(llama_cpp.llama_supports_gpu_offload())
    assert "CPU" in found["llama_cpp_build"] or found["gpu_build"]


def test_software_without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeq.runtime import llama

    monkeypatch.setattr(llama, "_ready", {})
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert software()["llama_cpp"] is None


@LINUX
def test_flags_agree_with_what_llama_cpp_detects() -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("names of instruction sets differ")
    build = software()["llama_cpp_build"]
    flags = cpu_flags()
    assert list(flags) == sorted(set(flags))
    for flag, name in (("avx2", "AVX2"), ("avx512f", "AVX512"), ("avx512_vnni", "AVX512_VNNI"), ("fma", "FMA")):
        if f"{name} = 1" in build:
            assert flag in flags, "the library runs here, so the CPU has what it was built for"


def cpuinfo(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(environment, "read_text", lambda path: text if path == Path("/proc/cpuinfo") else None)


@LINUX
def test_arm_names_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo(monkeypatch, "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm bf16\nModel\t\t: Raspberry Pi 5 Model B\n")
    assert cpu_flags() == ("dotprod", "i8mm", "neon")
    assert cpu_name() == "Raspberry Pi 5 Model B"
    cpuinfo(monkeypatch, "nothing known")
    assert cpu_flags() == ()


@LINUX
def test_cores_respect_affinity() -> None:
    everything = affinity()
    try:
        os.sched_setaffinity(0, {min(everything)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, everything)
    assert 1 <= usable_cores() <= len(everything)


def topology(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[tuple[int, int]]) -> None:
    """A machine with one logical CPU per row (package, core), all usable."""
    for cpu, (package, core) in enumerate(rows):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{package}\n")
        (folder / "core_id").write_text(f"{core}\n")
    monkeypatch.setattr(cores, "CPU_FOLDER", tmp_path)
    monkeypatch.setattr(cores, "CPU_MAX", tmp_path / "cpu.max")
    monkeypatch.setattr(cores, "affinity", lambda: frozenset(range(len(rows))))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(0, 0), (0, 1), (0, 0), (0, 1)], 2),  # two cores, two threads each
        ([(0, 0), (0, 1), (1, 0), (1, 1)], 4),  # two packages that number their cores alike
        ([(0, 7)], 1),
    ],
)
def test_threads_of_a_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[tuple[int, int]], expected: int) -> None:
    topology(tmp_path, monkeypatch, rows)
    assert usable_cores() == expected


@pytest.mark.parametrize(("quota", "expected"), [("max 100000", 4), ("150000 100000", 2), ("10000 100000", 1), ("900000 100000", 4)])
def test_cores_respect_a_container_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, expected: int) -> None:
    topology(tmp_path, monkeypatch, [(0, i) for i in range(4)])
    (tmp_path / "cpu.max").write_text(quota)
    assert usable_cores() == expected


def test_cores_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "affinity", frozenset)
    assert usable_cores() >= 1


class FakeError(Exception):
    pass


def fake_nvml(
    monkeypatch: pytest.MonkeyPatch, *, energy_mj: list[int] | None = None, processes: list[SimpleNamespace] | None = None
) -> None:
    def total_energy(_handle: object) -> int:
        if energy_mj is None:
            raise FakeError
        return energy_mj.pop(0)

    module = SimpleNamespace(
        NVMLError=FakeError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "570.1",
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetName=lambda h: "NVIDIA GeForce RTX 4090",
        nvmlDeviceGetMemoryInfo=lambda h: SimpleNamespace(total=24 << 30),
        nvmlDeviceGetTotalEnergyConsumption=total_energy,
        nvmlDeviceGetComputeRunningProcesses=lambda h: processes or [],
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)


def test_gpus_come_from_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(monkeypatch)
    assert gpus() == [{"name": "NVIDIA GeForce RTX 4090", "memory_bytes": 24 << 30, "driver": "570.1"}]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpus() == []


def test_no_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(monkeypatch)

    def fail() -> None:
        raise FakeError

    monkeypatch.setattr(sys.modules["pynvml"], "nvmlInit", fail)
    assert gpus() == []
    assert energy.gpu_meter(0) is None
    assert energy.vram_bytes(0, 1) is None


def test_gpu_energy_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(
        monkeypatch, energy_mj=[5000, 7500], processes=[SimpleNamespace(pid=7, usedGpuMemory=123), SimpleNamespace(pid=8, usedGpuMemory=9)]
    )
    meter = energy.gpu_meter(0)
    assert meter is not None and meter() == 2.5
    assert energy.vram_bytes(0, 7) == 123
    assert energy.vram_bytes(0, 99) is None, "not listed: unknown, not zero"


def rapl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zones: dict[str, tuple[str, int]]) -> None:
    for name, (kind, microjoules) in zones.items():
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "name").write_text(kind)
        (folder / "energy_uj").write_text(f"{microjoules}\n")
        (folder / "max_energy_range_uj").write_text("1000000000\n")
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)


def test_rapl_counts_packages_and_survives_a_wrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rapl(
        tmp_path,
        monkeypatch,
        {"intel-rapl:0": ("package-0", 999_000_000), "intel-rapl:1": ("package-1", 1_000_000), "intel-rapl:0:0": ("core", 5)},
    )
    meter = energy.cpu_meter()
    assert meter is not None
    rapl(
        tmp_path,
        monkeypatch,
        {"intel-rapl:0": ("package-0", 1_000_000), "intel-rapl:1": ("package-1", 1_500_000), "intel-rapl:0:0": ("core", 900_000_000)},
    )
    assert meter() == pytest.approx(2.0 + 0.5)


def test_unreadable_counters_are_unknown_not_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    assert energy.cpu_meter() is None
    rapl(tmp_path, monkeypatch, {"intel-rapl:0": ("package-0", 1)})
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()  # as good as not permitted
    assert energy.cpu_meter() is None


@contextlib.contextmanager
def stat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "stat"
    monkeypatch.setattr(contention, "PROC_STAT", path)
    yield path


@LINUX
def test_others_are_all_but_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hertz = os.sysconf("SC_CLK_TCK")
    now = [100.0, 5.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], process_time=lambda: now[1])
    monkeypatch.setattr(contention, "time", clock)
    with stat(tmp_path, monkeypatch) as path:
        path.write_text(f"cpu  {10 * hertz} 0 0 1000 0 0 0 0 0 0\ncpu0 1 2 3\n")
        meter = contention.others_meter()
        # 10 s later: 12 s of user time, 2 s of system, 1 s stolen; 8 s were ours. Idle and iowait do not count.
        path.write_text(f"cpu  {22 * hertz} 0 {2 * hertz} 9999 777 0 0 {1 * hertz} 0 0\n")
        now[:] = [110.0, 13.0]
        assert meter() == pytest.approx((12 + 2 + 1 - 8) / 10)
        now[1] = 999.0
        assert meter() == 0.0, "ticks are coarse: never below nothing"
        path.write_text("something else\n")
        assert meter() is None
