"""Adapters in codes of few bits (`edgeq.codec`), in a safetensors file.

Tensors have the keys that PEFT gives them, and are bytes: packed codes. What they mean stands in the file's metadata under "edgeq.codec":

    {"version": 1, "tensors": [[bits, [rows, columns], mean, deviation], ...]}     in the order of sorted keys
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.codec import Coded, decode
from edgeq.converters.sources.safetensors_file import read_safetensors
from edgeq.deltas.delta import AnyFloats, Indices
from edgeq.errors import MissingDependency, PlanError, SourceError, UnsupportedError
from edgeq.tensors import Floats

CODED = "adapter_model.coded.safetensors"
KEY, VERSION = "edgeq.codec", 1


def save_tensors(path: Path, tensors: Mapping[str, npt.NDArray[Any]], *, key: str = "format", value: str = "pt") -> None:
    """A safetensors file with one entry of metadata: with several, their order would differ from run to run."""
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise MissingDependency("safetensors", "export") from None
    save_file(dict(tensors), path, metadata={key: value})


def save_coded(path: Path, tensors: Mapping[str, Coded]) -> None:
    rows = [[t.bits, list(t.shape), _short(t.mean), _short(t.deviation)] for _, t in sorted(tensors.items())]
    document = json.dumps({"version": VERSION, "tensors": rows}, separators=(",", ":"))
    save_tensors(path, {name: t.codes for name, t in tensors.items()}, key=KEY, value=document)


def load_coded(path: Path) -> dict[str, Coded]:
    """Raises SourceError for a file that is missing, damaged, or not what `save_coded` writes; UnsupportedError for another version."""
    stored = read_safetensors(path)
    rows = _rows(path)
    if len(rows) != len(stored):
        raise SourceError(f"{path}: its metadata describes {len(rows)} tensors, it holds {len(stored)}. Get the file again.")
    return {name: _coded(path, name, row, stored[name].array()) for name, row in zip(sorted(stored), rows, strict=True)}


def read_coded(path: Path) -> dict[str, Floats]:
    """The tensors decoded. Raises as `load_coded`."""
    return {name: decode(coded) for name, coded in load_coded(path).items()}


class CodedTensors:
    """A file of codes with the face of `edgeq.converters.adapters.tensors.AdapterTensors`, so that a reader of adapters can take either."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._coded = load_coded(path)
        self.left = dict.fromkeys(self._coded)

    def __contains__(self, name: str) -> bool:
        return name in self._coded

    def __iter__(self) -> Iterator[str]:
        return iter(self._coded)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._coded[name].shape

    def take(self, name: str) -> AnyFloats:
        self.left.pop(name, None)
        return decode(self._coded[name])

    def take_indices(self, name: str) -> Indices:
        raise SourceError(f"{self.path}: {name} should hold whole numbers, which are never coded. Get the adapter again.")


def _short(value: float) -> float:
    """A float32 number in as few digits as tell it from others."""
    return float(str(np.float32(value)))


def _rows(path: Path) -> list[Any]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        text = (file.metadata() or {}).get(KEY)
    if text is None:
        raise SourceError(f"{path}: has no {KEY} in its metadata, so nobody can say what its bytes mean. Get the file again.")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise SourceError(f"{path}: its {KEY} is not valid JSON ({err}). Get the file again.") from err
    if not isinstance(document, dict) or document.get("version") != VERSION or not isinstance(document.get("tensors"), list):
        version = document.get("version") if isinstance(document, dict) else None
        raise UnsupportedError(f"{path}: version {version!r} of {KEY}, expected {VERSION}. Use the edgeq that wrote the file.")
    rows: list[Any] = document["tensors"]
    return rows


def _coded(path: Path, name: str, row: Any, codes: npt.NDArray[Any]) -> Coded:
    try:
        bits, shape, mean, deviation = row
        sizes = tuple(shape)
        if not all(type(n) is int and n > 0 for n in sizes) or math.prod(sizes) > 1 << 40 or codes.dtype != np.uint8:
            raise ValueError(f"{codes.dtype} of shape {shape}")
        return Coded(codes=np.array(codes), bits=bits, shape=sizes, mean=float(np.float32(mean)), deviation=float(np.float32(deviation)))
    except (TypeError, ValueError, PlanError, SourceError) as err:
        raise SourceError(f"{path}: {name} is no coded tensor ({err}). Get the file again.") from err
