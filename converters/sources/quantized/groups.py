"""From a method's codes, scales and zero points to a lazy tensor in the grid that holds them exactly.

Where a ggml grid is the same grid, the tensor is in that one, so that an export to it copies codes: Q4_0 for up to 4 bits around a fixed
zero point, Q8_0 for 8 bits around theirs, Q4_1 for other zero points; each only when F16 holds every scale (and minimum) of the tensor.
To know that, scales and zero points are read when the model is opened, up to the first that does not fit; codes are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import SourceError
from edgeq.grids import grid
from edgeq.group_grids import as_numbers, group_grid, is_exact, recoded, recodes
from edgeq.tensors import Bytes, LazyTensor

Rows = Callable[[int, int], npt.NDArray[Any]]
_SCAN_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class Groups:
    """A quantized weight (n_out, n_in) that is read row by row.

    codes(start, stop): uint8 (rows, n_in). scales, zeros: (rows, groups) as stored in the types `scale` and `zero`; zeros is None where
    they are `center`. group: of each column, int32 (n_in,). name: of the grid, as people call it.
    """

    name: str
    shape: tuple[int, int]
    code_bits: int
    codes: Rows
    scales: Rows
    scale: str
    group: npt.NDArray[np.int32]
    zeros: Rows | None = None
    zero: str = ""
    center: int = 0
    table: str = ""
    origin: str


def even_groups(n_in: int, size: int) -> npt.NDArray[np.int32]:
    """Group of each column when they are runs of `size`, the last one perhaps shorter."""
    return np.arange(n_in, dtype=np.int32) // np.int32(size)


def as_tensor(groups: Groups) -> LazyTensor:
    """Lazy tensor of the weight. Raises SourceError when a column belongs to no group."""
    n_groups = groups.scales(0, 1).shape[1]
    if groups.group.min() < 0 or groups.group.max() >= n_groups:
        raise SourceError(
            f"{groups.origin}: columns belong to groups {groups.group.min()} to {groups.group.max()}, but there are {n_groups}. "
            "Download the model again."
        )
    groups = _with_fixed_zero(groups)
    n_in = groups.shape[1]
    size = n_in // n_groups
    runs = n_in % n_groups == 0 and size > 1 and np.array_equal(groups.group, even_groups(n_in, size))
    kind = group_grid(
        groups.name,
        code_bits=groups.code_bits,
        block_size=size if runs else n_in,
        scale=groups.scale,
        zero=groups.zero,
        center=groups.center,
        table=groups.table,
        order=None if runs else groups.group,
    )
    used = n_groups if runs else int(groups.group.max()) + 1

    def read(start: int, stop: int) -> Bytes:
        if stop <= start:
            return np.empty((0, kind.row_bytes(n_in)), dtype=np.uint8)
        zeros = None if groups.zeros is None else groups.zeros(start, stop)[:, :used]
        return kind.pack(groups.codes(start, stop), groups.scales(start, stop)[:, :used], zeros)

    tensor = LazyTensor(shape=groups.shape, grid=kind, read=read, origin=groups.origin)
    for target in map(grid, ("Q4_0", "Q4_1") if groups.code_bits <= 4 else ("Q8_0",)):
        if recodes(kind, target) and all(is_exact(scales, zeros, target) for scales, zeros in _numbers(groups)):
            return recoded(tensor, target)
    return tensor


def _with_fixed_zero(groups: Groups) -> Groups:
    """The same with its zero points as a constant when all of them are the same whole number."""
    if groups.zeros is None or groups.zero != "U8":
        return groups
    first = int(groups.zeros(0, 1)[0, 0])
    if any((groups.zeros(start, stop) != first).any() for start, stop in _spans(groups)):
        return groups
    return replace(groups, zeros=None, zero="", center=first)


def _numbers(groups: Groups) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Scales and zero points of all rows, some rows at a time."""
    for start, stop in _spans(groups):
        scales = as_numbers(groups.scales(start, stop), groups.scale)
        if groups.zeros is None:
            yield scales, np.full(scales.shape, groups.center)
        else:
            yield scales, as_numbers(groups.zeros(start, stop), groups.zero)


def _spans(groups: Groups) -> Iterator[tuple[int, int]]:
    """Ranges of rows: one row first, since most tensors that do not fit show it there."""
    n_rows = groups.shape[0]
    yield 0, 1
    yield from ((start, min(start + _SCAN_ROWS, n_rows)) for start in range(1, n_rows, _SCAN_ROWS))
