"""Adapters beside a graph in ONNX Runtime: `.onnx_adapter` files, checked before use, on inputs that are nothing by default.

ONNX Runtime checks names and types of what it is given, and little else: not the base, not the version, not the rank, not the values. All
of that is looked at here first. Its own `LoraAdapter`s are not used, because runs with bound inputs ignore them in silence, and of two with
the same names the first one wins; matrices are bound like any other input (`edgeq.runtime.onnx_context`). Several adapters become one of
their ranks together: [A1 A2] [s1 B1; s2 B2].
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from edgeq.errors import AdapterError, RuntimeFailure, UsageError
from edgeq.onnx_adapter_file import StoredAdapter, check_content, plan_version, read_onnx_adapter
from edgeq.runtime.adapter_file import file_stamp
from edgeq.runtime.onnx_facts import OnnxFacts

if TYPE_CHECKING:
    from edgeq.runtime.onnx_model import OnnxModel

_HALF = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
_OWN_VERSIONS = 1 << 30  # those of edgeq are at least that
_FLOATS: Mapping[str, Literal["f32", "f16"]] = {"<f4": "f32", "<f2": "f16"}
_AGAIN = "Convert or download the adapter again."
_OWN_BASE = "Use the model that the adapter was made for."

Array = npt.NDArray[Any]
Pair = tuple[Array, Array]  # A (n_in, rank) and B (rank, n_out)


@dataclass(frozen=True, kw_only=True)
class OnnxAdapterFile:
    """A sound adapter on disk.

    ranks, shapes: of each module that it changes ("model.layers.0.self_attn.q_proj"), the rank of its pair and (n_out, n_in), of an
    embedding (n_embd, n_vocab). float_type: of its numbers. model_version: of the plan that it was laid out for. invocation: none, see
    `edgeq.runtime.adapter_file`. stamp: size and time of the file when it was read.
    """

    path: Path
    ranks: Mapping[str, int]
    shapes: Mapping[str, tuple[int, int]]
    float_type: Literal["f32", "f16"]
    model_version: int
    resident_bytes: int
    stamp: tuple[int, int]
    invocation: tuple[int, ...] = ()


def read_onnx_file(path: Path) -> OnnxAdapterFile:
    """Read and check all of an adapter that can be checked without its model. Raises AdapterError naming the file and the first fault."""
    stamp = file_stamp(path)
    stored = read_onnx_adapter(path)
    pairs = adapter_pairs(stored)
    types = sorted({values.dtype.str for values in stored.parameters.values()})
    if len(types) > 1:
        raise AdapterError(f"{path}: mixes numbers of {' and '.join(_FLOATS[name] for name in types)}; expected one of them. {_AGAIN}")
    return OnnxAdapterFile(
        path=path,
        ranks={module: a.shape[1] for module, (a, _) in pairs.items()},
        shapes={module: (b.shape[1], a.shape[0]) for module, (a, b) in pairs.items()},
        float_type=_FLOATS[types[0]],
        model_version=stored.model_version,
        resident_bytes=sum(values.nbytes for values in stored.parameters.values()),
        stamp=stamp,
    )


def check_onnx_base(adapter: OnnxAdapterFile, base: OnnxFacts) -> None:
    """Raise AdapterError naming the first thing in which an adapter does not fit a graph."""
    where = base.path.parent.name or str(base.path)
    if not base.places:
        raise AdapterError(
            f"{adapter.path}: {base.path} has no place for adapters. Export the model with the adapter kept (--adapters keep) or merged."
        )
    for module, (n_out, n_in) in adapter.shapes.items():
        place = base.places.get(module)
        if place is None:
            raise AdapterError(
                f"{adapter.path}: changes {module}, for which {where} has no place. {_OWN_BASE} Or export the model again with this "
                "adapter kept."
            )
        if (place.n_out, place.n_in) != (n_out, n_in):
            raise AdapterError(
                f"{adapter.path}: its {module} goes from {n_in} to {n_out} values, that of {where} from {place.n_in} to {place.n_out}. "
                f"{_OWN_BASE} For a cut model that is an adapter cut alike."
            )
        if place.rank not in (None, adapter.ranks[module]):
            raise AdapterError(
                f"{adapter.path}: its {module} has rank {adapter.ranks[module]}, {where} takes rank {place.rank} alone. {_OWN_BASE}"
            )
        if place.float_type != adapter.float_type:
            raise AdapterError(
                f"{adapter.path}: has numbers in {adapter.float_type}, {where} computes in {place.float_type}. Export the adapter together "
                "with this model."
            )
    if base.plan is not None and adapter.model_version != plan_version(base.plan):
        raise AdapterError(
            f"{adapter.path}: was laid out for other weights than those of {where}, or for another order or size of them (plan "
            f"{adapter.model_version}, here {plan_version(base.plan)}). {_OWN_BASE} For a cut model that is an adapter cut alike."
        )


class OnnxAdapter:
    """An adapter in memory, on no context yet: see `OnnxContext.set_adapters`. pairs: by module."""

    def __init__(self, model: OnnxModel, path: Path, pairs: Mapping[str, Pair]) -> None:
        self.model, self.path = model, path
        self._pairs: Mapping[str, Pair] | None = pairs
        self._left = weakref.finalize(self, model.adapter_closed)
        model.adapter_opened()

    @classmethod
    def load(cls, model: OnnxModel, path: Path) -> OnnxAdapter:
        """Raises AdapterError for a bad file or one that does not fit the model."""
        check_onnx_base(read_onnx_file(path), model.facts)
        return cls(model, path, adapter_pairs(read_onnx_adapter(path)))

    @property
    def pairs(self) -> Mapping[str, Pair]:
        if self._pairs is None:
            raise RuntimeFailure(f"{self.path}: the adapter was unloaded. Load it again.")
        return self._pairs

    @cached_property
    def values(self) -> Mapping[str, Any]:
        """What a graph's inputs are bound to, by name: on the CPU the same memory as `pairs`."""
        return ort_values(self.model, self.pairs)

    def close(self) -> None:
        """Free the adapter. Raises RuntimeFailure while a context uses it. Closing twice is fine."""
        if any(self in context.adapters for context in self.model.contexts):
            raise RuntimeFailure(f"{self.path}: the adapter is in use. Set another one first.")
        self._pairs = None
        self.__dict__.pop("values", None)
        self._left()


def combined(scales: Mapping[OnnxAdapter, float]) -> Mapping[str, Any]:
    """What a graph's inputs are bound to for these adapters together. Raises UsageError for a scale that is no finite number."""
    for adapter, scale in scales.items():
        if not math.isfinite(scale):
            raise UsageError(f"{adapter.path}: the adapter's scale is {scale}; expected a finite number")
    if not scales:
        return {}
    first = next(iter(scales))
    if list(scales.values()) == [1.0]:
        return first.values
    modules = dict.fromkeys(module for adapter in scales for module in adapter.pairs)
    together = {
        module: _together([(adapter.pairs[module], s) for adapter, s in scales.items() if module in adapter.pairs]) for module in modules
    }
    return ort_values(first.model, together)


def nothing(model: OnnxModel, names: Mapping[str, Any]) -> dict[str, Any]:
    """Pairs of rank 0 for inputs that were bound to others."""
    dtype, empty = {"f32": np.float32, "f16": np.float16}, {}
    for module, place in model.facts.places.items():
        if place.a in names:
            kind = dtype[place.float_type]
            empty[module] = np.empty((place.n_in, 0), dtype=kind), np.empty((0, place.n_out), dtype=kind)
    return ort_values(model, empty)


def ort_values(model: OnnxModel, pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """By input name, on the model's device."""
    from edgeq.runtime.onnx_model import library

    make, device = library().OrtValue.ortvalue_from_numpy, ("cpu", 0) if model.gpu is None else ("cuda", model.gpu)
    names = {module: (place.a, place.b) for module, place in model.facts.places.items()}
    return {name: make(values, *device) for module, pair in pairs.items() for name, values in zip(names[module], pair, strict=True)}


def _together(parts: list[tuple[Pair, float]]) -> Pair:
    dtype = parts[0][0][0].dtype
    a = np.concatenate([a for (a, _), _ in parts], axis=1)
    b = np.concatenate([(b.astype(np.float32) * np.float32(scale)).astype(dtype) for (_, b), scale in parts])
    return np.ascontiguousarray(a), np.ascontiguousarray(b)


def adapter_pairs(stored: StoredAdapter) -> dict[str, Pair]:
    """By module. Raises AdapterError for what does not make pairs of matrices with finite numbers."""
    path = stored.path
    halves: dict[str, dict[str, Array]] = {}
    if stored.adapter_version >= _OWN_VERSIONS:
        check_content(stored)
    for name, values in stored.parameters.items():
        match = _HALF.fullmatch(name)
        if match is None:
            raise AdapterError(f"{path}: {name} is neither lora_A nor lora_B of a module. {_AGAIN}")
        if values.ndim != 2:
            raise AdapterError(f"{path}: {name} has shape {list(values.shape)}, expected a matrix. {_AGAIN}")
        if not np.isfinite(values).all():
            raise AdapterError(f"{path}: {name} has values that are not finite. The adapter is damaged; get a sound one.")
        halves.setdefault(match["module"], {})[match["half"]] = values
    if not halves:
        raise AdapterError(f"{path}: the adapter has no matrices. {_AGAIN}")
    pairs = {}
    for module, found in halves.items():
        for half in "AB":
            if half not in found:
                raise AdapterError(f"{path}: {module}.lora_{half}.weight is missing. {_AGAIN}")
        a, b = found["A"], found["B"]
        if a.shape[1] != b.shape[0]:
            ranks = f"of rank {a.shape[1]} and {b.shape[0]}"
            raise AdapterError(f"{path}: lora_A and lora_B of {module} are {list(a.shape)} and {list(b.shape)}, {ranks}. {_AGAIN}")
        pairs[module] = a, b
    return pairs
