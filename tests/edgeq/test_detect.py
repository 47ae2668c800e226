import json
import subprocess
import sys
import types
from collections import namedtuple

import pytest

from edgeq import detect as module
from edgeq.detect import (
    Gpu,
    Machine,
    available_ram,
    cpu_name,
    detect,
    detect_machine,
    isa_of_cpuinfo,
    isa_of_sysctl,
    nearest_profile,
)
from edgeq.profiles import DeviceProfile, load_profile, profile_names

X86 = "processor\t: 0\nmodel name\t: AMD Ryzen 7 7840U\nflags\t\t: fpu sse2 avx2 avx512f avx512_vnni\n\nprocessor\t: 1\nflags\t\t: fpu\n"
ARM = "processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm aes crc32 asimdhp asimddp i8mm\nCPU part\t: 0xd0b\n"


def machine_of(profile: DeviceProfile) -> Machine:
    """A machine with exactly a profile's facts."""
    gpus: tuple[Gpu, ...] = ()
    if profile.runtime.device != "cpu" and profile.accelerator is not None:
        gpus = (Gpu(kind=profile.runtime.device, name=profile.accelerator.name, vram_mib=profile.accelerator.vram_mib),)
    cpu, ram = profile.cpu, profile.memory.ram_mib
    return Machine(system="Linux", cpu="some", cores=cpu.cores, threads=cpu.threads, isa=cpu.isa, ram_mib=ram, gpus=gpus)


@pytest.mark.parametrize("name", profile_names())
def test_a_profiles_own_facts_lead_to_it(name):
    found, distance, reasons = nearest_profile(machine_of(load_profile(name)))
    assert (found, distance) == (name, 0)
    assert reasons[0].endswith(f", as {name} does") and reasons[-1].endswith(f": the same as {name}") and len(reasons) == 4


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        # a small cloud machine, a 16 GB card, an 8 GB Mac, a Jetson with 64 GB, an older phone, two different cards
        ({"cores": 2, "isa": ("avx2", "avx512"), "ram_mib": 24000}, "laptop-cpu"),
        ({"cores": 16, "isa": ("avx2",), "ram_mib": 65536, "gpus": (Gpu(kind="cuda", name="RTX 4080", vram_mib=16376),)}, "laptop-4090"),
        ({"cores": 8, "isa": ("neon", "dotprod"), "ram_mib": 8192, "gpus": (Gpu(kind="metal", name="M1", vram_mib=None),)}, "macbook-m3"),
        (
            {"cores": 12, "isa": ("neon", "dotprod"), "ram_mib": 62000, "gpus": (Gpu(kind="cuda", name="Orin", vram_mib=None),)},
            "jetson-orin-nano",
        ),
        ({"cores": 4, "isa": ("neon", "dotprod"), "ram_mib": 3900}, "raspberry-pi-5"),
        ({"cores": 8, "isa": ("neon", "dotprod", "i8mm"), "ram_mib": 11500}, "phone-8gb"),
        (
            {
                "cores": 64,
                "isa": ("avx2", "avx512"),
                "ram_mib": 500000,
                "gpus": (Gpu(kind="cuda", name="T400", vram_mib=2048), Gpu(kind="cuda", name="A100", vram_mib=81920)),
            },
            "server-h100",
        ),
    ],
)
def test_other_machines(machine, expected):
    assert nearest_profile(Machine(system="Linux", cpu="some", threads=2 * machine["cores"], **machine))[0] == expected


def test_reasons_say_what_differs():
    machine = Machine(system="Linux", cpu="some", cores=2, threads=4, isa=("avx2",), ram_mib=8192)
    name, distance, reasons = nearest_profile(machine, [load_profile("laptop-cpu")])
    assert name == "laptop-cpu"
    # half the memory: 1; a quarter of the cores: 0.5 x 2; one instruction set of three: 2 x 2/3
    assert distance == pytest.approx(1 + 1 + 4 / 3)
    assert reasons == (
        "computes on cpu, as laptop-cpu does",
        "8,192 MiB of RAM, laptop-cpu has 16,384",
        "2 cores, laptop-cpu has 8",
        "instruction sets avx2: without avx512, avx512_vnni",
    )


def test_vram_counts_before_ram():
    gpu = Gpu(kind="cuda", name="GPU", vram_mib=6144)
    machine = Machine(system="Linux", cpu="some", cores=6, threads=12, isa=("avx2", "avx512"), ram_mib=8192, gpus=(gpu,))
    _, distance, reasons = nearest_profile(machine, [load_profile("desktop-3060")])
    assert distance == pytest.approx(1 + 0.25 * 1 + 2 * 0.5)
    assert reasons[1] == "6,144 MiB of VRAM, desktop-3060 has 12,288" and reasons[3].endswith("avx2, avx512: with avx512 more")


def test_a_device_that_no_profile_has():
    gpu = Gpu(kind="metal", name="M1", vram_mib=None)
    machine = Machine(system="Darwin", cpu="M1", cores=8, threads=8, isa=(), ram_mib=8192, gpus=(gpu,))
    name, _, reasons = nearest_profile(machine, [load_profile("raspberry-pi-5"), load_profile("desktop-3060")])
    assert name == "raspberry-pi-5" and reasons[0] == "metal GPU here, raspberry-pi-5 computes on cpu: no profile has this kind of device"
    assert reasons[3] == "instruction sets unknown: without dotprod, neon"
    plain = Machine(system="Linux", cpu="some", cores=8, threads=8, isa=("avx2",), ram_mib=8192)
    assert nearest_profile(plain, [load_profile("desktop-3060")])[2][0].startswith(
        "no GPU that llama.cpp uses here, desktop-3060 computes on cuda"
    )


def test_instruction_sets():
    assert isa_of_cpuinfo(X86) == ("avx2", "avx512", "avx512_vnni")
    assert isa_of_cpuinfo(ARM) == ("neon", "dotprod", "i8mm")
    assert isa_of_cpuinfo("") == ()
    m1 = {"hw.optional.AdvSIMD": "1", "hw.optional.arm.FEAT_DotProd": "1", "hw.optional.arm.FEAT_I8MM": "0"}
    assert isa_of_sysctl(m1) == ("neon", "dotprod")


def test_names():
    assert cpu_name(X86, "") == "AMD Ryzen 7 7840U"
    assert cpu_name(ARM, "Raspberry Pi 5 Model B Rev 1.0\0") == "Raspberry Pi 5 Model B Rev 1.0"


def test_this_machine_is_described():
    detection = detect()
    document = json.loads(json.dumps(detection.to_json(), allow_nan=False))
    assert document["profile"] in profile_names() and set(document) == {"machine", "profile", "distance", "reasons"}
    machine = detection.machine
    assert 1 <= machine.cores <= machine.threads and machine.ram_mib > 256
    assert 0 < available_ram() <= machine.ram_mib << 20


def test_a_containers_limit_is_the_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{512 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{500 << 20}\n")
    assert detect_machine().ram_mib == 512
    assert available_ram() == 12 << 20
    (tmp_path / "memory.current").write_text(f"{600 << 20}\n")
    assert available_ram() == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert detect_machine().ram_mib > 512


def test_a_mac(monkeypatch):
    lines = "machdep.cpu.brand_string: Apple M3\nhw.optional.AdvSIMD: 1\nhw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 1\n"
    asked = []

    def run(command, **_options):
        asked.extend(command)
        return subprocess.CompletedProcess(command, 1, stdout=lines, stderr="sysctl: unknown oid 'hw.optional.avx2_0'")

    monkeypatch.setattr(module.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(module.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(module.subprocess, "run", run)
    machine = detect_machine()
    assert (machine.cpu, machine.isa) == ("Apple M3", ("neon", "dotprod", "i8mm"))
    assert machine.gpus == (Gpu(kind="metal", name="Apple M3", vram_mib=None),) and asked[0] == "sysctl"
    assert nearest_profile(machine)[0] == "macbook-m3"
    monkeypatch.setattr(module.subprocess, "run", lambda *_a, **_k: (_ for _ in ()).throw(FileNotFoundError))
    assert detect_machine().isa == ()


class Nvml(types.SimpleNamespace):
    """The part of pynvml that detection uses. totals: bytes by GPU, None where the question is not supported."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    def __init__(self, totals, *, no_driver=False):
        super().__init__(totals=totals, no_driver=no_driver, closed=False)

    def nvmlInit(self):
        if self.no_driver:
            raise self.NVMLError

    def nvmlShutdown(self):
        self.closed = True

    def nvmlDeviceGetCount(self):
        return len(self.totals)

    def nvmlDeviceGetHandleByIndex(self, i):
        return i

    def nvmlDeviceGetName(self, i):
        return [b"NVIDIA A", "NVIDIA B"][i]

    def nvmlDeviceGetMemoryInfo(self, i):
        if self.totals[i] is None:
            raise self.NVMLError_NotSupported
        return namedtuple("Info", "total")(self.totals[i])


def test_nvidia_gpus(monkeypatch):
    monkeypatch.setattr(module.platform, "system", lambda: "Linux")
    nvml = Nvml([12288 << 20, None])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert detect_machine().gpus == (Gpu(kind="cuda", name="NVIDIA A", vram_mib=12288), Gpu(kind="cuda", name="NVIDIA B", vram_mib=None))
    assert nvml.closed
    monkeypatch.setitem(sys.modules, "pynvml", Nvml([1], no_driver=True))
    assert detect_machine().gpus == ()
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert detect_machine().gpus == ()


def test_a_gpu_that_fails_is_no_gpu(monkeypatch):
    nvml = Nvml([1])
    nvml.nvmlDeviceGetName = lambda i: (_ for _ in ()).throw(nvml.NVMLError)
    monkeypatch.setattr(module.platform, "system", lambda: "Linux")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert detect_machine().gpus == () and nvml.closed
