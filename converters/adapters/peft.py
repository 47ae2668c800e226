"""Adapter folders as PEFT writes them: adapter_config.json and adapter_model.safetensors (or, by torch's weights-only loader, .bin).

Or adapter_model.coded.safetensors, which edgeq writes: the same tensors in codes of few bits.

Keys of the file are "base_model.model." + module path + parameter, without the adapter's name; tensors that modules share lie
directly below "base_model.". Every key must belong to a module that the config selects, every selected module must be there, and
every config key must be understood: what PEFT would pass over with a warning is an error here. Read against PEFT 0.21.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.converters.adapters.coded import CODED, CodedTensors
from edgeq.converters.adapters.kinds import ALWAYS, KINDS, REFUSED, Kind
from edgeq.converters.adapters.module import Module, Shared
from edgeq.converters.adapters.sites import BODIES, Site, model_sites
from edgeq.converters.adapters.targets import is_saved, names_or_regex, selected
from edgeq.converters.adapters.tensors import AdapterTensors, Tensors
from edgeq.converters.sources.json_file import Section, read_json_object
from edgeq.deltas.adapter import Adapter
from edgeq.deltas.delta import Delta, Replace, SetRows, Then
from edgeq.deltas.lora import LoRA, truncate
from edgeq.errors import EdgeqError, ShapeError, SourceError, UnsupportedError
from edgeq.model import Model

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_CHUNK_VALUES = 1 << 22
_MODEL, _SHARED = "base_model.model.", "base_model."
# LoRA-XS and LoRA-SB, written by PEFT versions that took the adapter's name out together with a dot.
_CORE = re.compile(r"^(?P<path>.*)_lora_latent_mapping\.weight$")
_TOKENS = ("token_adapter.trainable_tokens_delta", "trainable_tokens_delta")
_PLAIN = ("weight", "bias", "base_layer.weight", "base_layer.bias", *_TOKENS)


def read_peft_folder(folder: Path, model: Model, *, name: str | None = None, rank: int | None = None) -> Adapter:
    """Read an adapter for this model; of its tensors only headers and what the adapter's own arithmetic needs.

    rank: take the first directions of a nested adapter (DyLoRA) only, at alpha / rank; for LoRA alone. Raises SourceError for files
    that are missing, broken, incomplete or for another model, ShapeError for tensors of other shapes, UnsupportedError for kinds and
    options that nothing here can honour.
    """
    config = Section(read_json_object(_inside(folder, CONFIG)), folder / CONFIG)
    peft_type = config.get("peft_type")
    if peft_type == "TRAINABLE_TOKENS":
        kind = None
    else:
        kind = _kind(config, peft_type)
        if kind.check is not None:
            kind.check(config)
    path = _weights(folder)
    file: Tensors = CodedTensors(_inside(folder, path.name)) if path.name == CODED else AdapterTensors(_inside(folder, path.name))
    title = name or folder.resolve().name
    reader = _Reader(config, file, model, kind)
    try:
        deltas = reader.deltas()
    except (ShapeError, SourceError) as err:
        base = config.get("base_model_name_or_path")
        hint = f" The adapter says it was trained on {base}." if isinstance(base, str) and base else ""
        raise type(err)(f"{err}{hint}") from err
    reader.refuse_rest()
    notes = list(reader.notes)
    if rank is not None:
        notes.append(
            f"only its first {rank} directions are taken: the adapter of that rank if it was trained nested (DyLoRA), else another one; "
            "`edgeq adapters squeeze` finds the best one of a rank"
        )
        deltas = {key: _nested(delta, rank, config, key) for key, delta in deltas.items()}
    dora = kind is not None and peft_type == "LORA" and config.boolean("use_dora", default=False)
    base_name = config.get("base_model_name_or_path")
    return Adapter(
        name=title,
        kind="DORA" if dora else str(peft_type),
        deltas=deltas,
        files=(folder / CONFIG, path),
        base_name=base_name if isinstance(base_name, str) and base_name else None,
        notes=tuple(notes),
    )


def _weights(folder: Path) -> Path:
    """The file of tensors: numbers, or else codes. Raises SourceError when there is none, or numbers and codes."""
    found = [folder / name for name in (WEIGHTS, PICKLE, CODED) if (folder / name).is_file()]
    if not found:
        raise SourceError(f"{folder} has neither {WEIGHTS} nor {PICKLE}. Download the adapter's folder again, with all its files.")
    if found[0].name != CODED and found[-1].name == CODED:
        raise SourceError(f"{folder} has both {found[0].name} and {CODED}, and nothing says which one counts. Remove one of them.")
    return found[0]


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder; what links lead out to is not followed, except into the blobs of a hub cache."""
    path = folder / name
    real, home = path.resolve(), folder.resolve()
    cache = home.parent.parent if home.parent.name == "snapshots" else home
    if not real.is_relative_to(cache):
        raise SourceError(f"{path} leads out of its folder, to {real}. Copy the file into the folder if you trust it.")
    return path


def _kind(config: Section, peft_type: Any) -> Kind:
    if not isinstance(peft_type, str):
        raise SourceError(f"{config.where('peft_type')} is {peft_type!r}, expected a name such as LORA")
    if peft_type in REFUSED:
        raise UnsupportedError(f"{config.where('peft_type')} is {peft_type}: {REFUSED[peft_type]}.")
    if peft_type not in KINDS:
        raise UnsupportedError(
            f"{config.where('peft_type')} is {peft_type!r}; supported: {', '.join(KINDS)}. Merge it with PEFT first "
            "(merge_and_unload, save_pretrained) and export the merged model."
        )
    return KINDS[peft_type]


class _Reader:
    """One pass over a file: keys sorted to modules, modules built, and what is left over named."""

    def __init__(self, config: Section, file: Tensors, model: Model, kind: Kind | None) -> None:
        self.config, self.file, self.model, self.kind = config, file, model, kind
        self.notes: list[str] = []
        body = _body(file)
        self.sites = model_sites(model.spec, body)
        self.by_module: dict[str, dict[str, str]] = {}
        self.shared: dict[str, str] = {}
        paths = sorted(self.sites, key=len, reverse=True)
        for key in file:
            self._sort(key, paths)

    def _sort(self, key: str, paths: list[str]) -> None:
        if key.startswith(_MODEL):
            rest = key.removeprefix(_MODEL)
            core = _CORE.match(rest)
            if core and core["path"] in self.sites:
                self.by_module.setdefault(core["path"], {})["lora_latent_mapping.weight"] = key
                return
            for path in paths:
                if rest.startswith(f"{path}."):
                    self.by_module.setdefault(path, {})[rest.removeprefix(f"{path}.")] = key
                    return
        elif key.startswith(_SHARED):
            self.shared[key.removeprefix(_SHARED)] = key

    def deltas(self) -> dict[str, Delta]:
        targets = [] if self.kind is None else self._targets()
        shared = Shared(file=self.file, names=self.shared, sites=tuple(self.sites[path] for path in targets), cache={})
        deltas: dict[str, Delta] = {}
        for path, names in self.by_module.items():
            deltas |= self._plain(self.sites[path], names)
        for index, path in enumerate(targets):
            names = self.by_module.get(path, {})
            site = self.sites[path]
            module = Module(site=site, config=self.config, names=names, file=self.file, shared=shared, index=index)
            assert self.kind is not None
            try:
                built = self.kind.build(module)
            except EdgeqError as err:
                if isinstance(err, SourceError | UnsupportedError) or str(self.file.path) in str(err):
                    raise
                raise ShapeError(f"{module.where}: {err}") from err
            for suffix, delta in built.items():
                for name, part in site.tensors(suffix, delta).items():
                    deltas[name] = Then(deltas[name], part) if name in deltas else part
        self._tie(deltas)
        if not deltas:
            raise SourceError(f"{self.file.path}: the adapter changes nothing. It may have been saved by a process that did not hold it.")
        return deltas

    def _targets(self) -> list[str]:
        """Modules to build: those the config selects, all of which the file must have, and no other."""
        assert self.kind is not None
        wanted = selected(self.config, self.sites.values(), self.kind.modules)
        have = {path for path, names in self.by_module.items() if any(rest not in _PLAIN for rest in names)}
        if self.config.get("target_modules") is None:
            wanted = [path for path in wanted if path in have]
        if self.config.get("ensure_weight_tying") and self.model.spec.tied:
            wanted = self._with_tied(wanted, have)
        missing = [path for path in wanted if path not in have]
        # a norm or head that is only saved beside the adapter is no target
        extra = [path for path in self.by_module if path in have and path not in wanted]
        if extra and self.kind.modules != ("norm",):
            raise SourceError(
                f"{self.file.path}: has tensors for {extra[0]}, which target_modules and its companions in {self.config.path} do not "
                "select. File and config do not belong together."
            )
        if missing:
            raise SourceError(
                f"{self.file.path}: {self.config.path} selects {missing[0]} ({len(missing)} such modules), for which the file has nothing. "
                "The adapter is not complete, or was made for a model with other layers."
            )
        return wanted

    def _with_tied(self, wanted: list[str], have: set[str]) -> list[str]:
        """Embedding and head count as selected together; the file need not repeat one for the other."""
        pair = {path for path, site in self.sites.items() if site.pieces[0][0] in ("embed", "head")}
        if not pair & set(wanted):
            return wanted
        return (
            [path for path in self.sites if path in wanted or path in pair]
            if pair <= have
            else [p for p in wanted if p in have or p not in pair]
        )

    def _plain(self, site: Site, names: Mapping[str, str]) -> dict[str, Delta]:
        """What a file holds beside the adapter proper: modules saved whole, trained biases, resized embeddings, trained tokens."""
        deltas: dict[str, Delta] = {}
        saved = is_saved(names_or_regex(self.config, "modules_to_save"), site.path)
        embeds = site.pieces[0][0] in ("embed", "head")
        bias = self.config.get("bias") or "none"
        for rest, key in names.items():
            weight = rest in ("weight", "base_layer.weight")
            if weight and embeds and not saved and self._is_base(site, key):
                continue  # PEFT saves an adapted embedding's base with it, changed or not
            if (weight and (saved or embeds)) or (rest == "bias" and saved):
                deltas |= site.tensors("weight" if weight else "bias", self._replacement(site, key, weight=weight))
            elif rest in ("bias", "base_layer.bias") and bias != "none":
                deltas |= site.tensors("bias", self._replacement(site, key, weight=False))
            elif rest in _TOKENS and embeds:
                deltas |= site.tensors("weight", self._tokens(site, key))
        return deltas

    def _is_base(self, site: Site, key: str) -> bool:
        """Whether a stored embedding or head is the model's own, value by value."""
        name = site.pieces[0][0] + ".weight"
        base = self.model.tensors["embed.weight" if name not in self.model.tensors else name]
        if self.file.shape(key) != base.shape:
            return False
        values = self.file.take(key)
        step = max(1, _CHUNK_VALUES // base.n_cols)
        return all(np.array_equal(values[i : i + step], base.decode(i, min(i + step, base.n_rows))) for i in range(0, base.n_rows, step))

    def _replacement(self, site: Site, key: str, *, weight: bool) -> Delta:
        shape = site.shape if weight else (site.n_out,)
        if not weight and not site.has_bias:
            raise SourceError(f"{self.file.path}: {key} is a bias, but {site.path} of {self.model.name} has none")
        have = self.file.shape(key)
        grown = weight and site.pieces[0][0] in ("embed", "head") and len(have) == 2 and have[1:] == shape[1:]
        if have != shape and not grown:
            raise ShapeError(f"{self.file.path}: {key} has shape {list(have)}, {site.path} of {self.model.name} is {list(shape)}")
        values = self.file.take(key)
        if weight and site.offset:
            values = values + values.dtype.type(site.offset)
        if grown and have != shape:
            self.notes.append(f"{site.path} is resized from {shape[0]} to {have[0]} tokens")
        return Replace(values, shape)

    def _tokens(self, site: Site, key: str) -> Delta:
        stated = self.config.get("token_indices" if self.kind is None else "trainable_token_indices")
        if isinstance(stated, dict):
            stated = next((v for k, v in stated.items() if site.path == k or site.path.endswith(f".{k}")), None)
            if stated is None and self.model.spec.tied:
                stated = next(iter(self.config.get("trainable_token_indices").values()), None)
        if not isinstance(stated, list) or not all(type(i) is int for i in stated):
            raise SourceError(f"{self.config.path}: no list of token numbers for {site.path}, whose trained tokens are in {self.file.path}")
        have = self.file.shape(key)
        if have != (len(stated), site.matrix[1]):
            raise ShapeError(
                f"{self.file.path}: {key} has shape {list(have)}, expected {[len(stated), site.matrix[1]]} for the listed tokens"
            )
        return SetRows(np.array(stated, dtype=np.intp), self.file.take(key), site.matrix)

    def _tie(self, deltas: dict[str, Delta]) -> None:
        """On a model whose head shares the embedding: which changes concern both."""
        if not self.model.spec.tied:
            return
        embed, head = deltas.get("embed.weight"), deltas.get("head.weight")
        if embed is not None and head is not None and _same(embed, head):
            deltas["head.weight"] = embed
        elif embed is not None and head is None:
            both = isinstance(embed, SetRows) or embed.out_shape != embed.shape or self.config.get("ensure_weight_tying")
            if both:
                deltas["head.weight"] = embed
            else:
                self.notes.append("the embedding is adapted, the head that shares it is not: the two are separated")
        elif head is not None:
            if self.config.get("ensure_weight_tying"):
                raise SourceError(f"{self.config.where('ensure_weight_tying')} is true, but {self.file.path} has the head alone")
            self.notes.append("the head is adapted, the embedding that it shares is not: the two are separated")

    def refuse_rest(self) -> None:
        """Raise for tensors and config keys that nobody has understood."""
        if self.file.left:
            left = list(self.file.left)
            more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
            raise UnsupportedError(
                f"{self.file.path}: {left[0]}{more} belongs to no module of {self.model.name} that {self.config.path} adapts, or to no "
                "part of such an adapter. Leaving it out would make another adapter."
            )
        training = ALWAYS | (frozenset({"token_indices", "init_weights"}) if self.kind is None else self.kind.training)
        unknown = [key for key in self.config.unused() if key not in training and self.config.values[key] not in (False, {}, [], "none")]
        if unknown:
            raise UnsupportedError(
                f"{self.config.where(unknown[0])} is {self.config.values[unknown[0]]!r:.60}: edgeq does not know this option of "
                f"{self.config.get('peft_type')}, so it cannot say what the adapter means. Merge it with PEFT first."
            )


def _body(file: Tensors) -> str:
    """Under which wrapper the adapter was trained."""
    for body in sorted(BODIES, key=len, reverse=True):
        if any(key.startswith(f"{_MODEL}{body}") for key in file):
            return body
    return "model."


def _same(one: Delta, other: Delta) -> bool:
    """Whether two deltas of the embedding's shape are the same change."""
    if isinstance(one, Replace) and isinstance(other, Replace):
        return np.array_equal(one.values, other.values)
    if isinstance(one, SetRows) and isinstance(other, SetRows):
        return np.array_equal(one.index, other.index) and np.array_equal(one.values, other.values)
    if isinstance(one, LoRA) and isinstance(other, LoRA):
        return one.scale == other.scale and np.array_equal(one.a, other.a) and np.array_equal(one.b, other.b)
    if isinstance(one, Then) and isinstance(other, Then):
        return _same(one.first, other.first) and _same(one.second, other.second)
    return False


def _nested(delta: Delta, rank: int, config: Section, name: str) -> Delta:
    if not isinstance(delta, LoRA):
        raise UnsupportedError(f"a rank was asked for, but the adapter's change of {name} is no LoRA, so it has no first {rank} directions")
    alpha = config.number("lora_alpha")
    scale = alpha / rank**0.5 if config.boolean("use_rslora", default=False) else alpha / rank
    return truncate(delta, rank, scale=scale)
