"""Adapters in the files of papers' own code, which are no PEFT folders, and edgeq's general manifest.

    LoLDU           a state dict with only "<module>.parametrizations.weight.0.vector_z"; alpha is saved nowhere
    MatryoshkaLoRA  a state dict with "<module>.lora_A" (n_in, r) and "<module>.lora_B" (r, n_out): transposed against PEFT
    DyLoRA          one with "<module>.lora_A" (r, n_in) and "<module>.lora_B" (n_out, r), as plain LoRA in loralib; alpha is saved nowhere
    manifest        delta.json, {"format": 1, "name": ..., "base": ..., "deltas": {"layers.0.wq.weight": {...}}}, and delta.safetensors

LoLDU: minloldu of SKDDJ/LoLDU. What the files do not say stands beside them, see `edgeq.converters.adapters.options`. Manifest entries:
`edgeq.deltas.manifest`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from edgeq.converters.adapters.sites import Site, model_sites
from edgeq.converters.adapters.tensors import AdapterTensors
from edgeq.converters.sources.json_file import read_json_object
from edgeq.deltas.adapter import Adapter
from edgeq.deltas.decomposed import LoLDU
from edgeq.deltas.delta import AnyFloats, Delta
from edgeq.deltas.lora import LoRA, matryoshka_scale, truncate
from edgeq.deltas.manifest import read_entry
from edgeq.errors import ShapeError, SourceError, UnsupportedError
from edgeq.model import Model

VECTOR = ".parametrizations.weight.0.vector_z"
MANIFEST, MANIFEST_TENSORS = "delta.json", "delta.safetensors"


def read_loldu(path: Path, model: Model, *, alpha: float, name: str | None = None) -> Adapter:
    """A LoLDU state dict. alpha: the `lora_alpha` it was trained with, which the file does not say; the rank is each vector's length."""
    file, sites = AdapterTensors(path), model_sites(model.spec)
    deltas: dict[str, Delta] = {}
    for key in file:
        site = site_of(key.removesuffix(VECTOR), key, sites, file, model) if key.endswith(VECTOR) else None
        if site is None or site.kind != "linear":
            continue
        z = file.take(key)
        deltas |= site.tensors("weight", LoLDU(z=z, base_shape=site.matrix, scale=alpha / len(z)))
    return state_adapter(file, deltas, "LOLDU", name)


def read_matryoshka(path: Path, model: Model, *, rank: int | None = None, scaling: str = "none", name: str | None = None) -> Adapter:
    """A MatryoshkaLoRA state dict, cut to `rank` (None: whole). scaling: the `scale` it was trained with, "none", "linear" or "sqrt"."""
    file = AdapterTensors(path)
    return _nested(file, model, lambda k: matryoshka_scale(k, scaling), rank=rank, kind="MATRYOSHKA", name=name)


def read_dylora(path: Path, model: Model, *, alpha: float, rank: int | None = None, name: str | None = None) -> Adapter:
    """A state dict of LoRA factors as loralib saves it, cut to `rank` (None: whole). alpha: the `lora_alpha` of training.

    DyLoRA scales both factors of a prefix of k directions by sqrt(r / k), so that its strength is alpha / k.
    """
    return _nested(AdapterTensors(path), model, lambda k: alpha / k, rank=rank, kind="DYLORA", name=name)


def _nested(file: AdapterTensors, model: Model, scale: Callable[[int], float], *, rank: int | None, kind: str, name: str | None) -> Adapter:
    deltas: dict[str, Delta] = {}
    for _, site, whole in factors(file, model, transposed=kind == "MATRYOSHKA"):
        kept = whole.rank if rank is None else rank
        deltas |= site.tensors("weight", truncate(whole, kept, scale=scale(kept)))
    return state_adapter(file, deltas, kind, name)


def factors(file: AdapterTensors, model: Model, *, transposed: bool = False) -> Iterator[tuple[str, Site, LoRA]]:
    """Every pair "<module>.lora_A", "<module>.lora_B" of a state dict: the module's name there, its site, the factors at strength 1.

    Raises SourceError and ShapeError naming the key.
    """
    sites = model_sites(model.spec)
    for key in list(file):
        stem = next((key.removesuffix(end) for end in (".lora_A", ".lora_A.weight") if key.endswith(end)), None)
        if stem is None:
            continue
        other = key.replace("lora_A", "lora_B")
        site = site_of(stem, key, sites, file, model)
        if other not in file:
            raise SourceError(f"{file.path}: {other} is missing. The adapter is not complete: save or download it again.")
        a, b = file.take(key), file.take(other)
        if transposed:
            a, b = a.T, b.T
        if a.ndim != 2 or b.ndim != 2 or (b.shape[0], a.shape[1]) != site.shape or b.shape[1] != a.shape[0]:
            raise ShapeError(f"{file.path}: {key} and {other} make {[b.shape[0], a.shape[-1]]}, the module here is {list(site.shape)}")
        yield stem, site, LoRA(a=a, b=b)


def read_manifest(folder: Path, model: Model, *, name: str | None = None) -> Adapter:
    """A folder with delta.json and, unless every operand has a seed, delta.safetensors."""
    path = folder / MANIFEST
    content = read_json_object(path)
    if content.get("format") != 1:
        raise UnsupportedError(f"{path}: format is {content.get('format')!r}, this edgeq reads 1")
    unknown = sorted(set(content) - {"format", "name", "base", "deltas"})
    if unknown:
        raise SourceError(f"{path}: unknown key {unknown[0]!r}; known: base, deltas, format, name")
    entries, base, title = content.get("deltas"), content.get("base"), name or content.get("name") or folder.resolve().name
    if not isinstance(entries, dict) or not entries or not all(isinstance(e, dict) for e in entries.values()):
        raise SourceError(f"{path}: deltas must map canonical tensor names to objects")
    stored: dict[str, AnyFloats] = {}
    files: tuple[Path, ...] = (path,)
    if (folder / MANIFEST_TENSORS).is_file():
        file = AdapterTensors(folder / MANIFEST_TENSORS)
        stored = {key: file.take(key) for key in list(file)}
        files += (file.path,)
    used = {operand for e in entries.values() for operand in e.get("tensors", ()) if isinstance(operand, str)}
    if unused := sorted(set(stored) - used):
        raise UnsupportedError(f"{files[-1]}: {unused[0]} is used by no entry of {path}. Leaving it out would make another adapter.")
    deltas: dict[str, Delta] = {}
    for tensor, entry in entries.items():
        if tensor not in model.tensors:
            raise SourceError(f"{path}: {model.name} has no tensor {tensor!r}; its names look like {next(iter(model.tensors))!r}")
        deltas[tensor] = read_entry(entry, stored, where=f"{path}: {tensor}")
    return Adapter(name=str(title), kind="MANIFEST", deltas=deltas, files=files, base_name=base if isinstance(base, str) else None)


def site_of(stem: str, key: str, sites: Mapping[str, Site], file: AdapterTensors, model: Model) -> Site:
    for path in (stem, stem.removeprefix("base_model.model."), f"model.{stem}"):
        if path in sites:
            return sites[path]
    raise SourceError(f"{file.path}: {key} belongs to no module of {model.name}. Use the adapter's own base model.")


def state_adapter(file: AdapterTensors, deltas: dict[str, Delta], kind: str, name: str | None) -> Adapter:
    if file.left:
        raise UnsupportedError(
            f"{file.path}: {next(iter(file.left))} is no part of a {kind} adapter. Leaving it out would make another adapter."
        )
    if not deltas:
        raise SourceError(f"{file.path}: the adapter has no tensors")
    return Adapter(name=name or file.path.stem, kind=kind, deltas=deltas, files=(file.path,))
