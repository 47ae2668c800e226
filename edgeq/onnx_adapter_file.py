"""Adapters as ONNX Runtime loads them, `.onnx_adapter`: named matrices that a graph takes in place of empty ones.

A flatbuffer (onnxruntime's `adapter_schema.fbs`), little-endian; offsets are counted from where they stand:

    0   offset of the table, "TORT"
    table Adapter    { format_version, adapter_version, model_version: int32; parameters: [Parameter] }
    table Parameter  { name: string; dims: [int64]; data_type: int32 of TensorProto.DataType; raw_data: [uint8], at a multiple of 8 }

ONNX Runtime checks none of the versions and no content. Files of edgeq say in them what can be checked, as 31 bits of a SHA-256:
model_version is of the plan (`plan_version`), which names the weights, their order and their sizes that the matrices were laid out for;
adapter_version is of names, shapes and values (`content_version`). Other tools leave a small number there, or what their user chose.

Names, as Olive has them: `model.layers.0.self_attn.q_proj.lora_A.weight` (n_in, rank), `.lora_B.weight` (rank, n_out). A layer computes
x W + (x A) B, so that all strength is in B. Of an embedding A is (n_vocab, rank).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import AdapterError, OutputError
from edgeq.gguf_write import OutputFile, Written

SUFFIX = ".onnx_adapter"
PLAN_KEY = "edgeq.plan"  # in a graph's metadata: what its adapters must have been laid out for
FORMAT_VERSION = 1
DTYPES: Mapping[int, np.dtype[Any]] = {1: np.dtype("<f4"), 10: np.dtype("<f2")}  # TensorProto.DataType
_TYPES = {dtype: number for number, dtype in DTYPES.items()}
_MAGIC = b"TORT"
_LARGEST = (1 << 31) - 1  # of a flatbuffer
_DATA_ALIGNMENT = 64
_AGAIN = "Export or download the adapter again."

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredAdapter:
    """What a file holds. parameters: float32 or float16, views of one buffer."""

    path: Path
    adapter_version: int
    model_version: int
    parameters: Mapping[str, Array]


def plan_version(plan: str) -> int:
    """The number by which a file tells its plan: 31 bits of a hash, and never a small number as other tools write them."""
    return _version(hashlib.sha256(plan.encode()).digest())


def cut_plan(plan: str, n_ff: Sequence[int], n_kv: Sequence[int]) -> str:
    """The plan of a cut of a model: MLP channels and KV heads that are kept in every layer."""
    return hashlib.sha256(f"{plan} n_ff={list(n_ff)} n_kv={list(n_kv)}".encode()).hexdigest()


def content_version(parameters: Mapping[str, Array]) -> int:
    """The number by which a file's content is known again."""
    digest = hashlib.sha256()
    for name, values in parameters.items():
        digest.update(f"{name} {values.dtype.str} {list(values.shape)}\n".encode())
        digest.update(np.ascontiguousarray(values).data.cast("B") if values.size else b"")
    return _version(digest.digest())


def predicted_bytes(parameters: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> int:
    """Exact size of a file, from names, shapes and types."""
    return _lay_out(parameters).nbytes


def write_onnx_adapter(path: Path, parameters: Mapping[str, Array], *, plan: str) -> Written:
    """Write matrices of float32 or float16 for the model of a plan. A failed write leaves what it wrote.

    Raises OutputError when the disk refuses, or the file would be larger than the format allows.
    """
    layout = _lay_out({name: (values.shape, values.dtype) for name, values in parameters.items()})
    if layout.nbytes > _LARGEST:
        raise OutputError(f"{path}: an adapter of {layout.nbytes:,} bytes is larger than the {_LARGEST:,} that the format allows.")
    digest = hashlib.sha256()
    out = OutputFile(path, layout.nbytes, digest)
    try:
        for piece in _pieces(layout, parameters, plan):
            out.write(piece)
    finally:
        out.close()
    return Written(out.written, digest.hexdigest())


def read_onnx_adapter(path: Path) -> StoredAdapter:
    """Read a file whole, by whichever tool it was written.

    Raises AdapterError for one that cannot be read, is no such file, is cut short or damaged, or holds other numbers than float32 and
    float16. Damage of the values is found in files of edgeq alone: see `check_content`.
    """
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except OSError as err:
        raise AdapterError(f"{path}: cannot be read: {err.strerror or err}. Give an {SUFFIX} file.") from err
    if len(content) < 8 or content[4:8].tobytes() != _MAGIC:
        raise AdapterError(f"{path}: is no {SUFFIX} file. Give one that was made for ONNX Runtime.")
    try:
        return _parsed(path, _Buffer(content))
    except (struct.error, IndexError, ValueError) as err:
        raise AdapterError(f"{path}: is cut short or damaged. {_AGAIN}") from err


def check_content(adapter: StoredAdapter) -> None:
    """Raise AdapterError when the values are not those that a file of edgeq was written with."""
    if adapter.adapter_version != content_version(adapter.parameters):
        raise AdapterError(f"{adapter.path}: its values are not those that it was written with. The adapter is damaged; get a sound one.")


def _version(digest: bytes) -> int:
    return int.from_bytes(digest[:4], "little") & 0x3FFFFFFF | 0x40000000


@dataclass(frozen=True)
class _Layout:
    """Where the parts of a file lie. tables: of each parameter its table, name, dims and data."""

    vector: int
    tables: Mapping[str, tuple[int, int, int, int]]
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
    nbytes: int


_ADAPTER_VTABLE, _ADAPTER = 8, 20
_VTABLE = struct.pack("<6H", 12, 20, 4, 8, 12, 16)  # of both tables: its own size, the table's, where four fields are in it
_PARAMETER_VTABLE = 40
_VECTOR = 52


def _lay_out(shapes: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> _Layout:
    at = _VECTOR + 4 + 4 * len(shapes)
    heads = {}
    for name, (shape, _) in shapes.items():
        table, text = at, at + 20
        dims = _aligned(text + 4 + len(name.encode()) + 1 + 4, 8) - 4  # numbers of 8 bytes behind a count of 4
        heads[name] = table, text, dims
        at = dims + 4 + 8 * len(shape)
    tables = {}
    for name, (shape, dtype) in shapes.items():
        data = _aligned(at + 4, _DATA_ALIGNMENT) - 4
        tables[name] = (*heads[name], data)
        at = data + 4 + prod(shape) * dtype.itemsize
    return _Layout(_VECTOR, tables, shapes, _aligned(at, 4))


def _pieces(layout: _Layout, parameters: Mapping[str, Array], plan: str) -> Iterator[bytes | memoryview]:
    first = min((data for *_, data in layout.tables.values()), default=layout.nbytes)
    head = bytearray(first)
    struct.pack_into("<I4s", head, 0, _ADAPTER, _MAGIC)
    head[_ADAPTER_VTABLE:_ADAPTER] = _VTABLE
    versions = FORMAT_VERSION, content_version(parameters), plan_version(plan)
    struct.pack_into("<4iI", head, _ADAPTER, _ADAPTER - _ADAPTER_VTABLE, *versions, layout.vector - (_ADAPTER + 16))
    head[_PARAMETER_VTABLE:_VECTOR] = _VTABLE
    struct.pack_into("<I", head, layout.vector, len(parameters))
    for i, (name, (table, text, dims, data)) in enumerate(layout.tables.items()):
        shape, dtype = layout.shapes[name]
        entry, encoded = layout.vector + 4 + 4 * i, name.encode()
        struct.pack_into("<I", head, entry, table - entry)
        offsets = text - (table + 4), dims - (table + 8), _TYPES[dtype.newbyteorder("<")], data - (table + 16)
        struct.pack_into("<iIIiI", head, table, table - _PARAMETER_VTABLE, *offsets)
        struct.pack_into(f"<I{len(encoded)}s", head, text, len(encoded), encoded)
        struct.pack_into(f"<I{len(shape)}q", head, dims, len(shape), *shape)
    yield bytes(head)
    at = first
    for name, (*_, data) in layout.tables.items():
        values = np.ascontiguousarray(parameters[name]).astype(layout.shapes[name][1].newbyteorder("<"), copy=False)
        yield bytes(data - at) + struct.pack("<I", values.nbytes)
        if values.size:
            yield values.reshape(-1).view(np.uint8).data
        at = data + 4 + values.nbytes
    yield bytes(layout.nbytes - at)


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


class _Buffer:
    """Numbers, tables and vectors by their place. Raises struct.error, IndexError or ValueError for places outside."""

    def __init__(self, content: npt.NDArray[np.uint8]) -> None:
        self.content, self._view = content, content.data

    def number(self, form: str, at: int) -> int:
        if at < 0:
            raise IndexError(at)
        return int(struct.unpack_from(form, self._view, at)[0])

    def target(self, at: int) -> int:
        """Of an offset."""
        return at + self.number("<I", at)

    def field(self, table: int, i: int) -> int | None:
        """Where the i-th field of a table is; None for one that is left out."""
        vtable = table - self.number("<i", table)
        if 4 + 2 * i >= self.number("<H", vtable):
            return None
        offset = self.number("<H", vtable + 4 + 2 * i)
        return table + offset if offset else None

    def integer(self, table: int, i: int) -> int:
        at = self.field(table, i)
        return 0 if at is None else self.number("<i", at)

    def items(self, table: int, i: int, size: int) -> tuple[int, int]:
        """Where the entries of a vector begin, and how many there are."""
        at = self.field(table, i)
        if at is None:
            return 0, 0
        vector = self.target(at)
        count = self.number("<I", vector)
        if vector + 4 + count * size > len(self.content):
            raise IndexError(vector)
        return vector + 4, count

    def bytes(self, table: int, i: int) -> npt.NDArray[np.uint8]:
        start, count = self.items(table, i, 1)
        return self.content[start : start + count]


def _parsed(path: Path, buffer: _Buffer) -> StoredAdapter:
    root = buffer.target(0)
    version = buffer.integer(root, 0)
    if version != FORMAT_VERSION:
        raise AdapterError(f"{path}: has format version {version}; edgeq reads {FORMAT_VERSION}. {_AGAIN}")
    start, count = buffer.items(root, 3, 4)
    parameters: dict[str, Array] = {}
    for entry in range(start, start + 4 * count, 4):
        name, values = _parameter(path, buffer, buffer.target(entry))
        if name in parameters:
            raise AdapterError(f"{path}: holds {name} twice. {_AGAIN}")
        parameters[name] = values
    return StoredAdapter(path=path, adapter_version=buffer.integer(root, 1), model_version=buffer.integer(root, 2), parameters=parameters)


def _parameter(path: Path, buffer: _Buffer, table: int) -> tuple[str, Array]:
    name = buffer.bytes(table, 0).tobytes().decode()
    start, n_dims = buffer.items(table, 1, 8)
    shape = [buffer.number("<q", start + 8 * i) for i in range(n_dims)]
    dtype, raw = DTYPES.get(buffer.integer(table, 2)), buffer.bytes(table, 3)
    if dtype is None:
        raise AdapterError(f"{path}: {name} has numbers of type {buffer.integer(table, 2)}; expected float32 or float16. {_AGAIN}")
    if min(shape, default=0) < 0 or prod(shape) * dtype.itemsize != len(raw):
        raise AdapterError(f"{path}: {name} has {len(raw):,} bytes for a shape of {shape}. {_AGAIN}")
    return name, raw.view(dtype).reshape(shape)
