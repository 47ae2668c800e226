"""Encoding float rows into ggml block types with ggml's own code (`edgeq.ggml`), and into groups of other sizes, in parallel.

That code releases the GIL, so a pool of threads keeps every core busy. Rows are independent of each other in every grid, therefore neither
the number of threads nor the chunking changes a byte.

Importance is one weight per column: the mean square of the inputs that column meets (`imatrix` in llama.cpp). ggml's encoders choose
block scales that minimise the weighted squared error; Q8_0 and MXFP4 ignore it.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from edgeq import ggml, nbits_encode
from edgeq.errors import PlanError, ShapeError, SourceError
from edgeq.grids import Grid
from edgeq.group_grids import GroupGrid, recode, recodes
from edgeq.tensors import Bytes, Floats, LazyTensor, check_finite

FLOAT_BYTES_IN_FLIGHT = 64 << 20  # float32 values being encoded at one time, over all threads
COPY_BYTES = 16 << 20
# A column that calibration never saw still counts this much of the mean: zeros would make whole blocks arbitrary.
_LEAST_IMPORTANCE = 1e-6


@dataclass(frozen=True)
class RegridError:
    """What encoding lost, as sums over values x and their decoded codes y, so that parts add up.

    squared: sum (x-y)^2; norm: sum x^2; the weighted ones carry each column's importance (1 when there is none).
    """

    squared: float
    norm: float
    weighted_squared: float
    weighted_norm: float

    @property
    def relative(self) -> float:
        """Squared error relative to the squared norm."""
        return self.squared / self.norm if self.norm else 0.0

    @property
    def weighted_relative(self) -> float:
        return self.weighted_squared / self.weighted_norm if self.weighted_norm else 0.0

    def __add__(self, other: RegridError) -> RegridError:
        return RegridError(
            self.squared + other.squared,
            self.norm + other.norm,
            self.weighted_squared + other.weighted_squared,
            self.weighted_norm + other.weighted_norm,
        )


@dataclass(frozen=True)
class Chunk:
    """Consecutive encoded rows, uint8 (rows, row_bytes), and what encoding them lost (None unless measured)."""

    packed: Bytes
    error: RegridError | None


def encode_rows(values: Floats, grid: Grid, importance: Floats | None = None, *, origin: str = "values") -> Bytes:
    """float32 (n_rows, n_cols) to packed rows, uint8 (n_rows, grid.row_bytes(n_cols)).

    importance: (n_cols,), or None. Raises SourceError when a value is not finite, PlanError when one does not fit the grid,
    ShapeError when the widths disagree, UnsupportedError for grids ggml cannot encode by itself, MissingDependency without the
    llama library.
    """
    if values.ndim != 2:
        raise ShapeError(f"{origin}: shape {list(values.shape)} is not a matrix of rows")
    weights = None if importance is None else usable_importance(importance, values.shape[1], origin=origin)
    return _encode(np.ascontiguousarray(values, dtype=np.float32), grid, weights, origin)


def _encode(values: Floats, grid: Grid, weights: Floats | None, origin: str) -> Bytes:
    """encode_rows with importance that is usable already."""
    grid.row_bytes(values.shape[1])  # a width that does not fit is the first thing to say
    check_finite(values, origin=origin)
    if isinstance(grid, GroupGrid):
        return nbits_encode.encode(values, grid, weights, origin=origin)
    return ggml.encode(values, grid, weights, origin=origin)


def _recode(packed: Bytes, values: Floats, source: GroupGrid, grid: Grid, origin: str) -> Bytes:
    """Rows of a quantized checkpoint with the codes they have: nothing is lost but what F16 cannot hold of scales and minima."""
    check_finite(values, origin=origin)
    blocks = recode(packed, source, grid)
    ggml.check_blocks(blocks, values, grid, origin)
    return blocks


def encode_tensor(
    tensor: LazyTensor, grid: Grid, importance: Floats | None = None, *, threads: int | None = None, measure: bool = False
) -> Iterator[Chunk]:
    """Encode a tensor in chunks of rows, in order; at most FLOAT_BYTES_IN_FLIGHT of float32 values (or one row per thread) at a time.

    threads: None means one per core that this process may use. measure: also decode what was encoded and report the error. Codes of a
    quantized checkpoint that the grid can hold are kept, whatever the importance. Raises as `encode_rows`, naming the tensor.
    """
    n_threads = threads or usable_cores()
    n_cols = tensor.n_cols
    weights = None if importance is None else usable_importance(importance, n_cols, origin=tensor.origin)
    rows = max(1, FLOAT_BYTES_IN_FLIGHT // (4 * n_cols * (n_threads + 1)))
    # Small tensors are split too, as long as a piece is worth a thread.
    rows = min(rows, max(-(-tensor.n_rows // n_threads), -(-65536 // n_cols)))

    def encode(start: int) -> Chunk:
        stored = tensor.packed(start, min(start + rows, tensor.n_rows))
        values = tensor.grid.decode(stored, n_cols)
        if isinstance(tensor.grid, GroupGrid) and recodes(tensor.grid, grid):
            packed = _recode(stored, values, tensor.grid, grid, tensor.origin)
        else:
            packed = _encode(values, grid, weights, tensor.origin)
        return Chunk(packed, _regrid_error(values, packed, grid, weights) if measure else None)

    starts = range(0, tensor.n_rows, rows)
    if n_threads == 1 or len(starts) == 1:
        yield from map(encode, starts)
        return
    with ThreadPoolExecutor(n_threads) as pool:
        waiting: deque[Future[Chunk]] = deque()
        try:
            for start in starts:
                waiting.append(pool.submit(encode, start))
                if len(waiting) > n_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def copy_tensor(tensor: LazyTensor) -> Iterator[Bytes]:
    """Packed rows as they are. Raises SourceError when a value, or the scale of a block, is not finite."""
    rows = max(1, COPY_BYTES // tensor.row_bytes)
    for start in range(0, tensor.n_rows, rows):
        packed = np.ascontiguousarray(tensor.packed(start, min(start + rows, tensor.n_rows)))
        if tensor.grid.is_float:
            check_finite(tensor.grid.decode(packed, tensor.n_cols), origin=tensor.origin)
        elif not ggml.is_sound(packed, tensor.grid):
            raise SourceError(f"{tensor.origin}: a block scale in {tensor.grid.name} is NaN or infinite. Fetch the model again.")
        yield packed


def usable_importance(importance: Floats, n_cols: int, *, origin: str) -> Floats | None:
    """Importance as ggml can use it: finite, positive, float32 (n_cols,). None (all columns alike) when every entry is zero.

    Raises ShapeError for the wrong length and PlanError for negative or non-finite entries.
    """
    weights = np.asarray(importance)
    if weights.shape != (n_cols,):
        raise ShapeError(f"{origin}: importance has shape {list(weights.shape)}, expected [{n_cols}], one entry per column")
    if not np.isfinite(weights).all() or (weights < 0).any():
        worst = int(np.argmin(np.where(np.isfinite(weights), weights, -np.inf)))
        raise PlanError(
            f"{origin}: importance of column {worst} is {weights[worst]}, expected a finite number >= 0. Calibrate again with another text."
        )
    mean = float(weights.mean(dtype=np.float64))
    if mean == 0:
        return None
    # Only ratios count. A power of two changes no bit of ggml's choices and keeps its float32 sums from running over or under.
    raised = np.maximum(weights.astype(np.float64), _LEAST_IMPORTANCE * mean)
    return np.ldexp(raised, -math.frexp(mean)[1]).astype(np.float32)


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _regrid_error(values: Floats, packed: Bytes, grid: Grid, weights: Floats | None) -> RegridError:
    decode = grid.decode if isinstance(grid, GroupGrid) else partial(ggml.decode, grid=grid)
    lost = values - decode(packed, n_cols=values.shape[1])
    squared = np.einsum("ij,ij->j", lost, lost, dtype=np.float64)
    norm = np.einsum("ij,ij->j", values, values, dtype=np.float64)
    w = np.ones(len(norm)) if weights is None else weights.astype(np.float64)
    return RegridError(float(squared.sum()), float(norm.sum()), float(squared @ w), float(norm @ w))
