"""Device profiles: what a device is and what it prefers, one TOML file each.

A profile is data with units in its keys. The shipped ones lie in `device_profiles/`; a file of the user's own works the same way.
Its keys are described in `edgeq.profile_keys`; rules that concern several keys are here.
A file that breaks a rule is refused with a ProfileError that names file, key and rule.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from edgeq.errors import ProfileError
from edgeq.profile_keys import ARM_ISA, KEYS, X86_ISA, base_grid

Isa = Literal["avx2", "avx512", "avx512_vnni", "neon", "dotprod", "i8mm"]
AcceleratorKind = Literal["none", "cuda", "metal", "vulkan"]
Device = Literal["cpu", "cuda", "metal"]
Adapters = Literal["merge", "keep", "auto"]


@dataclass(frozen=True, kw_only=True)
class Cpu:
    cores: int
    threads: int
    isa: tuple[Isa, ...]
    mem_bandwidth_gb_s: float


@dataclass(frozen=True, kw_only=True)
class Memory:
    ram_mib: int
    budget_mib: int


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """vram_mib is None for an accelerator that shares the RAM (unified)."""

    kind: AcceleratorKind
    name: str
    mem_bandwidth_gb_s: float
    unified: bool
    vram_mib: int | None = None


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """gpu_layers: layers on the accelerator, the head counted as one more; None means all, 0 none."""

    name: Literal["llama.cpp", "onnxruntime"]
    device: Device
    gpu_layers: int | None


@dataclass(frozen=True, kw_only=True)
class ExportPreferences:
    grids: tuple[str, ...]
    adapters: Adapters
    n_ctx: int
    kv_type: str


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the device should reach with models of the class that `model` describes."""

    model: str
    ttft_ms: float
    decode_tok_s: float


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """accelerator is None for kind "none" or without a section."""

    name: str
    description: str
    cpu: Cpu
    memory: Memory
    accelerator: Accelerator | None
    runtime: Runtime
    export: ExportPreferences
    targets: Targets | None

    @property
    def discrete(self) -> Accelerator | None:
        """The accelerator with memory of its own that the runtime uses, if there is one: `memory.budget_mib` is then part of its VRAM."""
        used = self.accelerator is not None and self.runtime.device == self.accelerator.kind
        return self.accelerator if used and self.accelerator is not None and not self.accelerator.unified else None

    @property
    def model_memory_mib(self) -> int:
        """The memory that a model lives in: VRAM of a discrete accelerator in use, else RAM."""
        return self.memory.ram_mib if self.discrete is None else self.discrete.vram_mib or 0

    def to_json(self) -> dict[str, Any]:
        """The sections and keys of the file; what the file leaves out is null."""
        document = asdict(self)
        document["cpu"]["isa"], document["export"]["grids"] = list(self.cpu.isa), list(self.export.grids)
        document["runtime"]["gpu_layers"] = "all" if self.runtime.gpu_layers is None else self.runtime.gpu_layers
        return document


_SECTIONS = tuple(dict.fromkeys(key.section for key in KEYS if key.section))
_OPTIONAL_SECTIONS = ("accelerator", "targets")


def profile_names() -> tuple[str, ...]:
    """Names of the shipped profiles, sorted."""
    folder = resources.files("edgeq.device_profiles")
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")))


def load_profile(name_or_path: str | Path) -> DeviceProfile:
    """A shipped profile by name, or a file: anything that ends in .toml or contains a path separator.

    Raises ProfileError when there is no such profile, with all names and the nearest one, or when the file breaks a rule.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.endswith(".toml") or "/" in text or "\\" in text:
        return parse_profile(Path(name_or_path))
    names = profile_names()
    if text not in names:
        near = difflib.get_close_matches(text.lower(), names, 1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ProfileError(f"no profile is called {text!r}.{hint} Known: {', '.join(names)}; or give the path of a .toml file.")
    with resources.as_file(resources.files("edgeq.device_profiles") / f"{text}.toml") as path:
        return parse_profile(path)


def parse_profile(path: Path) -> DeviceProfile:
    """Read and check one file. Raises ProfileError naming file, key and rule."""
    return _profile(path, _read(path))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise ProfileError(f"{path} does not exist. Give a .toml file, or a name from `edgeq profiles list`.") from err
    except OSError as err:
        raise ProfileError(f"{path}: cannot be read ({err.strerror}). Give a .toml file, or a name from `edgeq profiles list`.") from err
    except UnicodeDecodeError as err:
        raise ProfileError(f"{path}: not UTF-8 text (byte {err.start}). Save it as UTF-8.") from err
    except tomllib.TOMLDecodeError as err:
        raise ProfileError(f"{path}: not valid TOML: {err}.") from err


def _profile(path: Path, document: Mapping[str, Any]) -> DeviceProfile:
    values = _checked(path, document)
    accelerator = _accelerator(path, values)
    cpu, export = values["cpu"], values["export"]
    _check_cpu(path, cpu)
    _check_grids(path, export["grids"])
    targets = values["targets"]
    if targets is not None:
        _require(path, "targets", targets, ("model", "ttft_ms", "decode_tok_s"), "a file with [targets] says all three")
    profile = DeviceProfile(
        name=values[""]["name"],
        description=values[""]["description"],
        cpu=Cpu(cores=cpu["cores"], threads=cpu["threads"], isa=tuple(cpu["isa"]), mem_bandwidth_gb_s=cpu["mem_bandwidth_gb_s"]),
        memory=Memory(**values["memory"]),
        accelerator=accelerator,
        runtime=_runtime(path, values["runtime"], accelerator),
        export=ExportPreferences(
            grids=tuple(export["grids"]), adapters=export["adapters"], n_ctx=export["n_ctx"], kv_type=export["kv_type"]
        ),
        targets=None if targets is None else Targets(**targets),
    )
    if profile.memory.budget_mib > profile.model_memory_mib:
        which = "memory.ram_mib" if profile.discrete is None else "accelerator.vram_mib, where the model lives"
        raise ProfileError(
            f"{path}: memory.budget_mib is {profile.memory.budget_mib}; it must not exceed the {profile.model_memory_mib} of {which}."
        )
    return profile


def _checked(path: Path, document: Mapping[str, Any]) -> dict[str, dict[str, Any] | Any]:
    """Values by section and key, every key known and of its type; an absent optional section is None."""
    tables: dict[str, Any] = {"": {k: v for k, v in document.items() if k not in _SECTIONS}}
    for section in _SECTIONS:
        tables[section] = document.get(section)
        if tables[section] is None and section not in _OPTIONAL_SECTIONS:
            raise ProfileError(f"{path}: section [{section}] is missing. Needed there: {', '.join(_needed(section))}.")
        if tables[section] is not None and not isinstance(tables[section], dict):
            raise ProfileError(f"{path}: {section} is {tables[section]!r}; it must be a section: [{section}].")
    known = {key.path: key for key in KEYS}
    for section, table in tables.items():
        for name in table or ():
            key_path = f"{section}.{name}" if section else name
            if key_path not in known:
                near = difflib.get_close_matches(key_path, (*known, *_SECTIONS), 1, cutoff=0.7)
                hint = f" Did you mean {near[0]}?" if near else f" Known there: {', '.join(k.name for k in KEYS if k.section == section)}."
                raise ProfileError(f"{path}: {key_path} is not a key of a profile.{hint}")
    for key in KEYS:
        table = tables[key.section]
        if table is None:
            continue
        if key.name not in table:
            if key.required:
                raise ProfileError(f"{path}: {key.path} is missing. {key.meaning}")
        elif (wrong := key.check(table[key.name])) is not None:
            raise ProfileError(f"{path}: {key.path} is {table[key.name]!r}; {wrong}.")
    return tables


def _needed(section: str) -> list[str]:
    return [key.name for key in KEYS if key.section == section and key.required]


def _require(path: Path, section: str, table: Mapping[str, Any], names: tuple[str, ...], why: str) -> None:
    for name in names:
        if name not in table:
            raise ProfileError(f"{path}: {section}.{name} is missing; {why}.")


def _accelerator(path: Path, values: Mapping[str, Any]) -> Accelerator | None:
    table = values["accelerator"]
    if table is None:
        return None
    if table["kind"] == "none":
        if extra := sorted(table.keys() - {"kind"}):
            raise ProfileError(f'{path}: accelerator.{extra[0]} is given, but accelerator.kind is "none". Remove it, or name the kind.')
        return None
    _require(path, "accelerator", table, ("name", "mem_bandwidth_gb_s", "unified"), f'an accelerator of kind "{table["kind"]}" needs it')
    if table["unified"] and "vram_mib" in table:
        raise ProfileError(f"{path}: accelerator.vram_mib is given, but a unified accelerator has the memory.ram_mib only. Remove it.")
    if not table["unified"]:
        _require(path, "accelerator", table, ("vram_mib",), "an accelerator that is not unified needs it")
    return Accelerator(**table)


def _runtime(path: Path, table: Mapping[str, Any], accelerator: Accelerator | None) -> Runtime:
    device, kind = table["device"], "none" if accelerator is None else accelerator.kind
    layers = table.get("gpu_layers", 0 if device == "cpu" else None)
    if device == "cpu" and layers != 0:
        raise ProfileError(f'{path}: runtime.gpu_layers is {layers!r}, but runtime.device is "cpu". Remove it, or name the device.')
    if device != "cpu":
        if kind != device:
            raise ProfileError(f'{path}: runtime.device is "{device}", but accelerator.kind is "{kind}"; both must be the same.')
        _require(path, "runtime", table, ("gpu_layers",), f'device "{device}" needs it ("all", or a number of layers)')
        if layers == 0:
            raise ProfileError(f'{path}: runtime.gpu_layers is 0, but runtime.device is "{device}". Use device "cpu", or put layers on it.')
    return Runtime(name=table["name"], device=device, gpu_layers=None if layers == "all" else layers)


def _check_cpu(path: Path, cpu: Mapping[str, Any]) -> None:
    if cpu["threads"] < cpu["cores"]:
        raise ProfileError(f"{path}: cpu.threads is {cpu['threads']}; it must be at least the {cpu['cores']} of cpu.cores.")
    isa = set(cpu["isa"])
    x86, arm = sorted(isa & set(X86_ISA)), sorted(isa & set(ARM_ISA))
    if x86 and arm:
        raise ProfileError(f"{path}: cpu.isa mixes x86 ({', '.join(x86)}) and ARM ({', '.join(arm)}); keep one.")
    for flag, needs in (("avx512", "avx2"), ("avx512_vnni", "avx512"), ("dotprod", "neon"), ("i8mm", "neon")):
        if flag in isa and needs not in isa:
            raise ProfileError(f"{path}: cpu.isa has {flag} without {needs}, which every such CPU has. Add {needs}.")


def _check_grids(path: Path, grids: list[str]) -> None:
    if not grids:
        raise ProfileError(f"{path}: export.grids is empty; name at least one, such as Q4_K_M.")
    for better, smaller in pairwise(grids):
        if base_grid(smaller).bits > base_grid(better).bits:
            raise ProfileError(
                f"{path}: export.grids has {smaller} ({base_grid(smaller).bits:g} bits) after {better} ({base_grid(better).bits:g} bits); "
                "order them from most bits to fewest."
            )
