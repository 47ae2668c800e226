"""GGUF files: what is in them, and reading a header without touching the weights. Writing is in `edgeq.gguf_write`.

    "GGUF" | version u32 | n_tensors u64 | n_fields u64
    fields                       see edgeq.gguf_fields
    tensors: name (string) | n_dims u32 | dims u64[n_dims], fastest first | ggml type u32 | offset u64, from the start of the data
    zeros up to the alignment    `general.alignment`, 32 unless given
    data                         tensors in the order listed, each padded with zeros to the alignment, without other gaps

Shapes here are the other way round: (n_out, n_in), fastest last. Everything is little-endian; version 2 and 3 differ in nothing that
we read. Own code instead of gguf-py's reader, which spends seconds on a large vocabulary because it makes an array per string:
walking lengths takes milliseconds. Rules are those of gguf.cpp in llama.cpp, so what passes here is not refused there.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from edgeq.errors import SourceError, UnsupportedError
from edgeq.gguf_fields import SCALAR_BYTES, Field, ValueType
from edgeq.grids import Grid, grid_by_id

ALIGNMENT = 32
MAX_NAME_BYTES = 63  # GGML_MAX_NAME less the closing zero
MAX_DIMS = 4
MAGIC = b"GGUF"
HEAD = struct.Struct("<4sIQQ")
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_MIN_FIELD_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8
# Sizes that no real header reaches; what is damaged must not make us allocate gigabytes.
_MAX_KEY_BYTES = 1 << 16
_MAX_FIELD_BYTES = 1 << 28
_MANY_STRINGS, _USUAL_STRING_BYTES = 1024, 40
_PART_NAME = re.compile(r"(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class TensorLayout:
    """Name, shape ((n,), (n_out, n_in), ...; fastest last) and grid of a tensor in a file."""

    name: str
    shape: tuple[int, ...]
    grid: Grid

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.grid.row_bytes(self.shape[-1])


@dataclass(frozen=True)
class TensorInfo(TensorLayout):
    """A tensor found in a file; offset is in bytes from the start of the file."""

    offset: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """All that a GGUF file says before its data. data_offset: where the data begins; file_bytes: size of the whole file."""

    path: Path
    version: int
    alignment: int
    fields: Mapping[str, Field]
    tensors: Mapping[str, TensorInfo]
    data_offset: int
    file_bytes: int

    def value(self, key: str, default: Any = None) -> Any:
        """Value of a metadata field. Raises SourceError for a string that is not UTF-8."""
        field = self.fields.get(key)
        try:
            return default if field is None else field.value
        except SourceError as err:
            raise SourceError(f"{self.path}: {err}") from err


def read_header(path: Path) -> Header:
    """Read the header of one GGUF file and check it against the file's size; no tensor data is touched.

    Raises SourceError that names the file and the fault: not GGUF, big-endian, unknown version or types, duplicate names, sizes
    beyond the end of the file, tensors out of place.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < HEAD.size:
                raise SourceError(
                    f"{path}: {size} bytes are too few for a GGUF file. The file is truncated or something else; fetch it again."
                )
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data, size).header()
    except OSError as err:
        raise SourceError(f"{path}: cannot be read: {err.strerror or err}") from err


def read_parts(path: Path) -> tuple[Header, ...]:
    """Headers of a model's files in order: one, or all parts of a split model (`...-00001-of-00003.gguf`), any of which may be named.

    Metadata is in the first. Raises SourceError when a part is missing or does not belong.
    """
    named = read_header(path)
    count = named.value("split.count", 0)
    if not isinstance(count, int) or count < 2:
        return (named,)
    remedy = "Put all parts side by side under the names they were published with, or join them with llama-gguf-split --merge."
    match = _PART_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise SourceError(f"{path}: this is one of {count} parts, but its name does not end in -00001-of-{count:05d}.gguf. {remedy}")
    headers = []
    for number in range(count):
        part = path.with_name(f"{match['stem']}-{number + 1:05d}-of-{count:05d}.gguf")
        if not part.is_file():
            raise SourceError(f"{part}: part {number + 1} of {count} is missing. {remedy}")
        header = read_header(part)
        if header.value("split.no") != number or header.value("split.count") != count:
            raise SourceError(
                f"{part}: says it is part {header.value('split.no')} of {header.value('split.count')}, counted from 0. {remedy}"
            )
        headers.append(header)
    names = [name for header in headers for name in header.tensors]
    total = headers[0].value("split.tensors.count", len(names))
    if len(names) != total or len(set(names)) != total:
        raise SourceError(f"{path}: the parts hold {len(names)} tensors, expected {total} with distinct names. {remedy}")
    return tuple(headers)


def _end_of_short_strings(data: mmap.mmap, start: int, count: int) -> int | None:
    """Where `count` strings end, if all have 1 to 255 bytes and none of them zero; else None. Thirty times as fast as a walk.

    Of such strings, the bytes that are followed by seven zeros are the lengths, and each length leads to the next.
    """
    window = np.frombuffer(data, dtype=np.uint8, count=min(len(data) - start, count * _USUAL_STRING_BYTES), offset=start)
    zeros = window == 0
    followed = zeros[1:-6].copy()
    for i in range(2, 8):
        followed &= zeros[i : len(zeros) - 7 + i]
    at = np.flatnonzero(followed)[:count]
    lengths = window[at].astype(np.int64)
    ends = at + 8 + lengths
    if len(at) < count or at[0] != 0 or not lengths.all() or (ends[:-1] != at[1:]).any() or ends[-1] > len(window):
        return None
    return start + int(ends[-1])


class _Reader:
    """A position in a mapped file; every step checks that what it is about to read is there."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.position = path, data, size, 0

    def fail(self, message: str) -> NoReturn:
        raise SourceError(f"{self.path}: {message}")

    def need(self, n_bytes: int, what: str) -> int:
        """Claim n_bytes; returns where they start."""
        start = self.position
        if n_bytes > self.size - start:
            left = self.size - start
            self.fail(f"{what} at byte {start} needs {n_bytes} bytes, {left} are left. The file is truncated or damaged; fetch it again.")
        self.position = start + n_bytes
        return start

    def u32(self, what: str) -> int:
        return _U32.unpack_from(self.data, self.need(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64.unpack_from(self.data, self.need(8, what))[0]

    def name(self, what: str) -> str:
        length = self.u64(what)
        if length > _MAX_KEY_BYTES:
            self.fail(f"{what} claims {length} bytes. The file is damaged; fetch it again.")
        start = self.need(length, what)
        raw = self.data[start : start + length]
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8: {raw[:40]!r}. The file is damaged; fetch it again.")

    def header(self) -> Header:
        magic, version, n_tensors, n_fields = HEAD.unpack_from(self.data, self.need(HEAD.size, "the file head"))
        if magic != MAGIC:
            self.fail(f"starts with {magic!r}, not {MAGIC!r}: this is not a GGUF file")
        if version & 0xFFFF == 0:
            self.fail("is a big-endian GGUF file; edgeq reads little-endian ones. Convert the model again on a little-endian machine.")
        if version not in (2, 3):
            self.fail(f"is GGUF version {version}; versions 2 and 3 are supported. Convert the model again with a current llama.cpp.")
        left = self.size - self.position
        if n_fields * _MIN_FIELD_BYTES + n_tensors * _MIN_TENSOR_BYTES > left:
            self.fail(
                f"claims {n_fields} fields and {n_tensors} tensors, which {left} bytes cannot hold. The file is damaged; fetch it again."
            )
        fields: dict[str, Field] = {}
        for i in range(n_fields):
            field = self.field(i)
            if field.key in fields:
                self.fail(f"field {field.key!r} occurs twice")
            fields[field.key] = field
        alignment = self.alignment(fields.get("general.alignment"))
        found = [self.tensor(i) for i in range(n_tensors)]
        data_offset = padded(self.position, alignment) if found else self.position
        return Header(
            path=self.path,
            version=version,
            alignment=alignment,
            fields=fields,
            tensors=self.placed(found, data_offset, alignment),
            data_offset=data_offset,
            file_bytes=self.size,
        )

    def value_type(self, what: str) -> ValueType:
        number = self.u32(what)
        try:
            return ValueType(number)
        except ValueError:
            self.fail(f"{what}: unknown value type {number}")

    def field(self, i: int) -> Field:
        key = self.name(f"key of field {i}")
        if not key:
            self.fail(f"field {i} has an empty key")
        what = f"field {key!r}"
        kind = self.value_type(what)
        start = self.position
        if kind is ValueType.ARRAY:
            item_type, count = self.value_type(what), self.u64(what)
            if item_type is ValueType.ARRAY:
                self.fail(f"{what} is an array of arrays, which GGUF readers do not accept")
            if item_type is ValueType.STRING:
                self.skip_strings(count, what)
            else:
                self.need(count * SCALAR_BYTES[item_type], what)
        elif kind is ValueType.STRING:
            self.skip_strings(1, what)
        else:
            self.need(SCALAR_BYTES[kind], what)
        if self.position - start > _MAX_FIELD_BYTES:
            self.fail(f"{what} claims {self.position - start} bytes. The file is damaged; fetch it again.")
        return Field(key, kind, self.data[start : self.position])

    def skip_strings(self, count: int, what: str) -> None:
        """Walk `count` strings by their lengths alone (98 thousand of them in SmolLM2's vocabulary)."""
        if count > (self.size - self.position) // 8:
            self.need(count * 8, what)
        if count >= _MANY_STRINGS and (end := _end_of_short_strings(self.data, self.position, count)):
            self.position = end
            return
        data, unpack, position, last = self.data, _U64.unpack_from, self.position, self.size - 8
        for _ in range(count):
            if position > last:
                break
            position += 8 + unpack(data, position)[0]
        else:
            self.need(position - self.position, what)
            return
        self.fail(f"{what} runs beyond the end of the file. The file is truncated or damaged; fetch it again.")

    def alignment(self, field: Field | None) -> int:
        if field is None:
            return ALIGNMENT
        value = field.value if field.type is ValueType.UINT32 else 0
        if value < 1 or value & (value - 1):
            self.fail(f"general.alignment is {field.value!r}; expected a power of two, as UINT32")
        return value

    def tensor(self, i: int) -> tuple[TensorLayout, int]:
        """Layout of tensor i and its offset within the data."""
        name = self.name(f"name of tensor {i}")
        if len(name.encode()) > MAX_NAME_BYTES:
            self.fail(f"the name of tensor {i} has {len(name.encode())} bytes, at most {MAX_NAME_BYTES} are allowed: {name[:80]!r}")
        what = f"tensor {name!r}"
        n_dims = self.u32(what)
        if not 1 <= n_dims <= MAX_DIMS:
            self.fail(f"{what} has {n_dims} dimensions, expected 1 to {MAX_DIMS}")
        shape = tuple(reversed([self.u64(what) for _ in range(n_dims)]))
        if min(shape) < 1 or math.prod(shape) >= 2**63:
            self.fail(f"{what} has shape {list(shape)}, whose dimensions must be positive and its size below 2^63")
        try:
            grid = grid_by_id(self.u32(what))
        except UnsupportedError as err:
            self.fail(f"{what}: {err}")
        if not grid.fits(shape[-1]):
            self.fail(f"{what} has rows of {shape[-1]} values, which do not divide into {grid.name} blocks of {grid.block_size}")
        return TensorLayout(name, shape, grid), self.u64(what)

    def placed(self, found: Sequence[tuple[TensorLayout, int]], data_offset: int, alignment: int) -> dict[str, TensorInfo]:
        """Check that tensors follow each other without gaps and end within the file."""
        tensors: dict[str, TensorInfo] = {}
        expected = 0
        for layout, offset in found:
            what = f"tensor {layout.name!r}"
            if layout.name in tensors:
                self.fail(f"{what} occurs twice")
            if offset != expected:
                fault = f"is not a multiple of {alignment}" if offset % alignment else "leaves a gap or overlaps"
                self.fail(f"{what} lies at data offset {offset}, which {fault}; expected {expected}. Convert the model again.")
            end = data_offset + offset + layout.nbytes
            if end > self.size:
                self.fail(f"{what} ends at byte {end}, the file at {self.size}. The file is truncated; fetch it again.")
            tensors[layout.name] = TensorInfo(layout.name, layout.shape, layout.grid, data_offset + offset)
            expected = padded(offset + layout.nbytes, alignment)
        return tensors


def padded(n: int, alignment: int) -> int:
    return n + -n % alignment
