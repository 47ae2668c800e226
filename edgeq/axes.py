"""What can be done along one axis of one tensor, as values that know neither model nor tensor.

    Take      places are moved, left out, or both
    Multiply  every place is multiplied by a number of its own
    Mix       runs of places, one behind the other, are multiplied by a matrix each

`edgeq.transforms` says which of them belongs on which axis. A weight is (n_out, n_in): its rows are places of its output, its columns
places of its input. What is done to a weight's rows is done to a bias, and to the rows of an adapter's B; what is done to its columns,
to the columns of an adapter's A. So there is one function for arrays (`along`) and one for each axis of lazy tensors (`rows`, `columns`):
rows that are taken whole stay packed in their grid, anything else comes back as float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import ShapeError
from edgeq.grids import F32
from edgeq.tensors import Bytes, LazyTensor, map_values, take_rows

Index = npt.NDArray[np.intp]
Values = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Take:
    """New place i is old place index[i]."""

    index: Index


@dataclass(frozen=True)
class Multiply:
    """New place i is factors[i] times the old one."""

    factors: Values


@dataclass(frozen=True)
class Mix:
    """Run r of d places, as a vector, is multiplied by matrices[r] (d, d)."""

    matrices: Values


AxisMap = Take | Multiply | Mix


def along(values: Values, axis: int, move: AxisMap) -> Values:
    """An array with `move` done along one axis, in the array's own precision.

    Raises ShapeError when the axis has another length than the move.
    """
    _check_length(values.shape[axis], move, "the axis")
    if isinstance(move, Take):
        return np.take(values, move.index, axis=axis)
    last = np.moveaxis(values, axis, -1)
    if isinstance(move, Multiply):
        moved = last * move.factors.astype(values.dtype)
    else:
        runs = last.reshape(-1, len(move.matrices), move.matrices.shape[1]).swapaxes(0, 1)  # (runs, others, d)
        mixed = runs @ move.matrices.astype(values.dtype).swapaxes(1, 2)
        moved = mixed.swapaxes(0, 1).reshape(last.shape)
    return np.ascontiguousarray(np.moveaxis(moved, -1, axis))


def rows(tensor: LazyTensor, move: AxisMap) -> LazyTensor:
    """A matrix whose rows, or a vector whose values, are moved. Rows stay in their grid when they are taken. Raises ShapeError."""
    _check_length(tensor.shape[0], move, tensor.origin)
    if isinstance(move, Take):
        return take_rows(tensor, move.index)
    if len(tensor.shape) == 1:
        return map_values(tensor, lambda values: along(values, 0, move))

    def read(start: int, stop: int) -> Bytes:
        if isinstance(move, Multiply):
            values = along(tensor.decode(start, stop), 0, Multiply(move.factors[start:stop]))
        else:
            size = move.matrices.shape[1]
            first, last = start // size, -(-stop // size)  # runs that the rows lie in
            run = along(tensor.decode(first * size, last * size), 0, Mix(move.matrices[first:last]))
            values = run[start - first * size : stop - first * size]
        return np.ascontiguousarray(values).view(np.uint8)

    return LazyTensor(shape=tensor.shape, grid=F32, read=read, origin=tensor.origin)


def columns(tensor: LazyTensor, move: AxisMap) -> LazyTensor:
    """A matrix whose columns are moved, as float32: blocks of a grid lie along rows and would be torn apart. Raises ShapeError."""
    if len(tensor.shape) != 2:
        raise ShapeError(f"{tensor.origin}: shape {list(tensor.shape)} has no columns to move")
    _check_length(tensor.n_cols, move, tensor.origin)
    n_cols = len(move.index) if isinstance(move, Take) else tensor.n_cols
    return map_values(tensor, lambda values: along(values, 1, move), shape=(tensor.n_rows, n_cols))


def _check_length(n: int, move: AxisMap, what: str) -> None:
    if isinstance(move, Take):
        if len(move.index) and not 0 <= move.index.min() <= move.index.max() < n:
            raise ShapeError(f"{what}: places {move.index.min()} to {move.index.max()} are asked for, there are {n}")
        return
    expected = len(move.factors) if isinstance(move, Multiply) else move.matrices.shape[0] * move.matrices.shape[1]
    if n != expected:
        raise ShapeError(f"{what}: {n} places, but the change is one of {expected}")
