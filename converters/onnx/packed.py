"""Rows of a weight on their way into initializers: kept or encoded in chunks, and taken apart as kernels want them.

A matrix in blocks becomes up to three initializers. Its codes come first in the file and are streamed; scales, zero points and minima are a
few bits per weight, gathered while codes go by, and written after them, so that nothing is encoded twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgeq.converters.gguf.encode import RegridError, encode_tensor
from edgeq.errors import PlanError, SourceError
from edgeq.grids import Grid
from edgeq.group_grids import GroupGrid
from edgeq.nbits import Bnb4, Form, NBits, answer, answer_for, split, split_bnb4
from edgeq.tensors import Bytes, Floats, LazyTensor, check_finite

Array = npt.NDArray[Any]

CHUNK_BYTES = 32 << 20  # of float32 values decoded at one time
FLOAT_TYPES: dict[ir.DataType, np.dtype[Any]] = {ir.DataType.FLOAT: np.dtype(np.float32), ir.DataType.FLOAT16: np.dtype(np.float16)}


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A weight (n_out, n_in) that is to be stored in `grid`.

    importance: of the columns, float32 (n_in,), for encoding. errors: where what encoding lost is noted, under `name`; None: nowhere.
    """

    weight: LazyTensor
    grid: Grid
    name: str
    importance: Floats | None = None
    errors: MutableMapping[str, RegridError] | None = None

    @property
    def kept(self) -> bool:
        return self.grid == self.weight.grid

    def form(self, dtype: ir.DataType) -> Form:
        """How its codes are stored in a graph of this type. Raises PlanError with the reason when no kernel takes them."""
        n_cols = self.weight.n_cols
        found = answer(self.weight, half=dtype == ir.DataType.FLOAT16) if self.kept else answer_for(self.grid, n_cols)
        if found.form is None:
            raise PlanError(f"{self.name}: {self.grid.name} cannot be kept in an ONNX file: {found.reason}. Choose Q8_0, Q4_0 or F16.")
        if not self.kept and isinstance(found.form, Bnb4):
            raise PlanError(f"{self.name}: {self.grid.name} is kept where a checkpoint has it, not encoded. Choose Q8_0, Q4_0 or F16.")
        if not self.grid.fits(n_cols):
            raise PlanError(
                f"{self.name}: rows of {n_cols} values do not divide into {self.grid.name} blocks of {self.grid.block_size}. "
                "Choose a grid of integer blocks, which may end within a block, or F16."
            )
        return found.form

    def chunks(self) -> Iterator[Bytes]:
        """Packed rows in order, an even number of rows in all but the last chunk."""
        if not self.kept:
            error = None
            for chunk in encode_tensor(self.weight, self.grid, self.importance, measure=self.errors is not None):
                error = chunk.error if error is None or chunk.error is None else error + chunk.error
                yield chunk.packed
            if self.errors is not None and error is not None:
                self.errors[self.name] = error
            return
        for start, stop in row_spans(self.weight):
            yield np.ascontiguousarray(self.weight.packed(start, stop))


def row_spans(weight: LazyTensor) -> Iterator[tuple[int, int]]:
    rows = max(2, CHUNK_BYTES // (4 * weight.n_cols) // 2 * 2)
    for start in range(0, weight.n_rows, rows):
        yield start, min(start + rows, weight.n_rows)


class Pieces:
    """Streams of the initializers of one weight: `codes` first, then what was gathered on the way, by name.

    take(packed) gives codes and the rest of a chunk of packed rows. A stream that is asked for out of turn goes over the weight by itself.
    """

    def __init__(self, packed: Packed, take: Callable[[Bytes], tuple[Array, dict[str, Array]]]) -> None:
        self._packed = packed
        self._take = take
        self._gathered: dict[str, list[Array]] = {}

    def codes(self) -> Iterator[Array]:
        gathered: dict[str, list[Array]] = {}
        for rows in self._packed.chunks():
            codes, rest = self._take(rows)
            for key, value in rest.items():
                gathered.setdefault(key, []).append(value)
            yield codes
        self._gathered = gathered

    def rest(self, key: str) -> Iterator[Array]:
        if key not in self._gathered:
            for _ in self.codes():
                pass
        yield from self._gathered.pop(key)


def nbits_pieces(packed: Packed, form: NBits, dtypes: Mapping[str, ir.DataType]) -> Pieces:
    """Pieces "scales", and "zeros" or "minima" where the form has them. dtypes: of scales and minima."""
    origin = packed.weight.origin

    def take(rows: Bytes) -> tuple[Array, dict[str, Array]]:
        parts = split(rows, packed.grid, form)
        rest: dict[str, Array] = {"scales": as_scales(parts.scales, dtypes["scales"], origin)}
        if parts.zeros is not None:
            rest["zeros"] = parts.zeros
        if parts.minima is not None:
            rest["minima"] = as_scales(parts.minima, dtypes["minima"], origin)
        return parts.codes, rest

    return Pieces(packed, take)


def bnb4_pieces(packed: Packed, form: Bnb4, dtype: ir.DataType) -> Pieces:
    """Pieces "absmax"."""
    grid = packed.grid
    assert isinstance(grid, GroupGrid)

    def take(rows: Bytes) -> tuple[Array, dict[str, Array]]:
        codes, absmax = split_bnb4(rows, grid, form)
        return codes, {"absmax": as_scales(absmax, dtype, packed.weight.origin)}

    return Pieces(packed, take)


def as_scales(scales: Floats, dtype: ir.DataType, origin: str) -> Array:
    """Block scales (or minima) in the graph's float type. Raises SourceError for what is not finite, PlanError as `as_float_type`."""
    if not np.isfinite(scales).all():
        raise SourceError(f"{origin}: a block scale is NaN or infinite. Fetch the model again.")
    return as_float_type(scales, dtype, origin)


def as_float_type(values: Floats, dtype: ir.DataType, origin: str) -> Array:
    """Finite values in FLOAT or FLOAT16. Raises SourceError for what is not finite, PlanError for what FLOAT16 cannot hold."""
    check_finite(values, origin=origin)
    with np.errstate(over="ignore"):
        converted = values.astype(FLOAT_TYPES[dtype])
    if not np.isfinite(converted).all():
        raise PlanError(f"{origin}: {np.abs(values).max():.6g} is beyond the largest F16 number. Write this model as a float32 graph.")
    return converted


def float_rows(weight: LazyTensor, dtype: ir.DataType) -> Iterator[Array]:
    """Values in the graph's float type, some rows at a time."""
    for start, stop in row_spans(weight):
        yield as_float_type(weight.decode(start, stop), dtype, weight.origin)


def columns(weight: LazyTensor, dtype: npt.DTypeLike, convert: Callable[[Floats, int, int], Array]) -> Iterator[Array]:
    """Rows of the transpose, (some columns, n_rows), in order. convert(values, row, column): of a rectangle whose corner is there.

    Every piece goes over the whole weight; what is read is cut to the piece's columns before the next rows.
    """
    width = max(1, CHUNK_BYTES // (4 * weight.n_rows))
    for first in range(0, weight.n_cols, width):
        last = min(first + width, weight.n_cols)
        piece = np.empty((last - first, weight.n_rows), dtype=dtype)
        for start, stop in row_spans(weight):
            piece[:, start:stop] = convert(_rectangle(weight, start, stop, first, last), start, first).T
        yield piece


def float_columns(weight: LazyTensor, dtype: ir.DataType) -> Iterator[Array]:
    """Rows of the transpose in the graph's float type."""
    return columns(weight, FLOAT_TYPES[dtype], lambda values, *_: as_float_type(values, dtype, weight.origin))


def _rectangle(weight: LazyTensor, start: int, stop: int, first: int, last: int) -> Floats:
    """Some columns of some rows, decoding no more than these where values are packed one by one."""
    grid = weight.grid
    if not grid.is_float:
        return weight.decode(start, stop)[:, first:last]
    packed = weight.packed(start, stop)[:, first * grid.block_bytes : last * grid.block_bytes]
    return grid.decode(np.ascontiguousarray(packed), last - first)
