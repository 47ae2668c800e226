"""What an ONNX file holds, found without loading it: its nodes, and where the bytes of every initializer lie.

An ONNX file is a protobuf message: fields in a row, each a key (number * 8 + kind) and a value, which is a varint (kind 0), 8 bytes (1), a
length and so many bytes (2), or 4 bytes (5). Numbers of the fields that are read here, from onnx.proto of ONNX:

    model       7 graph
    graph       1 node, 5 initializer
    node        1 input, 2 output, 3 name, 4 op_type, 5 attribute, 7 domain
    attribute   1 name, 3 i
    tensor      1 dims, 2 data_type, 4 float_data, 8 name, 9 raw_data, 13 external_data (1 key, 2 value), 14 data_location (1: external)

Weights are mapped when they are asked for, like those of a safetensors file.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from edgeq.converters.sources.stored import StoredTensor
from edgeq.errors import SourceError
from edgeq.grids import Grid
from edgeq.tensors import Bytes, LazyTensor, from_file

# ONNX's numbers of types by safetensors' names; others are refused where the tensor is used.
_TYPES = {1: "F32", 2: "U8", 3: "I8", 5: "I16", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16", 11: "F64", 16: "BF16"}
_BYTES = {"F32": 4, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "BOOL": 1, "F16": 2, "F64": 8, "BF16": 2}
_BYTE = Grid("bytes", -1, 1, 1)


@dataclass(frozen=True, kw_only=True)
class Node:
    """integers: its attributes that are whole numbers."""

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    integers: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class OnnxGraph:
    """files: the file, and those that hold its external data."""

    path: Path
    nodes: tuple[Node, ...]
    initializers: Mapping[str, StoredTensor]
    files: tuple[Path, ...]


def read_onnx_file(path: Path) -> OnnxGraph:
    """Raises SourceError when the file is missing, cut short, or not ONNX, and when external data is missing or too short."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(path, data)
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist. Give a folder in Hugging Face layout or a .onnx file.") from None
    except (OSError, ValueError) as err:  # an empty file cannot be mapped: a ValueError
        raise SourceError(f"{path}: cannot be read ({err}).") from err


def _read(path: Path, data: mmap.mmap) -> OnnxGraph:
    graphs = [value for number, value in _fields(path, data, (0, len(data))) if number == 7 and isinstance(value, tuple)]
    if len(graphs) != 1:
        _fail(path, "is not an ONNX file: it holds no graph")
    nodes, tensors = [], {}
    for number, value in _fields(path, data, graphs[0]):
        if number == 1 and isinstance(value, tuple):
            nodes.append(_node(path, data, value))
        if number == 5 and isinstance(value, tuple):
            tensor = _tensor(path, data, value)
            tensors[tensor.name] = tensor
    files = {tensor.file: None for tensor in tensors.values() if tensor.file != path}
    return OnnxGraph(path=path, nodes=tuple(nodes), initializers=tensors, files=(path, *files))


Span = tuple[int, int]


def _fields(path: Path, data: mmap.mmap, span: Span) -> Iterator[tuple[int, int | Span]]:
    """Number and value of every field between two positions: a whole number, or the span of bytes (also of 4 or 8)."""
    at, end = span
    while at < end:
        key, at = _varint(path, data, at, end)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(path, data, at, end)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(path, data, at, end)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            _fail(path, f"is not an ONNX file: byte {at} starts no field that is known")
        if at + size > end:
            _fail(path, f"is cut short: at byte {at} it promises {size} more bytes, it has {end - at}")
        yield number, (at, at + size)
        at += size


def _varint(path: Path, data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at == end:
            break
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise _broken(path, "is cut short, or not an ONNX file")


def _text(path: Path, data: mmap.mmap, span: int | Span) -> str:
    try:
        return "" if isinstance(span, int) else data[span[0] : span[1]].decode("utf-8")
    except UnicodeDecodeError as err:
        _fail(path, f"is not an ONNX file: a name is not UTF-8 ({err})", err)


def _node(path: Path, data: mmap.mmap, span: Span) -> Node:
    texts: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: [], 7: []}
    integers = {}
    for number, value in _fields(path, data, span):
        if number in texts:
            texts[number].append(_text(path, data, value))
        elif number == 5 and isinstance(value, tuple):
            attribute = dict(_fields(path, data, value))
            if isinstance(attribute.get(3), int):
                integers[_text(path, data, attribute.get(1, 0))] = int(attribute[3])  # type: ignore[arg-type]  # just checked
    return Node(
        op="".join(texts[4]),
        domain="".join(texts[7]),
        name="".join(texts[3]),
        inputs=tuple(texts[1]),
        outputs=tuple(texts[2]),
        integers=integers,
    )


def _tensor(path: Path, data: mmap.mmap, span: Span) -> StoredTensor:
    shape: list[int] = []
    single: dict[int, Any] = {}
    outside: dict[str, str] = {}
    for number, value in _fields(path, data, span):
        if number == 1:
            shape += [value] if isinstance(value, int) else _packed(path, data, value)
        elif number == 13 and isinstance(value, tuple):
            entry = dict(_fields(path, data, value))
            outside[_text(path, data, entry.get(1, 0))] = _text(path, data, entry.get(2, 0))
        else:
            single[number] = value
    name, dtype = _text(path, data, single.get(8, 0)), _TYPES.get(single.get(2, 0), f"type {single.get(2)}")
    n_bytes = _BYTES.get(dtype, 0)
    for size in shape:
        n_bytes *= size
    if single.get(14) == 1:
        return _outside(path, name, dtype, tuple(shape), n_bytes, outside)
    start, stop = next((single[number] for number in (9, 4) if isinstance(single.get(number), tuple)), (0, 0))
    if stop - start != n_bytes and 4 not in single and 9 in single:
        _fail(path, f"gives {name!r} {stop - start} bytes, but shape {shape} in {dtype} needs {n_bytes}")
    return _stored(path, name, dtype, tuple(shape), start, stop - start)


def _packed(path: Path, data: mmap.mmap, span: Span) -> list[int]:
    at, end = span
    values = []
    while at < end:
        value, at = _varint(path, data, at, end)
        values.append(value)
    return values


def _outside(path: Path, name: str, dtype: str, shape: tuple[int, ...], n_bytes: int, entries: Mapping[str, str]) -> StoredTensor:
    location = entries.get("location", "")
    if not location or Path(location).is_absolute() or ".." in Path(location).parts:
        _fail(path, f"places {name!r} in {location!r}, which is no file of its folder")
    file = path.parent / location
    if not file.is_file():
        raise SourceError(f"{file} is missing: {path.name} keeps {name!r} there. Download it into the same folder.")
    try:
        start, size = int(entries.get("offset", "0")), int(entries.get("length", n_bytes))
    except ValueError as err:
        _fail(path, f"places {name!r} at {dict(entries)}, which makes no sense", err)
    if size != n_bytes or start < 0 or start + size > file.stat().st_size:
        raise SourceError(
            f"{file} is cut short or not the one that {path.name} was written with: {name!r} takes {n_bytes} bytes at {start}, "
            f"the file has {file.stat().st_size}. Download both again."
        )
    return _stored(file, name, dtype, shape, start, size)


def _stored(file: Path, name: str, dtype: str, shape: tuple[int, ...], start: int, n_bytes: int) -> StoredTensor:
    def load(grid: Grid) -> LazyTensor:
        return from_file(file, offset=start, shape=shape, grid=grid, origin=f"{file}: {name}")

    def raw() -> Bytes:
        return from_file(file, offset=start, shape=(n_bytes,), grid=_BYTE, origin=f"{file}: {name}").packed()[0]

    return StoredTensor(file=file, name=name, dtype=dtype, shape=shape, load=load, data=raw)


def _fail(path: Path, what: str, cause: Exception | None = None) -> NoReturn:
    raise _broken(path, what) from cause


def _broken(path: Path, what: str) -> SourceError:
    return SourceError(f"{path} {what}. Download the file again.")
