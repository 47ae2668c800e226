"""A model.onnx and the files its weights lie in, checked before ONNX Runtime sees them.

model.onnx is one protobuf message (onnx.proto: `ModelProto`); large initializers only say where they lie: `location` (a path below the
file's folder), `offset` and `length` in bytes. ONNX Runtime reads them through a mapping and checks no content. It refuses a location that
leads out of the folder, also through a link; the blobs and links of a Hugging Face cache, where both files are links into one folder, are
fine.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

from edgeq.errors import MissingDependency, SourceError, UnsupportedError

# Bits of a value by TensorProto.DataType (onnx.proto).
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 17: 8, 19: 8, 21: 4, 22: 4}
_EXTERNAL = 1  # TensorProto.DataLocation


@dataclass(frozen=True)
class OnnxFile:
    """A parsed model.onnx.

    proto: the ModelProto, without external data. data: the files of external data, by location. folder: one that all of them lie in, when
    links are followed, and from which ONNX Runtime may read them.
    """

    path: Path
    proto: Any
    data: dict[str, Path]
    folder: Path

    @property
    def files(self) -> tuple[Path, ...]:
        """model.onnx and its data, in order of names."""
        return (self.path, *(self.data[location] for location in sorted(self.data)))

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor_bytes(tensor) for tensor in self.proto.graph.initializer)


def read_onnx(path: Path) -> OnnxFile:
    """Parse a file and look at what it refers to. No weight is read.

    Raises SourceError for a file that is missing or damaged, and for external data that is missing, shorter than its tensors, or outside
    the folder; UnsupportedError for number formats that onnx does not define; MissingDependency without onnx.
    """
    try:
        from onnx import ModelProto
    except ImportError as err:
        raise MissingDependency("onnx", "onnx") from err
    if not path.is_file():
        raise SourceError(f"{path} does not exist. Give an ONNX folder, its model.onnx or a package folder.")
    try:
        content = path.read_bytes()
    except OSError as err:
        raise SourceError(f"{path}: cannot be read ({err.strerror}).") from err
    try:
        proto = ModelProto.FromString(content)
    except Exception as err:  # protobuf's DecodeError, which has no types to import
        raise SourceError(f"{path}: is no ONNX model, or it is cut short. Copy or export it again.") from err
    if not proto.graph.node:
        raise SourceError(f"{path}: holds no graph. It is no ONNX model, or it is cut short; copy or export it again.")
    data: dict[str, Path] = {}
    for tensor in proto.graph.initializer:
        if tensor.data_location == _EXTERNAL:
            _check_external(path, tensor, data)
    return OnnxFile(path, proto, data, _common_folder(path, list(data.values())))


def tensor_bytes(tensor: Any) -> int:
    """Bytes of an initializer's values, packed."""
    return -(-prod(tensor.dims) * _BITS[tensor.data_type] // 8)


def _check_external(path: Path, tensor: Any, data: dict[str, Path]) -> None:
    """Check where a tensor lies; `data` gets the files seen."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if tensor.data_type not in _BITS:
        raise UnsupportedError(f"{path}: tensor {tensor.name} has values of type {tensor.data_type}, which edgeq does not know.")
    location, needed = entries.get("location", ""), tensor_bytes(tensor)
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", needed))
    except ValueError as err:
        raise SourceError(f"{path}: tensor {tensor.name} does not say where it lies ({err}). Copy or export the model again.") from err
    if location not in data:
        data[location] = _data_file(path, tensor.name, location)
    if offset < 0 or length != needed:
        raise SourceError(
            f"{path}: tensor {tensor.name} takes {needed:,} bytes, but its data is said to be {length:,} at {offset:,}. "
            "The file is damaged; copy or export it again."
        )
    size = data[location].stat().st_size
    if offset + needed > size:
        raise SourceError(
            f"{data[location]}: has {size:,} bytes, but {tensor.name} lies at {offset:,} to {offset + needed:,}. "
            f"The file is cut short, or belongs to another {path.name}; copy it again."
        )


def _data_file(path: Path, tensor: str, location: str) -> Path:
    relative = PurePosixPath(location)
    if not location or relative.is_absolute() or ".." in relative.parts:
        raise SourceError(f"{path}: tensor {tensor} lies in {location!r}, outside the model's folder. Do not use this model.")
    file = path.parent / location
    if not file.is_file():
        raise SourceError(f"{file} is missing: it holds weights of {path.name}. Copy both files together.")
    return file


def _common_folder(path: Path, files: list[Path]) -> Path:
    """The model's folder, or the one where the file lies that model.onnx is a link to."""
    folders = (path.parent.resolve(), path.resolve().parent)
    outside = [next((file for file in files if folder not in file.resolve().parents), None) for folder in folders]
    for folder, file in zip(folders, outside, strict=True):
        if file is None:
            return folder
    raise SourceError(
        f"{outside[0]} is a link out of the model's folder, which ONNX Runtime does not follow. "
        "Put a copy or a hard link of the file in its place."
    )
