"""Headers of safetensors files, checked before a byte of data is touched.

Layout: 8 bytes, little-endian, the header's length n; n bytes of UTF-8 JSON, an object that maps each tensor's name to
{"dtype": "BF16", "shape": [rows, columns], "data_offsets": [begin, end]}, besides an optional "__metadata__" of strings;
then the data, to which the offsets are relative. Tensors cover the data without gap or overlap.
https://huggingface.co/docs/safetensors (format section). Data is mapped, never loaded: see `edgeq.tensors.from_file`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from edgeq.converters.sources.stored import StoredTensor
from edgeq.errors import SourceError
from edgeq.grids import Grid
from edgeq.tensors import Bytes, LazyTensor, from_file

# The library that defines the format accepts no longer header.
MAX_HEADER_BYTES = 100_000_000

_BYTE = Grid("bytes", -1, 1, 1)  # data that is not looked at value by value

# Bits of a value. A name that is not here is kept, and refused where the tensor is used.
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16}
_BITS |= {"I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64}


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor that the file lists. Raises SourceError when header and file do not fit together."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header, start = _read_header(file, size, path)
    except FileNotFoundError:
        raise SourceError(f"{path} is missing. Download the model's folder again, with all its files.") from None
    except OSError as err:
        raise SourceError(f"{path}: cannot be read ({err.strerror}).") from err
    entries = [_Entry(path, name, value) for name, value in header.items() if name != "__metadata__"]
    _check_cover(entries, size - start, path)
    return {entry.name: entry.stored(start) for entry in entries}


def _read_header(file: BinaryIO, size: int, path: Path) -> tuple[dict[str, Any], int]:
    """The header object and the position where data starts."""
    if size < 8:
        _fail(path, f"is cut short: it has {size} bytes, a header alone has more")
    n = int.from_bytes(file.read(8), "little")
    if n > MAX_HEADER_BYTES:
        _fail(path, f"is not a safetensors file: its first 8 bytes promise a header of {n} bytes, the format allows {MAX_HEADER_BYTES}")
    if 8 + n > size:
        _fail(path, f"is cut short: it has {size} bytes, its header alone needs {8 + n}")
    try:
        header = json.loads(file.read(n).decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as err:
        _fail(path, f"has a header that is not valid JSON ({err})", err)
    if not isinstance(header, dict):
        _fail(path, "has a header that is not a JSON object")
    return header, 8 + n


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key occurs twice")
    return values


class _Entry:
    """One line of the header, with its types checked."""

    def __init__(self, path: Path, name: str, value: Any) -> None:
        self.path, self.name = path, name
        fields: Mapping[str, Any] = value if isinstance(value, dict) else {}
        dtype, shape, offsets = fields.get("dtype"), _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
        if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
            _fail(path, f"describes {name!r} in a way that makes no sense")
        self.dtype, self.shape = dtype, shape
        self.begin, self.end = offsets
        stated, needed = self.end - self.begin, math.prod(shape) * _BITS.get(dtype, 0) // 8
        if dtype in _BITS and stated != needed:
            _fail(path, f"gives {name!r} {stated} bytes, but shape {list(shape)} in {dtype} needs {needed}")

    def stored(self, data_start: int) -> StoredTensor:
        path, name, shape, offset, n_bytes = self.path, self.name, self.shape, data_start + self.begin, self.end - self.begin

        def load(grid: Grid) -> LazyTensor:
            return from_file(path, offset=offset, shape=shape, grid=grid, origin=f"{path}: {name}")

        def data() -> Bytes:
            return from_file(path, offset=offset, shape=(n_bytes,), grid=_BYTE, origin=f"{path}: {name}").packed()[0]

        return StoredTensor(file=path, name=name, dtype=self.dtype, shape=shape, load=load, data=data)


def _check_cover(entries: list[_Entry], data_size: int, path: Path) -> None:
    """Tensors follow each other without gap or overlap and end where the file ends."""
    position = 0
    for entry in sorted(entries, key=lambda e: (e.begin, e.end)):
        if entry.begin != position:
            what = "overlaps the tensor before it" if entry.begin < position else "leaves a gap before it"
            _fail(path, f"places {entry.name!r} at byte {entry.begin} of its data, which {what} (expected {position})")
        position = entry.end
    if position > data_size:
        _fail(path, f"is cut short: its tensors need {position} bytes of data, it has {data_size}")
    if position < data_size:
        _fail(path, f"has {data_size - position} bytes after its last tensor that belong to none")


def _sizes(value: Any) -> tuple[int, ...] | None:
    """A list of whole numbers from 0 up, or None if it is anything else."""
    return tuple(value) if isinstance(value, list) and all(type(v) is int and v >= 0 for v in value) else None


def _fail(path: Path, what: str, cause: Exception | None = None) -> NoReturn:
    raise SourceError(f"{path} {what}. Download the file again.") from cause
