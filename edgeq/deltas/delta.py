"""Adapters as functions of a base weight.

A Delta knows one tensor it fits and turns that tensor's values into adapted ones: `apply(weight, base)`. Everything is float64
numpy, shapes are edgeq's canonical ones ((n_out, n_in) for matrices, (n,) for vectors). Two exact views may exist besides:
`factors` (low rank: A and B with every scale folded in) and `sparse` (positions and what is added there).

Order matters to kinds that multiply. As in PEFT, several deltas on one tensor are applied one after the other, each to the result
so far (`weight`), while whatever a kind derives from the model it was trained on (DoRA's norms, HiRA's product, singular vectors)
comes from the untouched tensor (`base`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeq.errors import ShapeError

Array = npt.NDArray[np.float64]
AnyFloats = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]


@dataclass(frozen=True, kw_only=True, eq=False)
class Factors:
    """A change b @ a that is exact: a (rank, n_in), b (n_out, rank)."""

    a: Array
    b: Array

    @property
    def rank(self) -> int:
        return len(self.a)

    def product(self) -> Array:
        return self.b @ self.a


@dataclass(frozen=True, kw_only=True, eq=False)
class Sparse:
    """A change that touches few elements: `values` is added at (rows, cols). Positions are distinct."""

    rows: Indices
    cols: Indices
    values: Array


class Delta(ABC):
    """One adapter on one tensor. Kinds without an exact view return None for it and can only be merged."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the base tensor this fits."""

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape after `apply`; differs from `shape` only where rows are added (resized embeddings)."""
        return self.shape

    @abstractmethod
    def apply(self, weight: Array, base: Array | None = None) -> Array:
        """The adapted tensor. base: the untouched tensor, when others have changed `weight` already. Arguments stay as they are."""

    def factors(self, base: Array | None = None) -> Factors | None:
        """The change as low-rank factors, if it has a rank below both dimensions. Some kinds need the base to say."""
        return None

    def sparse(self, base: Array | None = None) -> Sparse | None:
        return None

    def rows(self, start: int, stop: int) -> Delta | None:
        """The same adapter on rows start..stop of the tensor alone; None where a row depends on others."""
        return None


class Additive(Delta):
    """A change that does not depend on the weight it is added to."""

    @abstractmethod
    def change(self) -> Array:
        """What is added, of shape `shape`."""

    def apply(self, weight: Array, base: Array | None = None) -> Array:
        return weight + self.change()


@dataclass(frozen=True, eq=False)
class Change(Additive):
    """Values to add, spelled out: trained biases of the adapter itself."""

    values: AnyFloats

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def change(self) -> Array:
        return self.values.astype(np.float64)

    def rows(self, start: int, stop: int) -> Delta:
        return Change(self.values[start:stop])


@dataclass(frozen=True, eq=False)
class ChangeRows(Additive):
    """Rows start..stop of a change that is made as a whole, each time it is asked for."""

    whole: Additive
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.whole.shape[1:])

    def change(self) -> Array:
        return self.whole.change()[self.start : self.stop]


@dataclass(frozen=True, eq=False)
class Then(Delta):
    """One delta after another, as a single one: a module saved with an adapter, and the adapter on it."""

    first: Delta
    second: Delta

    @property
    def shape(self) -> tuple[int, ...]:
        return self.first.shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.second.out_shape

    def apply(self, weight: Array, base: Array | None = None) -> Array:
        return self.second.apply(self.first.apply(weight, base))

    def rows(self, start: int, stop: int) -> Delta | None:
        one, two = self.first.rows(start, stop), self.second.rows(start, stop)
        return None if one is None or two is None else Then(one, two)


@dataclass(frozen=True, eq=False)
class Replace(Delta):
    """Another tensor instead of the base's: whole modules saved with an adapter, trained biases, resized embeddings.

    base_shape: what it replaces; rows may have been added.
    """

    values: AnyFloats
    base_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.values.shape) != len(self.base_shape) or self.values.shape[1:] != self.base_shape[1:]:
            raise ShapeError(f"a tensor of shape {list(self.values.shape)} cannot replace one of shape {list(self.base_shape)}")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base_shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.values.shape

    def apply(self, weight: Array, base: Array | None = None) -> Array:
        return self.values.astype(np.float64)

    def rows(self, start: int, stop: int) -> Delta | None:
        return Replace(self.values[start:stop], (stop - start, *self.base_shape[1:])) if self.values.shape == self.base_shape else None


@dataclass(frozen=True, eq=False)
class SetRows(Delta):
    """Rows `index` replaced by `values` (k, n): trainable tokens."""

    index: Indices
    values: AnyFloats
    base_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.index), *self.base_shape[1:]):
            raise ShapeError(f"{len(self.index)} rows of {self.base_shape[1]} values were promised, {list(self.values.shape)} came")
        if len(self.index) and not 0 <= int(self.index.min()) <= int(self.index.max()) < self.base_shape[0]:
            raise ShapeError(f"rows {int(self.index.min())} to {int(self.index.max())} are not all within {self.base_shape[0]} rows")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base_shape

    def apply(self, weight: Array, base: Array | None = None) -> Array:
        result = weight.copy()
        result[self.index] = self.values
        return result

    def sparse(self, base: Array | None = None) -> Sparse | None:
        if base is None:
            return None
        n = self.base_shape[1]
        rows, cols = np.repeat(self.index, n), np.tile(np.arange(n), len(self.index))
        return Sparse(rows=rows, cols=cols, values=(self.values - base[self.index]).reshape(-1))

    def rows(self, start: int, stop: int) -> Delta | None:
        inside = (self.index >= start) & (self.index < stop)
        return SetRows(self.index[inside] - start, self.values[inside], (stop - start, *self.base_shape[1:]))


@dataclass(frozen=True, eq=False)
class Part(Delta):
    """Rows start..stop of what `whole` does to a fused matrix that the model has in pieces.

    names: the pieces in order, canonical tensor names. Its `base` is the whole matrix, the pieces joined.
    """

    whole: Delta
    start: int
    stop: int
    names: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.whole.shape[1:])

    def apply(self, weight: Array, base: Array | None = None) -> Array:
        if base is None or base.shape != self.whole.shape:
            raise ShapeError(
                f"rows {self.start} to {self.stop} of {', '.join(self.names)} follow from all of them: pass them joined as base"
            )
        return weight + (self.whole.apply(base) - base)[self.start : self.stop]


def split_rows(delta: Delta, pieces: tuple[tuple[str, int], ...]) -> dict[str, Delta]:
    """A delta on a fused matrix as one per piece. pieces: canonical name and rows of each, in order."""
    if len(pieces) == 1:
        return {pieces[0][0]: delta}
    names, start = tuple(name for name, _ in pieces), 0
    parts: dict[str, Delta] = {}
    for name, n_rows in pieces:
        stop = start + n_rows
        rows = delta.rows(start, stop)
        if rows is None:
            rows = ChangeRows(delta, start, stop) if isinstance(delta, Additive) else Part(delta, start, stop, names)
        parts[name] = rows
        start = stop
    return parts


def f64(values: AnyFloats) -> Array:
    return np.asarray(values, dtype=np.float64)


def need_shape(what: str, values: npt.NDArray[np.generic], shape: tuple[int, ...]) -> None:
    if values.shape != shape:
        raise ShapeError(f"{what} has shape {list(values.shape)}, expected {list(shape)}")


def low_rank(a: Array, b: Array) -> Factors | None:
    """Factors, unless their rank is no lower than the matrix's dimensions."""
    return Factors(a=a, b=b) if len(a) < min(b.shape[0], a.shape[1]) else None
