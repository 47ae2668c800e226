"""Opening whatever a user calls an adapter, as the kind that it is.

    a .gguf file                                  a LoRA as llama.cpp loads it
    a folder with adapter_config.json             PEFT's; with codes in the place of numbers, edgeq's; with index lists beside it, LoRAM's
    a folder with delta.json                      edgeq's general manifest
    a state dict (.safetensors, .bin, .pt, .pth)  LoLDU, MatryoshkaLoRA, DyLoRA, L4Q, EfficientDM or LR-QAT, or a folder with just that

State dicts are told apart by the names and shapes of their tensors. What they do not say must stand in edgeq_adapter.json beside them, see
`edgeq.converters.adapters.options`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from edgeq.base_fingerprint import check_base
from edgeq.converters.adapters.coded import CODED
from edgeq.converters.adapters.gguf_lora import read_gguf_lora
from edgeq.converters.adapters.loram import has_lists, read_loram
from edgeq.converters.adapters.options import OPTIONS, needed, read_options, refuse_unused, text, unsaid
from edgeq.converters.adapters.peft import CONFIG, PICKLE, WEIGHTS, read_peft_folder
from edgeq.converters.adapters.published import (
    MANIFEST,
    MANIFEST_TENSORS,
    VECTOR,
    read_dylora,
    read_loldu,
    read_manifest,
    read_matryoshka,
)
from edgeq.converters.adapters.sites import Site, model_sites
from edgeq.converters.adapters.tensors import AdapterTensors
from edgeq.converters.adapters.trained_codes import KINDS as CODE_KINDS
from edgeq.converters.adapters.trained_codes import STEP, read_trained_codes
from edgeq.converters.sources.json_file import Section
from edgeq.converters.tokenizers.hf import read_hf_tokenizer
from edgeq.deltas.adapter import Adapter
from edgeq.deltas.delta import Delta
from edgeq.deltas.merge import EMBED, HEAD, check_fits
from edgeq.errors import SourceError, UsageError
from edgeq.model import Model, Tokenizer

_STATES = (".safetensors", ".bin", ".pt", ".pth")
_FORMS = f"a folder with {CONFIG} or {MANIFEST}, a .gguf file, or a state dict ({', '.join(_STATES)})"


def split_reference(reference: str) -> tuple[Path, str | None]:
    """PATH[=NAME] as the command line has it. A path that exists as it stands is not split.

    Raises UsageError for a name that is empty or not fit for a file name.
    """
    path, sign, name = reference.rpartition("=")
    if not sign or Path(reference).exists():
        return Path(reference), None
    if not name or not all(c.isalnum() or c in "._-" for c in name) or name.startswith("."):
        raise UsageError(f"--adapter {reference}: the name {name!r} must consist of letters, digits, '.', '_' and '-'")
    return Path(path), name


def open_adapter(path: Path, model: Model, *, name: str | None = None, rank: int | None = None, force: bool = False) -> Adapter:
    """Read an adapter for this model, of any kind that edgeq knows.

    rank: take the first directions of a nested adapter only (DyLoRA, MatryoshkaLoRA; see `read_peft_folder`). force: go on when the
    adapter says that it was made for other weights. Raises SourceError when the path is none of the known forms, leaves something
    unsaid, or belongs to another model; UsageError for a rank of a kind that has none; and what the readers raise.
    """
    if not path.exists():
        raise SourceError(f"{path} does not exist. Name an adapter's folder or its .gguf file.")
    options = read_options(path if path.is_dir() else path.parent)
    adapter = _read(path, model, options, name, rank)
    check_fits(adapter, model)
    base, stored = text(options, "base"), text(options, "base_fingerprint")
    if options is not None:
        refuse_unused(options)
        adapter = replace(
            adapter,
            files=(*adapter.files, options.path),
            base_name=base or adapter.base_name,
            base_fingerprint=stored or adapter.base_fingerprint,
        )
    note = check_base(
        adapter.base_fingerprint,
        model.tensors,
        adapter=adapter.name,
        model=model.name,
        where=f"{path}: its base_fingerprint",
        force=force,
    )
    return adapter if note is None else replace(adapter, notes=(*adapter.notes, note))


def _read(path: Path, model: Model, options: Section | None, name: str | None, rank: int | None) -> Adapter:
    stated = None if options is None else options.get("kind")
    if path.is_file() and path.suffix == ".gguf":
        _no_kind(path, stated, "a GGUF adapter")
        _no_rank(path, rank, "a GGUF file does not say how its strength follows from it")
        return read_gguf_lora(path, model, name=name)
    if path.is_file() and path.suffix in _STATES:
        if path.name in (WEIGHTS, PICKLE, CODED, MANIFEST_TENSORS):
            raise SourceError(f"{path} is a part of an adapter. Name its folder: {path.parent}")
        return _read_state(path, model, options, name, rank)
    if (path / CONFIG).is_file():
        if stated == "LORAM" or (stated is None and has_lists(path)):
            _no_rank(path, rank, "LoRAM trains no nested ranks")
            return read_loram(path, model, options=options, name=name)
        _no_kind(path, stated, f"an adapter with {CONFIG}")
        return read_peft_folder(path, model, name=name, rank=rank)
    if (path / MANIFEST).is_file():
        _no_kind(path, stated, f"an adapter with {MANIFEST}")
        _no_rank(path, rank, "a manifest has no directions to choose from")
        return read_manifest(path, model, name=name)
    states = [] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in _STATES and file.is_file())
    if len(states) == 1:
        return _read_state(states[0], model, options, name or path.resolve().name, rank)
    several = f" It has {len(states)} state dicts; name one of them." if states else ""
    raise SourceError(f"{path} is no adapter: expected {_FORMS}.{several}")


def _read_state(path: Path, model: Model, options: Section | None, name: str | None, rank: int | None) -> Adapter:
    kind = (None if options is None else options.get("kind")) or _kind_of(path, model)
    wanted = needed(options, kind, path)
    if kind == "MATRYOSHKA":
        scaling = wanted.get("scaling")
        if scaling not in ("none", "linear", "sqrt"):
            raise SourceError(f'{wanted.where("scaling")} is {scaling!r}, expected "none", "linear" or "sqrt"')
        return read_matryoshka(path, model, rank=rank, scaling=scaling, name=name)
    if kind == "DYLORA":
        return read_dylora(path, model, alpha=wanted.number("alpha"), rank=rank, name=name)
    _no_rank(path, rank, f"{kind} trains no nested ranks")
    if kind == "LOLDU":
        return read_loldu(path, model, alpha=wanted.number("alpha"), name=name)
    if kind in CODE_KINDS:
        return read_trained_codes(path, model, wanted, name=name)
    raise SourceError(f"{path}: a {kind} adapter is a folder with {CONFIG}; this is a state dict")


def _kind_of(path: Path, model: Model) -> str:
    """What the tensors' names and shapes say. Raises SourceError when they say nothing, or not which of several."""
    file = AdapterTensors(path)
    if any(key.endswith(VECTOR) for key in file):
        return "LOLDU"
    if any(key.endswith(STEP) for key in file):
        raise SourceError(f"{path} {unsaid(*CODE_KINDS)}")
    sites = model_sites(model.spec)
    for key in file:
        stem = next((key.removesuffix(end) for end in (".lora_A", ".lora_A.weight") if key.endswith(end)), None)
        site = None if stem is None else _site(stem, sites)
        if stem is None or site is None or len(file.shape(key)) != 2:
            continue
        first, second = (n == site.n_in for n in file.shape(key))
        if first != second:
            return "MATRYOSHKA" if first else "DYLORA"
    if any("lora_A" in key for key in file):
        raise SourceError(f"{path} {unsaid('DYLORA', 'MATRYOSHKA')}")
    raise SourceError(f"{path} is no adapter: it has neither LoRA factors nor LoLDU's vectors. A whole model is exported as MODEL itself.")


def _site(stem: str, sites: Mapping[str, Site]) -> Site | None:
    return next((sites[p] for p in (stem, stem.removeprefix("base_model.model."), f"model.{stem}") if p in sites), None)


def _no_kind(path: Path, stated: str | None, what: str) -> None:
    if stated is not None:
        raise SourceError(f"{path} is {what}, not a {stated} adapter as {OPTIONS} says. Remove the kind there, or the file.")


def _no_rank(path: Path, rank: int | None, why: str) -> None:
    if rank is not None:
        raise UsageError(f"{path}: a rank can be chosen of PEFT, DyLoRA and MatryoshkaLoRA adapters only; {why}")


def adapter_tokenizer(adapter: Adapter) -> Tokenizer | None:
    """The tokenizer that an adapter which adds tokens brings in its folder; None when it adds none or has none."""
    grown = next((d for key in (EMBED, HEAD) if (d := adapter.deltas.get(key)) is not None and _grows(d)), None)
    if grown is None or not adapter.files:
        return None
    folder = adapter.files[0].parent
    if not (folder / "tokenizer.json").is_file():
        return None
    return read_hf_tokenizer(folder, n_vocab=grown.out_shape[0])


def _grows(delta: Delta) -> bool:
    return delta.out_shape != delta.shape
