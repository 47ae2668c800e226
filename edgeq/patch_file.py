"""Sparse patches: changes to single values of a GGUF model's F16 and F32 tensors, made for a device to apply in place and undo.

A patch is what a sparse adapter such as SHiRA (Bhardwaj et al. 2024, arXiv:2406.13175) is on the device. The file is a .npz, uncompressed:

    facts     uint8, JSON: {"version": 1, "tensors": [{"name", "shape", "grid", "count", "base_sha256"}, ...]}
    indices   int32, of all tensors end to end: places in the flat tensor, ascending within each
    values    float32, what is added there

base_sha256 is the hash of the base's own values at those places, in the tensor's number format. It is cheap to check on every use,
finds another base and a base that is already changed there, and says nothing about the places that a patch does not touch.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import AdapterError
from edgeq.gguf_file import Header
from edgeq.grids import Grid, grid
from edgeq.output import staged_file

VERSION = 1
DTYPES: Mapping[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Sparse = tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.floating[Any]]]


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorPatch:
    """What is added to one tensor: values float32 (n,) at flat indices int32 (n,), ascending."""

    name: str
    shape: tuple[int, ...]
    grid: Grid
    base_sha256: str
    indices: Ints
    values: Floats


@dataclass(frozen=True, kw_only=True)
class Patch:
    path: Path
    tensors: tuple[TensorPatch, ...]

    @property
    def n_values(self) -> int:
        return sum(len(tensor.indices) for tensor in self.tensors)


def base_hash(values: npt.NDArray[np.floating[Any]]) -> str:
    """Hash of a base's values at the places of a patch, in the number format they are stored in."""
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


def write_patch(path: Path, deltas: Mapping[str, Sparse], base: Header, *, force: bool = False) -> Path:
    """Write the patch that adds deltas, tensor name to (flat indices, values), to the tensors of a GGUF file; returns its path.

    Raises AdapterError for a tensor that is not there or not F16 or F32, for places that repeat or lie outside, and for values that
    are not finite; OutputError when the file exists already, unless `force`.
    """
    tensors = [_prepared(path, name, sparse, base) for name, sparse in sorted(deltas.items()) if len(sparse[0])]
    if not tensors:
        raise AdapterError(f"{path}: the patch would change nothing")
    rows = [
        {"name": t.name, "shape": list(t.shape), "grid": t.grid.name, "count": len(t.indices), "base_sha256": t.base_sha256}
        for t in tensors
    ]
    facts = json.dumps({"version": VERSION, "tensors": rows}).encode()
    with staged_file(path, force=force, inputs=(base.path,)) as stage, stage.open("wb") as file:
        np.savez(
            file,
            facts=np.frombuffer(facts, dtype=np.uint8),
            indices=np.concatenate([t.indices for t in tensors]),
            values=np.concatenate([t.values for t in tensors]),
        )
    return path


def _prepared(path: Path, name: str, sparse: Sparse, base: Header) -> TensorPatch:
    info = base.tensors.get(name)
    if info is None:
        raise AdapterError(f"{path}: {base.path.name} has no tensor {name} to patch")
    check_patchable(path, name, info.grid)
    order = np.argsort(sparse[0], kind="stable")
    indices, values = np.asarray(sparse[0])[order], np.asarray(sparse[1], dtype=np.float32)[order]
    size = math.prod(info.shape)
    if indices[0] < 0 or indices[-1] >= size or size > 2**31:
        raise AdapterError(f"{path}: places {indices[0]} to {indices[-1]} of {name} were given, it has {size} values")
    _check_places(path, name, indices, values)
    stored = np.memmap(base.path, dtype=DTYPES[info.grid.name], mode="r", offset=info.offset, shape=(size,))
    return TensorPatch(
        name=name,
        shape=info.shape,
        grid=info.grid,
        base_sha256=base_hash(stored[indices]),
        indices=indices.astype(np.int32),
        values=values,
    )


def check_patchable(path: Path, name: str, number_format: Grid) -> None:
    """Raise AdapterError unless single values of a tensor can be changed."""
    if number_format.name not in DTYPES:
        why = f", whose values come in blocks of {number_format.block_size} with a common scale" if number_format.block_size > 1 else ""
        raise AdapterError(
            f"{path}: {name} is {number_format.name}{why}; only F16 and F32 tensors can be patched in place. Merge the adapter at export, "
            "or export the model as F16."
        )


def _check_places(path: Path, name: str, indices: npt.NDArray[np.integer[Any]], values: Floats) -> None:
    if (np.diff(indices) <= 0).any():
        raise AdapterError(f"{path}: places in {name} repeat or are not in order. The patch is damaged; make it again.")
    if not np.isfinite(values).all():
        raise AdapterError(f"{path}: values for {name} are not finite. The patch is damaged; make it again.")


def read_patch(path: Path) -> Patch:
    """Read a patch. Raises AdapterError for a file that is missing, damaged or of another version."""
    try:
        with np.load(path, allow_pickle=False) as file:
            facts = json.loads(file["facts"].tobytes())
            if facts["version"] != VERSION:
                raise AdapterError(f"{path}: patch version {facts['version']}, this edgeq reads version {VERSION}. Make the patch again.")
            indices, values = file["indices"], file["values"]
        tensors = _split(facts["tensors"], indices, values)
    except FileNotFoundError as err:
        raise AdapterError(f"{path} does not exist. Give a patch that edgeq wrote.") from err
    except (OSError, EOFError, LookupError, TypeError, ValueError, AttributeError, zipfile.BadZipFile) as err:
        raise AdapterError(f"{path} is no readable patch ({err}). Copy it again, or make it again.") from err
    for tensor in tensors:
        check_patchable(path, tensor.name, tensor.grid)
        if not len(tensor.indices) or tensor.indices[0] < 0 or tensor.indices[-1] >= math.prod(tensor.shape):
            raise AdapterError(f"{path}: places in {tensor.name} lie outside its shape {list(tensor.shape)}. The patch is damaged.")
        _check_places(path, tensor.name, tensor.indices, tensor.values)
    return Patch(path=path, tensors=tensors)


def _split(rows: list[dict[str, Any]], indices: npt.NDArray[Any], values: npt.NDArray[Any]) -> tuple[TensorPatch, ...]:
    counts = [row["count"] for row in rows]
    total = sum(counts)
    typed = indices.dtype == np.int32 and values.dtype == np.float32
    if not typed or indices.shape != (total,) or values.shape != (total,) or min(counts) < 0:
        raise ValueError(f"{indices.dtype} {indices.shape} and {values.dtype} {values.shape} for {total} places")
    if len({row["name"] for row in rows}) < len(rows):
        raise ValueError("a tensor occurs twice")
    ends = np.cumsum(counts)
    return tuple(
        TensorPatch(
            name=row["name"],
            shape=tuple(row["shape"]),
            grid=grid(row["grid"]),
            base_sha256=row["base_sha256"],
            indices=indices[end - count : end],
            values=values[end - count : end],
        )
        for row, count, end in zip(rows, counts, ends, strict=True)
    )
