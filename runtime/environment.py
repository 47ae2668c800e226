"""The machine and software that a measurement was taken on.

Nothing here names the machine or the time: two runs on the same machine describe themselves alike.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from edgeq import __version__ as edgeq_version
from edgeq.errors import MissingDependency
from edgeq.runtime.cores import CPU_FOLDER, affinity, read_text, usable_cores
from edgeq.runtime.llama import library

# Instruction sets that llama.cpp's kernels ask for, by the names /proc/cpuinfo uses (x86 "flags", ARM "Features").
_FLAGS = {
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx_vnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_int8": "amx_int8",
    "asimd": "neon",
    "neon": "neon",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "sve": "sve",
    "asimdhp": "fp16",
}


def describe(*, artifact_sha256: str | None = None) -> dict[str, Any]:
    """CPU, memory, GPUs, system and library versions, as JSON-ready values; what the system does not say is None."""
    return {
        "cpu": {
            "name": cpu_name(),
            "flags": list(cpu_flags()),
            "physical_cores": psutil.cpu_count(logical=False),
            "logical_cores": psutil.cpu_count(),
            "usable_cores": usable_cores(),
            "affinity": sorted(affinity()),
            "governor": governor(),
        },
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "software": software(),
        "artifact_sha256": artifact_sha256,
    }


def cpu_name() -> str | None:
    """Marketing name of the CPU."""
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string")
    info = read_text(Path("/proc/cpuinfo")) or ""
    for key in ("model name", "Model", "Hardware"):
        if match := re.search(rf"^{key}\s*:\s*(.+)$", info, re.MULTILINE):
            return match[1].strip()
    return (read_text(Path("/proc/device-tree/model")) or "").rstrip("\0") or platform.processor() or None


def cpu_flags() -> tuple[str, ...]:
    """Instruction sets among those that llama.cpp has kernels for, sorted: avx2, avx512_vnni, neon, dotprod, i8mm, ..."""
    if sys.platform == "darwin":
        found = {"neon"} if platform.machine() == "arm64" else set()
        found |= {name for key, name in (("FEAT_DotProd", "dotprod"), ("FEAT_I8MM", "i8mm")) if _sysctl(f"hw.optional.arm.{key}") == "1"}
        return tuple(sorted(found))
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", read_text(Path("/proc/cpuinfo")) or "", re.MULTILINE)
    words = match[1].split() if match else []
    return tuple(sorted({_FLAGS[word] for word in words if word in _FLAGS}))


def governor() -> str | None:
    """Frequency governor of the first CPU this process may use ("performance", "powersave", ...)."""
    cpu = min(affinity(), default=0)
    return read_text(CPU_FOLDER / f"cpu{cpu}" / "cpufreq" / "scaling_governor")


def gpus() -> list[dict[str, Any]]:
    """NVIDIA GPUs by NVML: name, memory, driver. Empty without NVML, which comes with edgeq[nvidia]."""
    with nvml() as n:
        if n is None:
            return []
        driver = n.nvmlSystemGetDriverVersion()
        handles = [n.nvmlDeviceGetHandleByIndex(i) for i in range(n.nvmlDeviceGetCount())]
        return [{"name": n.nvmlDeviceGetName(h), "memory_bytes": n.nvmlDeviceGetMemoryInfo(h).total, "driver": driver} for h in handles]


@contextmanager
def nvml() -> Iterator[ModuleType | None]:
    """The initialised `pynvml` module, or None where there is no NVIDIA driver or no binding."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def software() -> dict[str, Any]:
    """Versions of edgeq, Python and the runtime, and what llama.cpp was built with."""
    facts: dict[str, Any] = {"edgeq": edgeq_version, "python": platform.python_version()}
    facts |= {"llama_cpp": None, "llama_cpp_build": None, "gpu_build": None, "onnxruntime": _onnxruntime()}
    try:
        c = library()
    except MissingDependency:
        return facts
    facts["llama_cpp"] = metadata.version("llama-cpp-python")
    facts["llama_cpp_build"] = c.llama_print_system_info().decode("utf-8", "replace").strip(" |")
    facts["gpu_build"] = c.llama_supports_gpu_offload()
    return facts


def _onnxruntime() -> str | None:
    """Name and version of the build of ONNX Runtime that is installed."""
    for name in ("onnxruntime-gpu", "onnxruntime"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return None


def _sysctl(name: str) -> str | None:
    try:
        return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
