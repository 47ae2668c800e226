"""The side files of an elastic package: how far it may be cut, and what makes up for what goes.

    elastic.json  {"version": 1, "ladder": {...}, "sort": "edgeq" | "uniql" | "none", "compensation": {...facts about it...}}
    elastic.npz   order.<i>   int32: of block i of the model, where each part was before sorting
                  mean, noise float32 (sum of n_ff,), and factors float16 (sum of n_ff, rank): all MLPs in the order of layers
                  head.<name> what sorting says about heads, if they can be cut

Factors are stored in units of their channel's noise (U / sqrt(noise)): activations of some models span more than half precision does.
The arrays of a .npz file are found by name and mapped, so a device reads no orders, and layers are read and widened one at a time.

The standard library and numpy are enough.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from edgeq.compensation import HiddenModel
from edgeq.elastic import Ladder
from edgeq.errors import PackageError
from edgeq.package import Package, check_record

LADDER_FILE, ARRAYS_FILE = "elastic.json", "elastic.npz"
VERSION = 1

SortMode = Literal["edgeq", "uniql", "none"]
Array = npt.NDArray[Any]
_REMEDY = "The package is damaged; copy it again, or export it again."


@dataclass(frozen=True, kw_only=True)
class Elastic:
    """What sorting left beside the artifact.

    hidden: by layer, in sorted order; empty when nothing is compensated. orders: by block of the model, where its parts were before.
    compensation: facts for people. head: arrays about heads, by name.
    """

    ladder: Ladder
    hidden: Mapping[int, HiddenModel] = field(default_factory=dict)
    orders: Sequence[npt.NDArray[np.integer[Any]]] = ()
    sort: SortMode = "none"
    compensation: Mapping[str, Any] = field(default_factory=dict)
    head: Mapping[str, Array] = field(default_factory=dict)


def write_elastic(
    folder: Path,
    *,
    ladder: Ladder,
    hidden: Mapping[int, HiddenModel],
    orders: Sequence[npt.NDArray[np.integer[Any]]],
    sort: SortMode,
    compensation: Mapping[str, Any] | None = None,
    head: Mapping[str, Array] | None = None,
) -> list[Path]:
    """Write both files into a folder and return their paths. hidden: for every layer with an MLP, or empty.

    The bytes depend on the content alone.
    """
    layers = [layer for layer, n_ff in enumerate(ladder.n_ff) if n_ff]
    assert not hidden or sorted(hidden) == layers, "hidden models are of all MLPs or of none"
    assert all(len(hidden[layer].mean) == ladder.n_ff[layer] for layer in hidden), "hidden models have the widths of the ladder"
    facts = {"rank": max(model.factors.shape[1] for model in hidden.values())} if hidden else {}
    document = {"version": VERSION, "ladder": ladder.to_json(), "sort": sort, "compensation": {**facts, **(compensation or {})}}
    arrays: dict[str, Array] = {f"order.{i}": np.asarray(order, dtype=np.int32) for i, order in enumerate(orders)}
    if hidden:
        models = [hidden[layer] for layer in layers]
        arrays["mean"] = np.concatenate([model.mean for model in models]).astype(np.float32)
        arrays["noise"] = np.concatenate([model.noise for model in models]).astype(np.float32)
        arrays["factors"] = np.concatenate([_packed(model, facts["rank"]) for model in models])
    arrays |= {f"head.{name}": array for name, array in (head or {}).items()}
    paths = [folder / LADDER_FILE, folder / ARRAYS_FILE]
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    paths[0].write_text(text + "\n", encoding="utf-8")
    _write_arrays(paths[1], arrays)
    return paths


def check_is_elastic(package: Package) -> None:
    """Raises PackageError for a package of one size."""
    if not package.manifest["export"].get("elastic"):
        raise PackageError(
            f"{package.folder} is not elastic: it has one size. Export the model again with --elastic to cut it, or use it as it is."
        )


def read_elastic(package: Package) -> Elastic:
    """The side files of a package, checked against the hashes in its manifest.

    Raises PackageError when the package is not elastic, or when a file is missing, damaged or not what `write_elastic` writes.
    """
    check_is_elastic(package)
    for name in (LADDER_FILE, ARRAYS_FILE):
        record = next((record for record in package.side_files if record.path == name), None)
        if record is None:
            raise PackageError(f"{package.folder}: the manifest does not list {name}. {_REMEDY}")
        check_record(package, record)
    return _read(package.folder)


def _read(folder: Path) -> Elastic:
    path = folder / LADDER_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as err:
        raise PackageError(f"{path} is not valid JSON ({err}). {_REMEDY}") from err
    if not isinstance(document, dict) or document.get("version") != VERSION:
        version = document.get("version") if isinstance(document, dict) else None
        raise PackageError(f"{path}: version {version!r}, expected {VERSION}. Use the edgeq that wrote the package.")
    ladder, facts = document.get("ladder"), document.get("compensation")
    sort: Any = document.get("sort")
    if not isinstance(ladder, dict) or sort not in get_args(SortMode) or not isinstance(facts, dict):
        raise PackageError(f"{path}: lacks or misspells ladder, sort or compensation. {_REMEDY}")
    arrays = _Arrays(folder / ARRAYS_FILE)
    steps = Ladder.from_json(ladder)
    return Elastic(
        ladder=steps,
        hidden=_Models(steps, arrays) if "factors" in arrays.names else {},
        orders=_Orders(arrays),
        sort=sort,
        compensation=facts,
        head={name.removeprefix("head."): arrays.read(name) for name in arrays.names if name.startswith("head.")},
    )


def _packed(model: HiddenModel, rank: int) -> npt.NDArray[np.float16]:
    """Factors in units of noise, with columns of zeros up to the rank."""
    unit = np.sqrt(model.noise, dtype=np.float32)[:, None]
    packed = np.zeros((len(model.mean), rank), dtype=np.float16)
    with np.errstate(over="ignore"):
        packed[:, : model.factors.shape[1]] = np.divide(model.factors, unit, out=np.zeros_like(model.factors), where=unit > 0)
    if not np.isfinite(packed).all():
        raise PackageError("a model of hidden activations has factors beyond 65504 times its noise. Calibrate with another text.")
    return packed


class _Models(Mapping[int, HiddenModel]):
    """Hidden models by layer, read when they are asked for: memory holds one layer."""

    def __init__(self, ladder: Ladder, arrays: _Arrays) -> None:
        stops = list(accumulate(ladder.n_ff, initial=0))
        self._path = arrays.path
        self._rows = {layer: slice(stops[layer], stops[layer + 1]) for layer, n_ff in enumerate(ladder.n_ff) if n_ff}
        self._mean, self._noise = (arrays.mapped(name, np.dtype("<f4"), (stops[-1],)) for name in ("mean", "noise"))
        self._factors = arrays.mapped("factors", np.dtype("<f2"), (stops[-1], None))

    def __getitem__(self, layer: int) -> HiddenModel:
        rows = self._rows[layer]
        mean, noise, factors = np.array(self._mean[rows]), np.array(self._noise[rows]), self._factors[rows]
        # A sum is finite if all its terms are; no code of a half has all bits of its exponent set unless it is infinite or no number.
        bits = factors.view(np.uint16)
        if not np.isfinite(mean.sum() + noise.sum()) or noise.min(initial=0) < 0 or ((bits & 0x7C00) == 0x7C00).any():
            raise PackageError(f"{self._path}: some values are not finite, or a noise is negative (layer {layer}). {_REMEDY}")
        widened = _widened(bits)
        widened *= np.sqrt(noise)[:, None]
        return HiddenModel(mean=mean, factors=widened, noise=noise)

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def _widened(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Finite half precision numbers, as bits, in float32: exact, and several times as fast as astype."""
    wide = bits.astype(np.uint32)
    signs = (wide & 0x8000) << 16
    wide &= 0x7FFF
    wide <<= 13
    values = wide.view(np.float32)
    values *= np.float32(2.0**112)  # the exponents' biases differ by that; numbers below the normal ones come out right as well
    wide |= signs
    return values


class _Orders(Sequence[npt.NDArray[np.integer[Any]]]):
    """Orders by block, read when they are asked for."""

    def __init__(self, arrays: _Arrays) -> None:
        self._arrays, self._n = arrays, sum(name.startswith("order.") for name in arrays.names)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(self._n))]
        if not -self._n <= i < self._n:
            raise IndexError(i)
        return self._arrays.read(f"order.{i % self._n}", np.dtype("<i4"), (None,))

    def __len__(self) -> int:
        return self._n


class _Arrays:
    """A .npz file. names: of its arrays."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self.names = frozenset(name.removesuffix(".npy") for name in archive.namelist())
        except (OSError, zipfile.BadZipFile) as err:
            raise self._damaged(err) from err

    def read(self, name: str, dtype: np.dtype[Any] | None = None, shape: tuple[int | None, ...] | None = None) -> Array:
        """An array, of this type and shape if they are given (None: any length). Raises PackageError."""
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as file:
                array: Array = np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as err:
            raise self._damaged(err) from err
        return self._fitting(name, array, dtype, shape)

    def mapped(self, name: str, dtype: np.dtype[Any], shape: tuple[int | None, ...]) -> Array:
        """As `read`, but of the file's pages only those are read that are used."""
        try:
            with zipfile.ZipFile(self.path) as archive, self.path.open("rb") as file:
                entry = archive.getinfo(f"{name}.npy")
                with archive.open(entry):  # compares the entry's own header with the directory's, and goes behind it
                    pass
                file.seek(entry.header_offset + 26)
                file.seek(sum(struct.unpack("<HH", file.read(4))), 1)
                version = np.lib.format.read_magic(file)
                if version != (1, 0) or entry.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"array {name} is not stored as edgeq stores it")
                stored_shape, fortran, stored = np.lib.format.read_array_header_1_0(file)
                if fortran or file.tell() + prod(stored_shape) * stored.itemsize > self.path.stat().st_size:
                    raise ValueError(f"array {name} is cut short")
                array: Array = np.memmap(self.path, dtype=stored, mode="r", offset=file.tell(), shape=stored_shape)
        except (OSError, EOFError, KeyError, ValueError, struct.error, zipfile.BadZipFile) as err:
            raise self._damaged(err) from err
        return self._fitting(name, array, dtype, shape)

    def _fitting(self, name: str, array: Array, dtype: np.dtype[Any] | None, shape: tuple[int | None, ...] | None) -> Array:
        fits = shape is None or (len(array.shape) == len(shape) and all(w in (None, n) for n, w in zip(array.shape, shape, strict=True)))
        if not fits or (dtype is not None and array.dtype != dtype):
            raise PackageError(f"{self.path}: array {name} is {array.dtype} {list(array.shape)}, which does not fit the ladder. {_REMEDY}")
        return array

    def _damaged(self, err: Exception) -> PackageError:
        return PackageError(f"{self.path} cannot be read ({err}). {_REMEDY}")


def _write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """As numpy.savez does, but for the time of writing, which it records."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # the same bytes on every system
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
