"""Moving codes within their blocks: quantized rows changed a little without rounding all of them again.

A quantized value is code * step + start, where step and start belong to a block. Adding something small to it moves its code by that many
steps, rounded; scales stay, and so does every code that what is added does not move. Packing the sums anew would add a second rounding
error, as large as the first, to every value. That is for grids of few codes; with 8 bits a second rounding costs nothing, while values at
the end of a block's range, which a new scale would make room for, cannot move outwards. Block layouts: ggml-common.h of llama.cpp.

What is added to a matrix is seldom as large as a step, and rounding passes no move of less than half of one. `gains` says by how much to
overstate moves so that rounding passes all of them on average.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from edgeq.errors import UnsupportedError
from edgeq.grids import Grid
from edgeq.tensors import Bytes, Floats

Codes = npt.NDArray[np.int8]
_LOW_NIBBLES, _FOUR = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(4)
_MOST_GAIN = 2.0  # beyond it little is passed on whatever is done, and noise grows


@dataclass(frozen=True)
class _Layout:
    """How codes lie in a block: a value is (code - zero) * step + start. high: greatest code, as stored; the least is 0.

    per_step: values that share a step. unpack: block bytes (n, block_bytes) to codes (n, block_size). pack: codes into block bytes.
    steps: (n, steps of a block). starts: likewise, or None where they are 0.
    """

    high: int
    zero: int
    per_step: int
    unpack: Callable[[Bytes], Codes]
    pack: Callable[[Bytes, Codes], None]
    steps: Callable[[Bytes], Floats]
    starts: Callable[[Bytes], Floats] | None = None


def movable(grid: Grid) -> bool:
    return grid.name in _LAYOUTS


def row_steps(packed: Bytes, grid: Grid) -> Floats:
    """Distance of neighbouring codes, with its sign, for packed rows (n_rows, row_bytes): (n_rows, steps of a row)."""
    blocks = packed.reshape(-1, grid.block_bytes)
    return _layout(grid).steps(blocks).reshape(len(packed), -1)


def decoded(packed: Bytes, grid: Grid, steps: Floats) -> Floats:
    """Packed rows and their steps as values, float32 (n_rows, n_cols): as Grid.decode, without a library."""
    layout, blocks = _layout(grid), packed.reshape(-1, grid.block_bytes)
    values = layout.unpack(blocks).reshape(len(packed), -1, layout.per_step).astype(np.float32)
    if layout.zero:
        values -= layout.zero
    values *= steps[..., None]
    if layout.starts is not None:
        values += layout.starts(blocks).reshape(steps.shape)[..., None]
    return values.reshape(len(packed), -1)


def moved(packed: Bytes, grid: Grid, steps: Floats, moves: Floats) -> Bytes:
    """Packed rows with every value changed by what rounding leaves of `moves` (n_rows, n_cols), which is overwritten.

    steps: of these rows, as `row_steps` has them. Codes at the end of their range stay there.
    """
    layout, result = _layout(grid), packed.copy()
    blocks = result.reshape(-1, grid.block_bytes)
    inverse = np.divide(1, steps, out=np.zeros_like(steps), where=steps != 0)
    by_step = moves.reshape(len(moves), -1, layout.per_step)
    by_step *= inverse[..., None]
    np.rint(moves, out=moves)
    np.clip(moves, -layout.high, layout.high, out=moves)
    codes = layout.unpack(blocks)
    codes += moves.astype(np.int8).reshape(codes.shape)
    np.clip(codes, 0, layout.high, out=codes)
    layout.pack(blocks, codes)
    return result


def gains(sizes: Floats) -> Floats:
    """By how much to overstate moves of these sizes, in steps (root mean square), so that rounding passes all of them on average.

    For moves x of a normal distribution of deviation r, rounding passes E[x round(g x)] / E[x^2] = 2 / r * sum phi((k - 1/2) / (g r)) of
    them, k = 1, 2, ...; g solves for 1. It is 1 for large moves and grows as they become small, up to 2.
    """
    at, gain = _gain_table()
    return np.interp(sizes, at, gain).astype(np.float32)


@lru_cache(maxsize=1)
def _gain_table() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    halves = np.arange(1, 21, 2) / 2
    g, r = np.linspace(0.96, _MOST_GAIN, 53), np.linspace(0.12, 1.6, 75)
    passed = 2 / r[:, None] * np.exp(-0.5 * (halves / (g[:, None] * r[:, None, None])) ** 2).sum(2) / np.sqrt(2 * np.pi)
    return r, np.where(r < 1, g[np.argmin(np.abs(passed - 1), axis=1)], 1)


def _layout(grid: Grid) -> _Layout:
    try:
        return _LAYOUTS[grid.name]
    except KeyError:
        raise UnsupportedError(f"codes of {grid.name} cannot be moved in place; known: {', '.join(_LAYOUTS)}") from None


def _half(start: int) -> Callable[[Bytes], Floats]:
    """The F16 at byte `start` of every block."""
    return lambda blocks: np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def _nibbles(start: int) -> tuple[Callable[[Bytes], Codes], Callable[[Bytes, Codes], None]]:
    """Codes 0..15 in 16 bytes from `start`: value j and value j + 16 share byte j. Eight of them at a time, as one number."""

    def unpack(blocks: Bytes) -> Codes:
        packed = np.ascontiguousarray(blocks[:, start : start + 16]).view(np.uint64)
        codes = np.empty((len(blocks), 4), dtype=np.uint64)
        for j in range(2):
            np.bitwise_and(packed[:, j], _LOW_NIBBLES, out=codes[:, j])
            np.bitwise_and(packed[:, j] >> _FOUR, _LOW_NIBBLES, out=codes[:, j + 2])
        return codes.view(np.int8)

    def pack(blocks: Bytes, codes: Codes) -> None:
        halves = codes.view(np.uint64)
        packed = np.empty((len(blocks), 2), dtype=np.uint64)
        for j in range(2):
            np.bitwise_or(halves[:, j], halves[:, j + 2] << _FOUR, out=packed[:, j])
        blocks[:, start : start + 16] = packed.view(np.uint8)

    return unpack, pack


def _nibbles_and_bits(start: int) -> tuple[Callable[[Bytes], Codes], Callable[[Bytes, Codes], None]]:
    """Codes 0..31: fifth bits in 4 bytes from `start`, value by value, then nibbles as above."""
    unpack_nibbles, pack_nibbles = _nibbles(start + 4)

    def unpack(blocks: Bytes) -> Codes:
        fifth = np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little")
        return unpack_nibbles(blocks) + (fifth.view(np.int8) << 4)

    def pack(blocks: Bytes, codes: Codes) -> None:
        blocks[:, start : start + 4] = np.packbits(codes >> 4, axis=1, bitorder="little")
        pack_nibbles(blocks, codes & np.int8(15))

    return unpack, pack


_LAYOUTS = {
    "Q4_0": _Layout(15, 8, 32, *_nibbles(2), _half(0)),
    "Q4_1": _Layout(15, 0, 32, *_nibbles(4), _half(0), _half(2)),
    "Q5_0": _Layout(31, 16, 32, *_nibbles_and_bits(2), _half(0)),
    "Q5_1": _Layout(31, 0, 32, *_nibbles_and_bits(4), _half(0), _half(2)),
}
