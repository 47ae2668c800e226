"""How ONNX Runtime's kernels want quantized matrices, and which grids go into them with the codes they have.

MatMulNBits and GatherBlockQuantized (com.microsoft): a matrix (N, K) in blocks of `block_size` columns, a power of two from 16 to 256; the
last block of a row is filled up when K is no multiple.
    codes    uint8 (N, n_blocks, block_size * bits / 8)   unsigned codes, from the low bits of a byte up; 2, 4 or 8 bits
    scales   float (N, n_blocks)                          float32, or float16 in a float16 graph
    zeros    uint8 (N, ceil(n_blocks * bits / 8))         zero points, packed like codes; left out where all are 2^(bits-1)
    value = (code - zero) * scale
Zero points that are no whole numbers have a type in the operator, but the CPU kernel then unpacks the whole matrix for every token. Blocks
whose least value is no multiple of their scale (Q4_1, Q4_K, HQQ) therefore have codes around 2^(bits-1), as above, and beside them
    minima   float (N, n_blocks)                          the value of code 0
so that value = (code - 2^(bits-1)) * scale + offset with offset = minimum + 2^(bits-1) * scale, and x W^T = MatMulNBits(x) + (sums of x
over blocks) offset^T. That is exact, and no slower than zero points (114 us where zero points take 122, none 86, float zero points 23 700:
2048 x 2048, one token, one core of an EPYC with AVX-512). Codes are around 2^(bits-1), and offsets small, because MatMulNBits rounds x: of
two large sums that cancel little else would be left.

MatMulBnb4: NF4 or FP4 codes of the flattened matrix, the first value in the high half of a byte.
    codes    uint8 (ceil(N * K / 2),)
    absmax   float (ceil(N * K / block_size),)
    value = table[code] * absmax
Its CPU kernel, too, unpacks the whole matrix every time (7 000 us in that measurement).

contrib_ops/cpu/quantization/*.cc and docs/ContribOperators.md of ONNX Runtime; layouts of ggml blocks: ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgeq.errors import PlanError
from edgeq.grids import GRIDS, Grid
from edgeq.group_grids import TABLES, GroupGrid, group_grid
from edgeq.tensors import Bytes, Floats, LazyTensor

Wide = npt.NDArray[np.float64]

BLOCK_SIZES = (16, 32, 64, 128, 256)
_LARGEST_BLOCK = 128  # for groups that are larger: cuts are made at blocks
_SCAN_VALUES = 1 << 22


@dataclass(frozen=True)
class NBits:
    """zeros, minima: whether the matrix has these parts. At most one of them."""

    bits: int
    block_size: int
    zeros: bool = False
    minima: bool = False

    @property
    def center(self) -> int:
        """The zero point of blocks that store none."""
        return 1 << (self.bits - 1)

    @property
    def block_bytes(self) -> int:
        return self.block_size * self.bits // 8

    def n_blocks(self, n_cols: int) -> int:
        return -(-n_cols // self.block_size)

    def zero_bytes(self, n_cols: int) -> int:
        return -(-self.n_blocks(n_cols) * self.bits // 8)


@dataclass(frozen=True)
class Bnb4:
    """table: "nf4" or "fp4"."""

    table: str
    block_size: int


@dataclass(frozen=True)
class Parts:
    """Rows of a matrix for MatMulNBits.

    codes (n_rows, n_blocks, block_bytes); scales and minima (n_rows, n_blocks); zeros (n_rows, zero_bytes).
    """

    codes: Bytes
    scales: Floats
    zeros: Bytes | None = None
    minima: Floats | None = None


Form = NBits | Bnb4


@dataclass(frozen=True)
class Answer:
    """What becomes of a quantized matrix in an ONNX file, without another rounding of its values.

    form: where its codes go, as they are; None when no kernel takes them. reason: why it is not exact, a clause; empty when it is. With a
    form it is scales that lose something, else the matrix needs another grid.
    """

    form: Form | None = None
    reason: str = ""

    @property
    def kind(self) -> Literal["exact", "regrid"]:
        return "regrid" if self.reason else "exact"


def nbits_grid(bits: int, block_size: int, *, symmetric: bool, n_cols: int) -> Grid:
    """The grid of `bits` per code in blocks, for rows of `n_cols` values: Q4_0 and Q8_0 where these are meant, else one of our own.

    symmetric: zero point in the middle; else one for each block. Scales are F16. Raises PlanError for sizes without a kernel.
    """
    if bits not in (2, 4, 8) or block_size not in BLOCK_SIZES:
        raise PlanError(
            f"{bits} bits in blocks of {block_size}: ONNX Runtime has kernels for 2, 4 and 8 bits in blocks of "
            f"{', '.join(map(str, BLOCK_SIZES))}. Choose one of these."
        )
    if symmetric and block_size == 32 and bits > 2 and n_cols % 32 == 0:
        return GRIDS[f"Q{bits}_0"]
    name = f"INT{bits}_B{block_size}" + ("" if symmetric else "_ASYM")
    whole = n_cols % block_size == 0
    return group_grid(
        name,
        code_bits=bits,
        block_size=block_size if whole else n_cols,
        scale="F16",
        zero="" if symmetric else "U8",
        center=1 << (bits - 1) if symmetric else 0,
        order=None if whole else np.arange(n_cols, dtype=np.int32) // np.int32(block_size),
    )


def run_length(grid: GroupGrid) -> int | None:
    """Columns of a group, when groups are runs of columns that are equally long but for the last one; else None (GPTQ's act-order)."""
    if not grid.order:
        return grid.block_size
    order = np.frombuffer(grid.order, dtype="<i4")
    size = int(np.argmax(order != 0)) or len(order)
    return size if np.array_equal(order, np.arange(len(order)) // size) else None


def answer(tensor: LazyTensor, *, half: bool = False) -> Answer:
    """What becomes of a matrix that is to stay in its quantized grid. Reads scales and zero points where they decide.

    half: in a float16 graph, whose scales are float16.
    """
    grid = tensor.grid
    found = answer_for(grid, tensor.n_cols)
    if grid.name == "Q4_1" and all(_whole_minima(rows) for rows in _blocks(tensor)):
        found = Answer(NBits(4, 32, zeros=True))
    elif isinstance(grid, GroupGrid) and isinstance(found.form, NBits) and grid.zero == "U8":
        found = Answer(_holding(found.form, max(int(grid.unpack(rows)[2].max()) for rows in _blocks(tensor))))
    if isinstance(found.form, NBits) and not isinstance(grid, GroupGrid):
        found = Answer(_merged(tensor, found.form))
    if half and found.form is not None and not _all_half(grid, found.form):
        return replace(found, reason="its scales are not all float16 numbers and are rounded to them")
    return found


def answer_for(grid: Grid, n_cols: int) -> Answer:
    """As `answer`, for what is yet to be encoded in that grid."""
    if grid.is_float:
        return Answer(reason=f"{grid.name} has no codes to keep")
    if isinstance(grid, GroupGrid):
        return _answer_group(grid, n_cols)
    if grid.name not in _GGML:
        return Answer(reason=f"ONNX Runtime has no kernel for codes of {grid.name}")
    source = _GGML[grid.name]
    return Answer(NBits(source.bits, source.group, minima=source.zero is None))


def half_scales(grid: Grid) -> bool:
    """Whether the scales of all blocks in a grid are float16 numbers."""
    return grid.scale == "F16" if isinstance(grid, GroupGrid) else grid.name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def half_minima(grid: Grid) -> bool:
    """Whether all minima of a grid's form are float16 numbers."""
    return grid.name == "Q4_1"


def stored_bits(grid: Grid, form: Form, *, half: bool) -> float:
    """Bits per weight of a grid in this form, in the file of a float16 (half) or float32 graph. What fills up rows is not counted.

    >>> stored_bits(GRIDS["Q4_0"], NBits(4, 32), half=False), stored_bits(GRIDS["Q4_1"], NBits(4, 32, minima=True), half=False)
    (4.5, 5.0)
    """
    if isinstance(form, Bnb4):
        return 4 + (16 if half else 32) / form.block_size
    scale = 16 if half or half_scales(grid) else 32
    minimum = (16 if half_minima(grid) else 32) if form.minima else 0
    return form.bits + (scale + minimum + form.bits * form.zeros) / form.block_size


def split(packed: Bytes, grid: Grid, form: NBits) -> Parts:
    """Packed rows of a grid, (n_rows, row_bytes), as the parts of the form that `answer` gave. Every code keeps its value."""
    rows = _affine(packed, grid)
    zeros, minima, shift = rows.zeros, None, 0
    if form.minima:
        shift = form.center - rows.middle
        minima = rows.minima - (rows.zeros + shift) * rows.scales
    elif form.zeros:
        zeros = rows.zeros + _multiples(rows)
    elif rows.zeros.size:
        shift = form.center - int(rows.zeros[0, 0])
    n_rows, n_cols = rows.codes.shape
    n_blocks = form.n_blocks(n_cols)
    blocks = np.zeros((n_rows, n_blocks * form.block_size), dtype=np.uint8)
    np.add(rows.codes, np.uint8(shift), out=blocks[:, :n_cols])

    def by_block(values: Wide, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        if form.block_size > rows.group:
            return values[:, :: form.block_size // rows.group].astype(dtype)
        return np.repeat(values, rows.group // form.block_size, axis=1)[:, :n_blocks].astype(dtype)

    return Parts(
        codes=pack(blocks, form.bits).reshape(n_rows, n_blocks, form.block_bytes),
        scales=by_block(rows.scales, np.float32),
        zeros=pack(by_block(zeros, np.uint8), form.bits) if form.zeros else None,
        minima=None if minima is None else by_block(minima, np.float32),
    )


def decode(parts: Parts, form: NBits, n_cols: int) -> Floats:
    """The values (n_rows, n_cols) of rows in this form, as ONNX Runtime's kernels decode them."""
    n_rows, n_blocks = parts.scales.shape
    codes = unpack(parts.codes.reshape(n_rows, -1), form.bits, n_blocks * form.block_size).reshape(n_rows, n_blocks, -1)
    if parts.zeros is None:
        zeros = np.full((n_rows, n_blocks), 0 if form.minima else form.center)
    else:
        zeros = unpack(parts.zeros, form.bits, n_blocks)
    values = (codes.astype(np.float32) - zeros[..., None].astype(np.float32)) * parts.scales[..., None]
    if parts.minima is not None:
        values = values + parts.minima[..., None]
    return np.ascontiguousarray(values.reshape(n_rows, -1)[:, :n_cols], dtype=np.float32)


def split_bnb4(packed: Bytes, grid: GroupGrid, form: Bnb4) -> tuple[Bytes, Floats]:
    """Packed rows as codes and absmax of MatMulBnb4. Rows are flattened; an odd number of values is filled up with code 0."""
    codes, scales, _ = grid.unpack(packed)
    flat = codes.reshape(-1)
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    per_group = grid.block_size // form.block_size
    return flat[::2] << np.uint8(4) | flat[1::2], np.repeat(scales.astype(np.float32).reshape(-1), per_group)


def decode_bnb4(codes: Bytes, absmax: Floats, form: Bnb4, shape: tuple[int, int]) -> Floats:
    """The inverse of `split_bnb4`, as the kernel decodes."""
    n_values = shape[0] * shape[1]
    index = np.stack([codes >> 4, codes & 15], axis=-1).reshape(-1)[:n_values]
    return (TABLES[form.table][index] * np.repeat(absmax, form.block_size)[:n_values]).reshape(shape)


def pack(codes: Bytes, bits: int) -> Bytes:
    """(n_rows, count) codes to (n_rows, ceil(count * bits / 8)) bytes, from the low bits up; the end is filled with zeros."""
    if bits == 8:
        return codes
    per = 8 // bits
    if codes.shape[1] % per:
        codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per)))
    packed = codes[:, ::per].copy()
    for i in range(1, per):
        packed |= codes[:, i::per] << np.uint8(bits * i)
    return packed


def unpack(packed: Bytes, bits: int, count: int) -> Bytes:
    """The inverse of `pack`."""
    if bits == 8:
        return packed[:, :count]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (packed[..., None] >> shifts & np.uint8((1 << bits) - 1)).reshape(len(packed), -1)[:, :count]


def _answer_group(grid: GroupGrid, n_cols: int) -> Answer:
    size = run_length(grid)
    if size is None:
        return Answer(reason="its groups are not runs of columns (act-order), and ONNX Runtime's blocks are")
    divisor = size & -size
    if grid.table in ("nf4", "fp4") and divisor >= BLOCK_SIZES[0] and not grid.order:
        return Answer(Bnb4(grid.table, divisor))
    if grid.table not in ("", "nf4", "fp4"):
        return Answer(reason=f"ONNX Runtime has no kernel for codes of {grid.name}")
    # one group a row: blocks of any size will do, the last one filled up
    block = min(_LARGEST_BLOCK, divisor if size < n_cols else max(BLOCK_SIZES[0], 1 << (size - 1).bit_length()))
    if grid.table or block < BLOCK_SIZES[0]:
        return Answer(reason=f"groups of {size} columns do not divide into blocks of {BLOCK_SIZES[0]} or more")
    bits = next(bits for bits in (2, 4, 8) if grid.code_bits <= bits)
    if grid.zero == "":
        return Answer(_around(grid.center, grid.code_bits, bits, block))
    return Answer(NBits(bits, block, zeros=grid.zero == "U8", minima=grid.zero != "U8"))


def _holding(form: NBits, zero: int) -> NBits:
    """The form with room for zero points up to this one: those of GPTQ go up to 2^bits."""
    if zero < 1 << form.bits:
        return form
    return replace(form, bits=2 * form.bits) if form.bits < 8 else replace(form, zeros=False, minima=True)


def _merged(tensor: LazyTensor, form: NBits) -> NBits:
    """Larger blocks where all neighbours are alike: those of a checkpoint whose groups are larger than ggml's blocks."""
    while form.block_size < min(_LARGEST_BLOCK, tensor.n_cols) and all(_pairs_alike(rows, tensor.grid, form) for rows in _blocks(tensor)):
        form = replace(form, block_size=2 * form.block_size)
    return form


def _pairs_alike(packed: Bytes, grid: Grid, form: NBits) -> bool:
    parts = split(packed, grid, form)
    zeros = None if parts.zeros is None else unpack(parts.zeros, form.bits, parts.scales.shape[1])
    both = [part for part in (parts.scales, parts.minima, zeros) if part is not None]
    return all(np.array_equal(part[:, : part.shape[1] // 2 * 2 : 2], part[:, 1::2]) for part in both)


def _all_half(grid: Grid, form: Form) -> bool:
    """Whether a float16 graph holds all scales, and what else has their type."""
    return half_scales(grid) and not (isinstance(form, NBits) and form.minima)


def _around(center: int, code_bits: int, bits: int, block: int) -> NBits:
    """The form of codes with one zero point for all: shifted to the middle, if that leaves them in range, else in more bits."""
    while True:
        form = NBits(bits, block)
        shift = form.center - center
        if shift >= 0 and (1 << code_bits) - 1 + shift < 1 << bits:
            return form
        if 0 <= center < 1 << bits:
            return replace(form, zeros=True)
        if bits == 8:
            return replace(form, minima=True)
        bits *= 2


def _blocks(tensor: LazyTensor) -> Iterator[Bytes]:
    """Packed rows, one first, since most tensors that do not fit show it there."""
    yield tensor.packed(0, 1)
    step = max(1, _SCAN_VALUES // tensor.n_cols)
    for start in range(1, tensor.n_rows, step):
        yield tensor.packed(start, min(start + step, tensor.n_rows))


@dataclass(frozen=True)
class _Affine:
    """Rows whose values are (code - zero) * scale + minimum.

    middle: of the codes' range. group: columns that share zero, scale and minimum, which are (n_rows, n_groups).
    """

    codes: Bytes
    middle: int
    group: int
    scales: Wide
    zeros: Wide
    minima: Wide


def _affine(packed: Bytes, grid: Grid) -> _Affine:
    n_rows = len(packed)
    if isinstance(grid, GroupGrid):
        codes, scales, zeros = grid.unpack(packed)
        group = run_length(grid)
        assert group is not None
        if scales.shape[1] == 1:  # one group a row: the row may end within a block
            group = -(-codes.shape[1] // _LARGEST_BLOCK) * _LARGEST_BLOCK
        return _Affine(codes, 1 << (grid.code_bits - 1), group, scales.astype(np.float64), zeros.astype(np.float64), np.zeros(scales.shape))
    source = _GGML[grid.name]
    codes, scales, minima = source.unpack(packed.reshape(-1, grid.block_bytes))
    scales = scales.reshape(n_rows, -1)
    zeros = np.full(scales.shape, float(source.zero or 0))
    minima = np.zeros(scales.shape) if minima is None else minima.reshape(n_rows, -1)
    return _Affine(codes.reshape(n_rows, -1), 1 << (source.code_bits - 1), source.group, scales, zeros, minima)


def _whole_minima(packed: Bytes) -> bool:
    """Whether the minimum of every Q4_1 block is its scale times 0, -1, ... or -15."""
    rows = _affine(packed, GRIDS["Q4_1"])
    multiples = _multiples(rows)
    return bool(((multiples >= 0) & (multiples <= 15) & (-multiples * rows.scales == rows.minima)).all())


def _multiples(rows: _Affine) -> Wide:
    """Minima in steps below zero, rounded."""
    return np.rint(np.divide(-rows.minima, rows.scales, out=np.zeros(rows.scales.shape), where=rows.scales != 0))


Unpacked = tuple[Bytes, Wide, Wide | None]  # codes, scales, minima


def _half(blocks: Bytes, at: int) -> Wide:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float64)


def _nibbles(packed: Bytes) -> Bytes:
    """Bytes (n, w) to codes (n, 2w): the low halves, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _q4_0(b: Bytes) -> Unpacked:
    return _nibbles(b[:, 2:]), _half(b, 0), None


def _q4_1(b: Bytes) -> Unpacked:
    return _nibbles(b[:, 4:]), _half(b, 0), _half(b, 2)


def _fifth(packed: Bytes) -> Bytes:
    return np.unpackbits(np.ascontiguousarray(packed), axis=1, bitorder="little") << np.uint8(4)


def _q5_0(b: Bytes) -> Unpacked:
    return _nibbles(b[:, 6:]) | _fifth(b[:, 2:6]), _half(b, 0), None


def _q5_1(b: Bytes) -> Unpacked:
    return _nibbles(b[:, 8:]) | _fifth(b[:, 4:8]), _half(b, 0), _half(b, 2)


def _q8_0(b: Bytes) -> Unpacked:
    return b[:, 2:] ^ np.uint8(128), _half(b, 0), None


def _scales_and_minima(b: Bytes) -> tuple[Wide, Wide]:
    """Of Q4_K and Q5_K: 8 scales and 8 minima of 6 bits in 12 bytes, times one F16 each."""
    s = b[:, 4:16]
    first, second, third = s[:, :4], s[:, 4:8], s[:, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return scales * _half(b, 0), -(minima * _half(b, 2))


def _q4_k(b: Bytes) -> Unpacked:
    codes = np.concatenate([_nibbles(b[:, at : at + 32]) for at in range(16, 144, 32)], axis=1)
    return codes, *_scales_and_minima(b)


def _q5_k(b: Bytes) -> Unpacked:
    low = np.concatenate([_nibbles(b[:, at : at + 32]) for at in range(48, 176, 32)], axis=1)
    high = np.concatenate([(b[:, 16:48] >> np.uint8(bit) & 1) << np.uint8(4) for bit in range(8)], axis=1)
    return low | high, *_scales_and_minima(b)


def _q6_k(b: Bytes) -> Unpacked:
    parts = []
    for half in (0, 1):
        low = b[:, 64 * half : 64 * half + 64]
        high = b[:, 128 + 32 * half : 160 + 32 * half]
        parts.append(_nibbles(low) | np.concatenate([(high >> np.uint8(2 * i) & 3) << np.uint8(4) for i in range(4)], axis=1))
    scales = np.ascontiguousarray(b[:, 192:208]).view(np.int8) * _half(b, 208)
    return np.concatenate(parts, axis=1), scales, None


@dataclass(frozen=True)
class _Source:
    """A grid of ggml with values (code - zero) * scale + minimum. bits: that a code is kept in. zero: None where blocks have minima."""

    code_bits: int
    bits: int
    group: int
    zero: int | None
    unpack: Callable[[Bytes], Unpacked]


_GGML = {
    "Q4_0": _Source(4, 4, 32, 8, _q4_0),
    "Q4_1": _Source(4, 4, 32, None, _q4_1),
    "Q5_0": _Source(5, 8, 32, 16, _q5_0),
    "Q5_1": _Source(5, 8, 32, None, _q5_1),
    "Q8_0": _Source(8, 8, 32, 128, _q8_0),
    "Q4_K": _Source(4, 4, 32, None, _q4_k),
    "Q5_K": _Source(5, 8, 32, None, _q5_k),
    "Q6_K": _Source(6, 8, 16, 32, _q6_k),
}
