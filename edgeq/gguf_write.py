"""Writing GGUF files: the header from a plan, then one tensor at a time, in one streaming pass. Format: see `edgeq.gguf_file`."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from edgeq.errors import OutputError, PlanError, ShapeError
from edgeq.gguf_fields import Field
from edgeq.gguf_file import ALIGNMENT, HEAD, MAGIC, MAX_DIMS, MAX_NAME_BYTES, TensorLayout, padded
from edgeq.progress import Progress, silent


@dataclass(frozen=True)
class TensorData(TensorLayout):
    """A tensor to write: `chunks()` yields its packed bytes in order, as uint8 arrays of any shape. Called once, when its turn comes."""

    chunks: Callable[[], Iterable[npt.NDArray[np.uint8]]]


@dataclass(frozen=True)
class Written:
    """What `write_gguf` wrote."""

    nbytes: int
    sha256: str


def header_bytes(fields: Iterable[Field], tensors: Iterable[TensorLayout], alignment: int = ALIGNMENT) -> bytes:
    """Everything before the data, padding included. Order is kept; names must be distinct and every tensor not F64."""
    fields, tensors = list(fields), list(tensors)
    _check(fields, tensors, alignment)
    parts = [HEAD.pack(MAGIC, 3, len(tensors), len(fields))]
    parts += [field.to_bytes() for field in fields]
    offset = 0
    for tensor in tensors:
        name = tensor.name.encode()
        dims = tensor.shape[::-1]
        parts.append(struct.pack(f"<Q{len(name)}sI{len(dims)}QIQ", len(name), name, len(dims), *dims, tensor.grid.id, offset))
        offset += padded(tensor.nbytes, alignment)
    head = b"".join(parts)
    return head.ljust(padded(len(head), alignment), b"\0")


def predicted_bytes(fields: Iterable[Field], tensors: Iterable[TensorLayout], alignment: int = ALIGNMENT) -> int:
    """Exact size of the file that `write_gguf` would write."""
    tensors = list(tensors)
    return len(header_bytes(fields, tensors, alignment)) + sum(padded(t.nbytes, alignment) for t in tensors)


def write_gguf(
    path: Path,
    fields: Iterable[Field],
    tensors: Sequence[TensorData],
    *,
    alignment: int = ALIGNMENT,
    hashed: bool = True,
    progress: Progress = silent,
) -> Written:
    """Write a GGUF file to `path` in one pass: the header from the plan, then one tensor at a time.

    hashed: False leaves the hash of the result empty, which saves a third of the time of writing where nobody asks for it.
    A failed write leaves what it wrote; callers write to a temporary name and rename. Raises OutputError when the disk is full or
    the file cannot be written, ShapeError when a tensor yields more or fewer bytes than its layout has, PlanError as header_bytes does.
    """
    head = header_bytes(fields, tensors, alignment)
    total = len(head) + sum(padded(t.nbytes, alignment) for t in tensors)
    out = OutputFile(path, total, hashlib.sha256() if hashed else None)
    try:
        out.write(head)
        progress("write", out.written, total)
        for tensor in tensors:
            left = tensor.nbytes
            for chunk in tensor.chunks():
                left -= chunk.nbytes
                if left < 0:
                    break
                out.write(np.ascontiguousarray(chunk).data.cast("B") if chunk.size else b"")
                progress("write", out.written, total)
            if left:
                raise ShapeError(
                    f"{tensor.name}: its data is {abs(left)} bytes too {'short' if left > 0 else 'long'} for {tensor.nbytes} bytes"
                )
            out.write(bytes(-out.written % alignment))
    finally:
        out.close()
    progress("write", total, total)
    return Written(out.written, "" if out.digest is None else out.digest.hexdigest())


class OutputFile:
    """An unbuffered file, hashed as it is written if wanted. Its OSErrors become OutputErrors; those from elsewhere pass through."""

    def __init__(self, path: Path, total: int, digest: Any) -> None:
        self.path, self.total, self.written, self.digest = path, total, 0, digest
        try:
            self.file = path.open("wb", buffering=0)
        except OSError as err:
            self.fail(err)

    def fail(self, err: OSError) -> NoReturn:
        raise OutputError(
            f"{self.path}: writing stopped after {self.written} of {self.total} bytes: {err.strerror or err}. "
            f"Make room for {self.total - self.written} more bytes or write elsewhere."
        ) from err

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        if self.digest is not None:
            self.digest.update(view)
        while view:
            try:
                n = self.file.write(view)
            except OSError as err:
                self.fail(err)
            self.written += n
            view = view[n:]

    def close(self) -> None:
        try:
            self.file.close()
        except OSError as err:
            self.fail(err)


def _check(fields: Sequence[Field], tensors: Sequence[TensorLayout], alignment: int) -> None:
    """What llama.cpp would refuse or die of, found before the first byte."""
    keys = {field.key: field for field in fields}
    assert len(keys) == len(fields), "metadata keys must be distinct"
    declared = keys["general.alignment"].value if "general.alignment" in keys else ALIGNMENT
    assert alignment == declared, f"alignment {alignment} differs from general.alignment {declared}"
    assert len({t.name for t in tensors}) == len(tensors), "tensor names must be distinct"
    for tensor in tensors:
        if tensor.grid.name == "F64":
            raise PlanError(f"{tensor.name}: llama.cpp dies on F64 tensors while decoding. Write F32 or F16.")
        if not 1 <= len(tensor.name.encode()) <= MAX_NAME_BYTES:
            raise PlanError(f"{tensor.name}: tensor names have 1 to {MAX_NAME_BYTES} bytes in GGUF, this one {len(tensor.name.encode())}")
        assert 1 <= len(tensor.shape) <= MAX_DIMS and min(tensor.shape) > 0, f"{tensor.name}: shape {tensor.shape}"
