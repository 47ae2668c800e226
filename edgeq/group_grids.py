"""Grids of quantized checkpoints outside ggml: groups of codes that share a scale, as one packed row per output.

A group decodes to (code - zero point) * scale, or to table[code] * scale. Every method of `edgeq.converters.sources.quantized` brings its
tensors into this form row by row, so that taking, joining and slicing rows moves codes and never rounds a value. Where a ggml grid holds
the same values, `recode` writes its blocks with the codes as they are.

One block is one group: scale, zero point (where it is stored), then the codes from the low bits up. With `order` one block is a whole
row: the scales of all its groups, their zero points, then the codes; order tells the group of each column (GPTQ's act-order).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import ShapeError
from edgeq.grids import Grid
from edgeq.tensors import Bytes, LazyTensor

_NO_GGML_ID = -1


def _fp8(exponent_bits: int, mantissa_bits: int) -> npt.NDArray[np.float32]:
    """Value of every byte, sign first. E4M3 has no infinity and one NaN per sign, E5M2 follows IEEE (OCP FP8 specification 1.0)."""
    byte = np.arange(256)
    sign = np.where(byte >> 7, -1.0, 1.0)
    exponent, mantissa = (byte >> mantissa_bits) & ((1 << exponent_bits) - 1), byte & ((1 << mantissa_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    fraction = mantissa / (1 << mantissa_bits)
    values = sign * np.where(exponent == 0, np.ldexp(fraction, 1 - bias), np.ldexp(1 + fraction, exponent - bias))
    if mantissa_bits == 3:
        values[(byte & 0x7F) == 0x7F] = np.nan
    else:
        values[(exponent == 31) & (mantissa == 0)] *= np.inf
        values[(exponent == 31) & (mantissa > 0)] = np.nan
    return values.astype(np.float32)


# NF4: quantiles of the normal distribution (Dettmers et al. 2023, arXiv:2305.14314, appendix E). FP4: bitsandbytes' 1-2-1 bits, over 12.
_FP4_HALF = np.array([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0], dtype=np.float32) / np.float32(12)
# fmt: off
TABLES = {
    "nf4": np.array([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ], dtype=np.float32),
    "fp4": np.concatenate([_FP4_HALF, -_FP4_HALF]),
    "e4m3": _fp8(4, 3),
    "e5m2": _fp8(5, 2),
}
# fmt: on


@dataclass(frozen=True)
class GroupGrid(Grid):
    """code_bits per code. table: key of TABLES, or "" for codes that count steps from a zero point.

    scale: type of scales (F16, BF16, F32, F64). zero: type of stored zero points (U8, F16, BF16, F32), or "" where it is `center` in every
    group. Whole zero points are at most 2 ** code_bits. order: int32 group number of each column, as bytes; empty where groups are runs of
    `block_size` columns. Made by `group_grid`, which works out the size of a block.
    """

    code_bits: int
    table: str
    scale: str
    zero: str
    center: int
    order: bytes

    @property
    def is_float(self) -> bool:
        return False  # whatever the number of columns

    def _decode(self, packed: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        codes, scales, zeros = self.unpack(packed)
        if self.order:
            index = np.frombuffer(self.order, dtype="<i4")
            scales, zeros = scales[:, index], zeros[:, index]
        else:
            codes = codes.reshape(len(codes), -1, self.block_size)
            scales, zeros = scales[..., None], zeros[..., None]
        # float32 holds the table and every difference of whole numbers, so that the product is rounded once
        return (TABLES[self.table][codes] if self.table else codes - zeros) * scales

    def pack(self, codes: npt.NDArray[np.uint8], scales: npt.NDArray[Any], zeros: npt.NDArray[Any] | None) -> Bytes:
        """Rows of codes (n_rows, n_cols), with stored scales and zero points (n_rows, groups); BF16 as its 16 bits."""
        n_rows = len(codes)
        per_block = scales.shape[1] if self.order else 1
        parts = [_bytes_of(scales, self.scale, per_block)]
        if self.zero:
            assert zeros is not None
            parts.append(_bytes_of(zeros, self.zero, per_block))
        parts.append(_pack_codes(codes.reshape(-1, self.block_size), self.code_bits))
        return np.concatenate(parts, axis=1).reshape(n_rows, -1)

    def unpack(self, packed: Bytes) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any], npt.NDArray[Any]]:
        """Codes (n_rows, n_cols), scales and zero points (n_rows, groups), as numbers that multiply without a second rounding."""
        n_rows = len(packed)
        blocks = packed.reshape(-1, self.block_bytes)
        per_block = 1 + int(np.frombuffer(self.order, dtype="<i4").max()) if self.order else 1
        ends = np.cumsum([per_block * _STORED[self.scale].itemsize, per_block * _STORED[self.zero].itemsize if self.zero else 0])
        wide = self.scale == "F64" or self.zero in _FLOATS
        kind = np.float64 if wide else np.float32
        scales = as_numbers(np.ascontiguousarray(blocks[:, : ends[0]]).view(_STORED[self.scale]), self.scale).astype(kind)
        if self.zero:
            zeros = as_numbers(np.ascontiguousarray(blocks[:, ends[0] : ends[1]]).view(_STORED[self.zero]), self.zero).astype(kind)
        else:
            zeros = np.full((len(blocks), per_block), self.center, dtype=kind)
        codes = _unpack_codes(blocks[:, ends[1] :], self.code_bits, self.block_size)
        per_row = packed.shape[1] // self.block_bytes
        widths = (per_row * self.block_size, per_row * per_block)
        return codes.reshape(n_rows, widths[0]), scales.reshape(n_rows, widths[1]), zeros.reshape(n_rows, widths[1])


def group_grid(
    name: str,
    *,
    code_bits: int,
    block_size: int,
    scale: str,
    zero: str = "",
    center: int = 0,
    table: str = "",
    order: npt.NDArray[np.int32] | None = None,
) -> GroupGrid:
    """A grid of groups of `block_size` columns, or of rows of `block_size` columns whose groups `order` gives."""
    per_block = 1 if order is None else 1 + int(order.max())
    stored = _STORED[scale].itemsize + (_STORED[zero].itemsize if zero else 0)
    block_bytes = per_block * stored + -(-block_size * code_bits // 8)
    packed_order = b"" if order is None else order.astype("<i4").tobytes()
    return GroupGrid(name, _NO_GGML_ID, block_size, block_bytes, code_bits, table, scale, zero, center, packed_order)


def as_numbers(stored: npt.NDArray[Any], kind: str) -> npt.NDArray[Any]:
    """Stored values as numpy counts: BF16 comes as 16 bits, F8_E8M0 as an exponent, the rest as it is."""
    if kind == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if kind == "F8_E8M0":
        return np.where(stored == 255, np.nan, np.ldexp(1.0, stored.astype(np.int32) - 127)).astype(np.float32)
    return stored


def recodes(source: Grid, target: Grid) -> bool:
    """Whether `recode` can write the codes of `source` in `target`."""
    if not isinstance(source, GroupGrid) or source.order or source.table or source.block_size % 32:
        return False
    if target.name == "Q4_1":
        return source.code_bits <= 4
    if target.name not in _SIGNED:
        return False
    low, high = _SIGNED[target.name]
    largest = (1 << source.code_bits) - 1
    if source.zero == "":
        return low <= -source.center and largest - source.center <= high
    return source.zero == "U8" and low <= -largest - 1 and largest <= high


def recode(packed: Bytes, source: GroupGrid, target: Grid) -> Bytes:
    """Rows of `source` as blocks of Q4_0, Q4_1 or Q8_0 with the same codes; scales, and Q4_1's minima, become F16.

    Exact where `is_exact` says so; else off by what F16 cannot hold. Raises ShapeError where `recodes` is false.
    """
    if not recodes(source, target):
        raise ShapeError(f"codes of {source.name} do not fit into {target.name}")
    n_cols = packed.shape[1] // source.block_bytes * source.block_size
    if not len(packed):
        return np.empty((0, target.row_bytes(n_cols)), dtype=np.uint8)
    codes, scales, zeros = source.unpack(packed)
    shape = (len(codes), target.row_bytes(n_cols))
    repeats = source.block_size // 32
    with np.errstate(over="ignore", under="ignore"):
        d = np.repeat(scales, repeats, axis=1).astype("<f2").reshape(-1, 1)
        minima = np.repeat(-_product(zeros, scales), repeats, axis=1).astype("<f2").reshape(-1, 1)
    blocks = codes.reshape(-1, 32)
    if target.name == "Q4_1":
        return np.concatenate([d.view(np.uint8), minima.view(np.uint8), _nibbles(blocks)], axis=1).reshape(shape)
    steps = blocks.astype(np.int16) - np.repeat(zeros, repeats, axis=1).astype(np.int16).reshape(-1, 1)
    body = _nibbles((steps + 8).astype(np.uint8)) if target.name == "Q4_0" else steps.astype(np.int8).view(np.uint8)
    return np.concatenate([d.view(np.uint8), body], axis=1).reshape(shape)


def recoded(tensor: LazyTensor, target: Grid) -> LazyTensor:
    """The tensor in `target`, by `recode`. Raises ShapeError where `recodes` is false."""
    source = tensor.grid
    if not isinstance(source, GroupGrid):
        raise ShapeError(f"{tensor.origin}: {source.name} has no codes to keep")
    return LazyTensor(
        shape=tensor.shape, grid=target, read=lambda start, stop: recode(tensor.read(start, stop), source, target), origin=tensor.origin
    )


def is_exact(scales: npt.NDArray[Any], zeros: npt.NDArray[Any], target: Grid) -> bool:
    """Whether F16 holds these scales, and for Q4_1 these minima, without rounding. What is not finite is left for others to refuse."""
    return _in_half(scales) and (target.name != "Q4_1" or _in_half(_product(zeros, scales)))


_FLOATS = ("F16", "BF16", "F32", "F64")
_STORED: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "U8": np.dtype("u1"),
}
_SIGNED = {"Q4_0": (-8, 7), "Q8_0": (-128, 127)}


def _bytes_of(stored: npt.NDArray[Any], kind: str, per_block: int) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(stored, dtype=_STORED[kind]).reshape(-1, per_block).view(np.uint8)


def _product(zeros: npt.NDArray[Any], scales: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return zeros.astype(np.float64) * scales.astype(np.float64)


def _in_half(values: npt.NDArray[Any]) -> bool:
    with np.errstate(over="ignore", under="ignore"):
        return bool(np.array_equal(values.astype(np.float16).astype(np.float64), values.astype(np.float64), equal_nan=True))


def _nibbles(blocks: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """ggml's order in a block of 32: value i in the low half of byte i, value i + 16 in the high half."""
    return blocks[:, :16] | blocks[:, 16:] << np.uint8(4)


def _pack_codes(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """(n, count) to (n, ceil(count * bits / 8)), from the low bits up."""
    if bits == 8:
        return codes
    if bits == 4 and codes.shape[1] % 2 == 0:
        return codes[:, ::2] | codes[:, 1::2] << np.uint8(4)
    spread = codes[..., None] >> np.arange(bits, dtype=np.uint8) & 1
    return np.packbits(spread.reshape(len(codes), -1), axis=1, bitorder="little")


def _unpack_codes(packed: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """The inverse of `_pack_codes`."""
    if bits == 8:
        return packed
    if bits == 4:
        return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)[:, :count]
    spread = np.unpackbits(np.ascontiguousarray(packed), axis=1, count=count * bits, bitorder="little").reshape(len(packed), count, bits)
    return (spread << np.arange(bits, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)
