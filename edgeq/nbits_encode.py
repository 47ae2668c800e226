"""Rounding floats to blocks of 2, 4 or 8 bits, with scales (and zero points) that lose least.

For a block of values x with weights w, codes q and a zero point z, the scale that loses least is d = sum w x (q - z) / sum w (q - z)^2, and
the loss then is sum w x^2 - (sum w x (q - z))^2 / sum w (q - z)^2. Codes are tried for a number of ranges, from a little more than the
block's own to well within it, where outliers are clipped and all others gain; the best range's scale is rounded to the type it is stored
in, and codes are made once more for that scale.

Ranges are relative to that of round-to-nearest: symmetric blocks put the value of largest magnitude on the lowest code, so that it is hit
exactly (as Q4_0 of ggml and ONNX Runtime's default do), asymmetric ones span least and greatest value, zero included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeq.errors import PlanError
from edgeq.group_grids import GroupGrid
from edgeq.nbits import run_length
from edgeq.tensors import Bytes, Floats

_CHUNK_VALUES = 1 << 16  # stays in the cache through all tries
# Twice as many ranges would lose 0.4 % less with 4 bits; other zero points beside the one of
# round-to-nearest, three times the work, gain no more. With 8 bits a step is so fine that clipping hardly pays.
_RANGES = {
    2: tuple(np.linspace(0.4, 1.15, 16)),
    4: tuple(np.linspace(0.75, 1.15, 9)),
    8: (0.98, 0.985, 0.99, 0.995, 1.0, 1.004, 1.008),
}
_TINY = np.finfo(np.float32).tiny


def encode(values: Floats, grid: GroupGrid, importance: Floats | None = None, *, origin: str = "values") -> Bytes:
    """Finite float32 (n_rows, n_cols) to packed rows of a grid that `edgeq.nbits.nbits_grid` made: uint8 (n_rows, row_bytes).

    importance: of the columns, positive float32 (n_cols,), or None. Raises PlanError when a scale does not fit the type it is stored in.
    """
    n_rows, n_cols = values.shape
    size = run_length(grid)
    assert size is not None and not grid.table and grid.scale in ("F16", "F32"), f"{grid.name} is not a grid to encode to"
    n_groups = -(-n_cols // size)
    fill = n_groups * size - n_cols
    weights = None if importance is None else np.pad(importance, (0, fill)).reshape(n_groups, size)
    packed = np.empty((n_rows, grid.row_bytes(n_cols)), dtype=np.uint8)
    rows = max(1, _CHUNK_VALUES // n_cols)
    for start in range(0, n_rows, rows):
        part = values[start : start + rows]
        blocks = np.pad(part, ((0, 0), (0, fill))).reshape(len(part), n_groups, size)
        with np.errstate(over="ignore", invalid="ignore"):
            found = _search(blocks, weights, grid, origin)
        codes = found.codes.reshape(len(part), -1)[:, :n_cols]
        packed[start : start + rows] = grid.pack(codes, found.scales, None if grid.zero == "" else found.zeros)
    return packed


@dataclass
class _Best:
    """codes (rows, groups, size) uint8; scales (rows, groups) in their stored type; zeros (rows, groups) uint8."""

    codes: Bytes
    scales: npt.NDArray[np.floating]
    zeros: Bytes


def _search(blocks: Floats, weights: Floats | None, grid: GroupGrid, origin: str) -> _Best:
    most = (1 << grid.code_bits) - 1
    best_gain = np.full(blocks.shape[:2], -1, dtype=np.float32)
    best_scale, best_zero = np.zeros_like(best_gain), np.full_like(best_gain, grid.center)
    weighted = blocks if weights is None else blocks * weights
    for scale, zero in _starts(blocks, grid, most):
        steps = _steps(blocks, scale, zero, most)
        along = np.einsum("rgi,rgi->rg", weighted, steps)
        square = np.einsum("rgi,rgi->rg", steps, steps if weights is None else steps * weights)
        fitted = np.divide(along, square, out=np.zeros_like(along), where=square > 0)
        gain = fitted * along
        better = gain > best_gain
        best_gain[better], best_scale[better], best_zero[better] = gain[better], fitted[better], zero[better]
    stored: npt.NDArray[np.floating] = best_scale.astype(np.float16 if grid.scale == "F16" else np.float32)
    if not np.isfinite(stored).all():
        largest = np.abs(blocks).max()
        raise PlanError(f"{origin}: values up to {largest:.6g} overflow the block scales of {grid.name}. Use F32 for this tensor.")
    codes = _steps(blocks, stored.astype(np.float32), best_zero, most) + best_zero[..., None]
    return _Best(codes.astype(np.uint8), stored, best_zero.astype(np.uint8))


def _starts(blocks: Floats, grid: GroupGrid, most: int) -> Iterator[tuple[Floats, Floats]]:
    """Scales and zero points to try, (rows, groups)."""
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    if grid.zero == "":
        center = np.full_like(low, grid.center)
        widest = np.where(-low >= high, low, high) / -center  # signed: the largest magnitude is on the lowest code
        for r in _RANGES[grid.code_bits]:
            yield widest * np.float32(r), center
        return
    widest = (high - low) / np.float32(most)
    zero = np.rint(np.divide(-low, widest, out=np.zeros_like(low), where=widest > _TINY))
    for r in _RANGES[grid.code_bits]:
        yield widest * np.float32(r), zero


def _steps(blocks: Floats, scale: Floats, zero: Floats, most: int) -> Floats:
    """Nearest codes less the zero point, as floats."""
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=np.abs(scale) > _TINY)
    steps = blocks * inverse[..., None]
    np.rint(steps, out=steps)
    return np.clip(steps, -zero[..., None], most - zero[..., None], out=steps)
