"""Lazy tensors: rows of packed bytes in some grid, read when asked for and released at once.

Everything that a converter moves is a matrix of `n_rows` rows, each packed on its own, as ggml packs them. Reordering, slicing
and joining rows is therefore a byte shuffle in every grid and never changes a value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeq.errors import ShapeError, SourceError
from edgeq.grids import F32, Grid

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A tensor that is not in memory yet.

    shape: (n,) for vectors, (n_out, n_in) for matrices. grid: how a row is packed.
    read(start, stop) returns packed rows, uint8 (stop - start, grid.row_bytes(n_cols)); a vector is one row.
    origin names file and tensor for messages.
    """

    shape: tuple[int, ...]
    grid: Grid
    read: Callable[[int, int], Bytes]
    origin: str

    def __post_init__(self) -> None:
        if len(self.shape) not in (1, 2) or min(self.shape) < 1:
            raise ShapeError(f"{self.origin}: shape {list(self.shape)} is not a vector or a matrix")

    @property
    def n_rows(self) -> int:
        return self.shape[0] if len(self.shape) == 2 else 1

    @property
    def n_cols(self) -> int:
        return self.shape[-1]

    @property
    def row_bytes(self) -> int:
        return self.grid.row_bytes(self.n_cols)

    @property
    def nbytes(self) -> int:
        return self.n_rows * self.row_bytes

    def packed(self, start: int = 0, stop: int | None = None) -> Bytes:
        return self.read(start, self.n_rows if stop is None else stop)

    def decode(self, start: int = 0, stop: int | None = None) -> Floats:
        """Values of rows start..stop as float32, (rows, n_cols); a vector comes back as (n_cols,)."""
        values = self.grid.decode(self.packed(start, stop), self.n_cols)
        return values[0] if len(self.shape) == 1 else values


def from_file(path: Path, *, offset: int, shape: tuple[int, ...], grid: Grid, origin: str) -> LazyTensor:
    """A tensor whose packed rows lie in `path` at byte `offset`. Each read maps its own range, so no page outlives its use.

    Reading raises SourceError when the file is gone or has become shorter.
    """
    row_bytes = grid.row_bytes(shape[-1])

    def read(start: int, stop: int) -> Bytes:
        if stop <= start:
            return np.empty((0, row_bytes), dtype=np.uint8)
        try:
            return np.memmap(path, dtype=np.uint8, mode="r", offset=offset + start * row_bytes, shape=(stop - start, row_bytes))
        except (OSError, ValueError) as err:  # ValueError: the file has become shorter
            raise SourceError(f"{origin}: {path} cannot be read any more: {err}. Keep the source in place until the work is done.") from err

    return LazyTensor(shape=shape, grid=grid, read=read, origin=origin)


def from_values(values: npt.ArrayLike, *, origin: str) -> LazyTensor:
    """A float32 tensor held in memory: small ones (norms, biases, rope factors) and tests."""
    array = np.ascontiguousarray(values, dtype=np.float32)
    rows = array.reshape(1, -1) if array.ndim == 1 else array
    packed = rows.view(np.uint8)
    return LazyTensor(shape=array.shape, grid=F32, read=lambda start, stop: packed[start:stop], origin=origin)


def take_rows(tensor: LazyTensor, index: npt.NDArray[np.intp]) -> LazyTensor:
    """Rows `index` of a matrix, or elements `index` of an unquantized vector, in that order."""
    if len(tensor.shape) == 1:
        return map_values(tensor, lambda values: values[index], shape=(len(index),))

    def read(start: int, stop: int) -> Bytes:
        wanted = index[start:stop]
        if not len(wanted):
            return tensor.read(0, 0)
        low = int(wanted.min())
        return tensor.read(low, int(wanted.max()) + 1)[wanted - low]

    return LazyTensor(shape=(len(index), tensor.n_cols), grid=tensor.grid, read=read, origin=tensor.origin)


def slice_rows(tensor: LazyTensor, start: int, stop: int) -> LazyTensor:
    """Rows start..stop of a matrix, or those elements of a vector."""
    if len(tensor.shape) == 1:
        return take_rows(tensor, np.arange(start, stop))
    return LazyTensor(
        shape=(stop - start, tensor.n_cols),
        grid=tensor.grid,
        read=lambda lo, hi: tensor.read(start + lo, start + hi),
        origin=tensor.origin,
    )


def concat_rows(tensors: Sequence[LazyTensor], *, origin: str) -> LazyTensor:
    """Join tensors of equal width along rows; vectors are joined end to end. All in the first one's grid, else in float32."""
    if len(tensors[0].shape) == 1:
        return from_values(np.concatenate([t.decode() for t in tensors]), origin=origin)
    widths, grids = {t.n_cols for t in tensors}, {t.grid for t in tensors}
    if len(widths) > 1:
        raise ShapeError(f"{origin}: cannot join tensors of widths {sorted(widths)}")
    if len(grids) > 1:
        tensors = [as_float32(t) for t in tensors]
    bounds = np.cumsum([0, *(t.n_rows for t in tensors)])

    def read(start: int, stop: int) -> Bytes:
        parts = [
            t.read(max(start - lo, 0), min(stop, hi) - lo)
            for t, lo, hi in zip(tensors, bounds, bounds[1:], strict=False)
            if start < hi and stop > lo
        ]
        return np.concatenate(parts) if parts else tensors[0].read(0, 0)

    return LazyTensor(shape=(int(bounds[-1]), tensors[0].n_cols), grid=tensors[0].grid, read=read, origin=origin)


def map_values(tensor: LazyTensor, function: Callable[[Floats], Floats], *, shape: tuple[int, ...] | None = None) -> LazyTensor:
    """Apply a float32 function to rows as they are read; the result is float32. A vector is passed whole, a matrix in row chunks."""

    def read(start: int, stop: int) -> Bytes:
        values = function(tensor.decode(start, stop))
        rows = values.reshape(1, -1) if values.ndim == 1 else values
        return np.ascontiguousarray(rows, dtype=np.float32).view(np.uint8)

    return LazyTensor(shape=shape or tensor.shape, grid=F32, read=read, origin=tensor.origin)


def as_float32(tensor: LazyTensor) -> LazyTensor:
    return tensor if tensor.grid is F32 else map_values(tensor, lambda values: values)


def check_finite(values: Floats, *, origin: str) -> None:
    """Raise SourceError that names the tensor and counts the values if any is NaN or infinite."""
    if not np.isfinite(values).all():
        nan, inf = int(np.isnan(values).sum()), int(np.isinf(values).sum())
        raise SourceError(
            f"{origin}: {nan} values are NaN, {inf} infinite. The model is damaged or its training diverged; get a sound one."
        )
