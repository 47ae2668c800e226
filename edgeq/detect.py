"""This machine: cores, instruction sets, memory, GPUs; and the shipped profile that is nearest to it.

Distance of a machine to a profile, 0 when all facts agree:

    |log2(memory / profile's)| + 0.5 |log2(cores / profile's)| + 2 (1 - shared / all instruction sets) [+ 0.25 |log2(RAM / profile's)|]

where memory is that in which a model lives: VRAM of a discrete GPU (RAM then counts a quarter), else RAM. Only profiles that compute
on the same kind of device come into question: CPU, Metal, CUDA with memory of its own, CUDA with shared memory.
"""

from __future__ import annotations

import math
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from edgeq.profiles import DeviceProfile, Isa, load_profile, profile_names

MIB = 1 << 20
_PROC_CPUINFO = Path("/proc/cpuinfo")
_DEVICE_TREE_MODEL = Path("/proc/device-tree/model")
_CGROUP = Path("/sys/fs/cgroup")

# Words of /proc/cpuinfo ("flags" on x86, "Features" on ARM), and keys of macOS's sysctl that are 1.
_LINUX_FLAGS: Mapping[str, Isa] = {
    "avx2": "avx2",
    "avx512f": "avx512",
    "avx512_vnni": "avx512_vnni",
    "asimd": "neon",
    "neon": "neon",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
}
_MACOS_KEYS: Mapping[str, Isa] = {
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512",
    "hw.optional.avx512vnni": "avx512_vnni",
    "hw.optional.AdvSIMD": "neon",
    "hw.optional.arm.FEAT_DotProd": "dotprod",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
}
_ORDER: tuple[Isa, ...] = ("avx2", "avx512", "avx512_vnni", "neon", "dotprod", "i8mm")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """vram_mib is None where the GPU shares the RAM."""

    kind: Literal["cuda", "metal"]
    name: str
    vram_mib: int | None


@dataclass(frozen=True, kw_only=True)
class Machine:
    """cores, threads: of the whole machine. ram_mib: what this process may have, so a container's limit if there is one."""

    system: str
    cpu: str
    cores: int
    threads: int
    isa: tuple[Isa, ...]
    ram_mib: int
    gpus: tuple[Gpu, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "isa": list(self.isa), "gpus": [asdict(gpu) for gpu in self.gpus]}


@dataclass(frozen=True, kw_only=True)
class Detection:
    """reasons: one sentence for each fact that was compared."""

    machine: Machine
    profile: str
    distance: float
    reasons: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "machine": self.machine.to_json(),
            "profile": self.profile,
            "distance": round(self.distance, 3),
            "reasons": list(self.reasons),
        }


def detect() -> Detection:
    """Describe this machine and name the nearest shipped profile."""
    machine = detect_machine()
    name, distance, reasons = nearest_profile(machine)
    return Detection(machine=machine, profile=name, distance=distance, reasons=reasons)


def detect_machine() -> Machine:
    """Facts of this machine. What the system does not say is left out (isa, gpus) or counted as one (cores)."""
    system = platform.system()
    if system == "Darwin":
        facts = _sysctl("machdep.cpu.brand_string", *_MACOS_KEYS)
        cpu, isa = facts.get("machdep.cpu.brand_string", platform.processor()), isa_of_sysctl(facts)
        gpus: tuple[Gpu, ...] = (Gpu(kind="metal", name=cpu, vram_mib=None),) if platform.machine() == "arm64" else ()
    else:
        cpuinfo = _read(_PROC_CPUINFO)
        cpu, isa = cpu_name(cpuinfo, _read(_DEVICE_TREE_MODEL)), isa_of_cpuinfo(cpuinfo)
        gpus = _nvidia_gpus()
    threads = psutil.cpu_count(logical=True) or 1
    return Machine(
        system=system,
        cpu=cpu or "unknown",
        cores=psutil.cpu_count(logical=False) or threads,
        threads=threads,
        isa=isa,
        ram_mib=min([psutil.virtual_memory().total, *_cgroup_limit()]) // MIB,
        gpus=gpus,
    )


def available_ram() -> int:
    """Bytes that a new allocation may expect to get, within the container's limit."""
    within = [limit - used for limit in _cgroup_limit() for used in _cgroup_number("memory.current")]
    return max(0, min([psutil.virtual_memory().available, *within]))


def nearest_profile(machine: Machine, profiles: Iterable[DeviceProfile] | None = None) -> tuple[str, float, tuple[str, ...]]:
    """(name, distance, reasons) of the nearest profile; the shipped ones are compared unless others are given."""
    candidates = [load_profile(name) for name in profile_names()] if profiles is None else list(profiles)
    gpu = _best_gpu(machine)
    same = [p for p in candidates if _device(p) == _device_of(gpu)]
    on_cpu = [p for p in candidates if p.runtime.device == "cpu"]
    pool = same or on_cpu or candidates
    distance, name, best = min(((_distance(machine, p), p.name, p) for p in pool), key=lambda item: item[:2])
    return name, distance, _reasons(machine, gpu, best)


def isa_of_cpuinfo(text: str) -> tuple[Isa, ...]:
    """Instruction sets in the text of /proc/cpuinfo."""
    words = {word for line in re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE) for word in line.split()}
    return _ordered(isa for word, isa in _LINUX_FLAGS.items() if word in words)


def isa_of_sysctl(facts: Mapping[str, str]) -> tuple[Isa, ...]:
    """Instruction sets in values of macOS's sysctl."""
    return _ordered(isa for key, isa in _MACOS_KEYS.items() if facts.get(key) == "1")


def cpu_name(cpuinfo: str, device_tree: str) -> str:
    """The CPU's name as x86 systems give it, else the board's."""
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return match.group(1).strip() if match else device_tree.strip("\0 \n")


def _ordered(found: Iterable[Isa]) -> tuple[Isa, ...]:
    kept = set(found)
    return tuple(isa for isa in _ORDER if isa in kept)


def _nvidia_gpus() -> tuple[Gpu, ...]:
    """GPUs as NVIDIA's management library lists them; none without the library or a driver."""
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return tuple(Gpu(kind="cuda", name=_gpu_name(pynvml, h), vram_mib=_vram_mib(pynvml, h)) for h in handles)
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()


def _gpu_name(nvml: Any, handle: Any) -> str:
    name = nvml.nvmlDeviceGetName(handle)
    return name.decode() if isinstance(name, bytes) else name


def _vram_mib(nvml: Any, handle: Any) -> int | None:
    """None on boards whose GPU shares the RAM: the library does not support the question there."""
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).total) // MIB
    except nvml.NVMLError_NotSupported:
        return None


def _sysctl(*keys: str) -> dict[str, str]:
    """Values that macOS knows; keys it does not know are left out."""
    try:
        done = subprocess.run(["sysctl", *keys], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    pairs = (line.split(":", 1) for line in done.stdout.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _cgroup_limit() -> list[int]:
    """Memory limit of the container (cgroup v2), as a list of none or one."""
    return _cgroup_number("memory.max")


def _cgroup_number(name: str) -> list[int]:
    text = _read(_CGROUP / name).strip()
    return [int(text)] if text.isdigit() else []


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _best_gpu(machine: Machine) -> Gpu | None:
    """The GPU with most memory of its own, else the first."""
    return max(machine.gpus, key=lambda gpu: gpu.vram_mib or 0, default=None)


def _device_of(gpu: Gpu | None) -> tuple[str, bool]:
    """(runtime device, with memory of its own)."""
    return ("cpu", False) if gpu is None else (gpu.kind, gpu.vram_mib is not None)


def _device(profile: DeviceProfile) -> tuple[str, bool]:
    return profile.runtime.device, profile.discrete is not None


def _distance(machine: Machine, profile: DeviceProfile) -> float:
    gpu = _best_gpu(machine)
    memory, ram = _ratio(_memory_mib(machine, gpu, profile), profile.model_memory_mib), _ratio(machine.ram_mib, profile.memory.ram_mib)
    both, either = set(machine.isa) & set(profile.cpu.isa), set(machine.isa) | set(profile.cpu.isa)
    isa = 1 - len(both) / len(either) if either else 0.0
    discrete = 0.25 * ram if profile.discrete is not None else 0.0
    return memory + 0.5 * _ratio(machine.cores, profile.cpu.cores) + 2 * isa + discrete


def _memory_mib(machine: Machine, gpu: Gpu | None, profile: DeviceProfile) -> int:
    own = gpu.vram_mib if gpu is not None and profile.discrete is not None else None
    return own or machine.ram_mib


def _ratio(a: int, b: int) -> float:
    return abs(math.log2(max(a, 1) / b))


def _reasons(machine: Machine, gpu: Gpu | None, profile: DeviceProfile) -> tuple[str, ...]:
    device, name = profile.runtime.device, profile.name
    if _device(profile) == _device_of(gpu):
        first = f"computes on {device}, as {name} does"
    else:
        here = "no GPU that llama.cpp uses" if gpu is None else f"{gpu.kind} GPU"
        first = f"{here} here, {name} computes on {device}: no profile has this kind of device"
    kind = "VRAM" if profile.discrete is not None and gpu is not None and gpu.vram_mib else "RAM"
    missing, extra = sorted(set(profile.cpu.isa) - set(machine.isa)), sorted(set(machine.isa) - set(profile.cpu.isa))
    differences = [f"without {', '.join(missing)}"] * bool(missing) + [f"with {', '.join(extra)} more"] * bool(extra)
    return (
        first,
        f"{_memory_mib(machine, gpu, profile):,} MiB of {kind}, {name} has {profile.model_memory_mib:,}",
        f"{machine.cores} cores, {name} has {profile.cpu.cores}",
        f"instruction sets {', '.join(machine.isa) or 'unknown'}: {' and '.join(differences) if differences else f'the same as {name}'}",
    )
