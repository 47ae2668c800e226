"""Writing a graph as model.onnx and model.onnx.data: where every weight will lie, how large both files will be, and the writing itself.

Weights lie in the data file one after another in the order in which the graph was built, each at a multiple of 64 bytes, row-major, as
their operators read them; constants of up to 256 bytes (shapes, axes, scalars) stand in model.onnx, where shape inference wants them.
Offsets follow from shapes, so that model.onnx is known before a weight is read; data is then streamed, hashed on the way, and never whole
in memory. Both files depend on the graph, the weights and the metadata alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgeq.converters.onnx.builder import Builder
from edgeq.converters.onnx.streamed import Streamed
from edgeq.errors import OutputError, ShapeError
from edgeq.gguf_write import OutputFile
from edgeq.progress import Progress, silent

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
ALIGNMENT = 64
INLINE_BYTES = 256
_LARGEST_PROTO = (1 << 31) - 1


@dataclass(frozen=True)
class WrittenFile:
    """A file that was written: its name in the folder, size and hash."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class _Place:
    """An initializer and where it lies in the data file."""

    value: ir.Value
    tensor: ir.TensorProtocol
    offset: int


def predicted_bytes(builder: Builder, *, metadata: Mapping[str, str] | None = None) -> int:
    """Exact size of both files that `write_onnx` will write. No weight is read."""
    model = builder.model(metadata=metadata)
    places = _places(model)
    return len(_proto(model, places)) + _data_bytes(places)


def write_onnx(
    folder: Path, builder: Builder, *, metadata: Mapping[str, str] | None = None, progress: Progress = silent
) -> tuple[WrittenFile, ...]:
    """Write the graph into a folder that exists: model.onnx.data (if any weight is that large), then model.onnx. Returns the files.

    A failed write leaves what it wrote; callers write to a staging folder. progress: step "write", in bytes. Raises OutputError when the
    disk refuses or model.onnx would be larger than ONNX allows, ShapeError when a weight yields other bytes than its shape says, and what
    reading and encoding weights raises.
    """
    model = builder.model(metadata=metadata)
    places = _places(model)
    proto = _proto(model, places)
    if len(proto) > _LARGEST_PROTO:
        raise OutputError(f"{folder / MODEL_FILE}: {len(proto):,} bytes of graph are more than the {_LARGEST_PROTO:,} that ONNX allows.")
    total = len(proto) + _data_bytes(places)
    written = []
    if places:
        written.append(_write(folder / DATA_FILE, _data(places), total, 0, progress))
    written.append(_write(folder / MODEL_FILE, [proto], total, total - len(proto), progress))
    progress("write", total, total)
    return tuple(written)


def _places(model: ir.Model) -> list[_Place]:
    places = []
    offset = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None, f"{value.name} has no values"
        if tensor.nbytes <= INLINE_BYTES and not isinstance(tensor, ir.LazyTensor):
            continue
        places.append(_Place(value, tensor, offset))
        offset = _aligned(offset + tensor.nbytes)
    return places


def _data_bytes(places: list[_Place]) -> int:
    return places[-1].offset + places[-1].tensor.nbytes if places else 0


def _proto(model: ir.Model, places: list[_Place]) -> bytes:
    with _external(places):
        return bytes(ir.serde.serialize_model(model).SerializeToString(deterministic=True))


@contextmanager
def _external(places: list[_Place]) -> Iterator[None]:
    """Within the block, initializers are references into the data file."""
    try:
        for place in places:
            t = place.tensor
            place.value.const_value = ir.ExternalTensor(
                DATA_FILE, place.offset, t.nbytes, t.dtype, shape=ir.Shape(t.shape.numpy()), name=str(place.value.name)
            )
        yield
    finally:
        for place in places:
            place.value.const_value = place.tensor


def _data(places: list[_Place]) -> Iterator[memoryview | bytes]:
    """The data file in pieces."""
    at = 0
    for place in places:
        yield bytes(place.offset - at)
        left = place.tensor.nbytes
        for chunk in _chunks(place.tensor):
            view = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
            left -= len(view)
            if left < 0:
                break
            yield view
        if left:
            raise ShapeError(
                f"{place.value.name}: its data is {abs(left)} bytes too {'short' if left > 0 else 'long'} for {place.tensor.nbytes} bytes"
            )
        at = place.offset + place.tensor.nbytes


def _chunks(tensor: ir.TensorProtocol) -> Iterable[npt.NDArray[Any]]:
    return tensor.chunks() if isinstance(tensor, Streamed) else [np.frombuffer(tensor.tobytes(), dtype=np.uint8)]


def _write(path: Path, data: Iterable[memoryview | bytes], total: int, before: int, progress: Progress) -> WrittenFile:
    digest = hashlib.sha256()
    out = OutputFile(path, total, digest)
    try:
        for piece in data:
            out.write(piece)
            progress("write", before + out.written, total)
    finally:
        out.close()
    return WrittenFile(path.name, out.written, digest.hexdigest())


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
