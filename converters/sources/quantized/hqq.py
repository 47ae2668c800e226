"""HQQ checkpoints as transformers saves them: every option of a linear stands beside it as a tensor.

    W_q          codes, packed along the first axis: of `k` codes to a byte (or ten 3-bit codes to an int32), the first k-th of the rows has
                 the highest bits. With view_as_float the same bytes under another type.
    scale, zero  floats, one of each per group
    shape        n_out, n_in
    nbits, group_size, axis, packing, view_as_float, ...   numbers, and strings as character codes
axis 1: the weight as rows of one group each. axis 0: the weight as (group_size, groups), so that values of a group lie far apart; such a
tensor is decoded to float32 as it is read. value = (code - zero) * scale, here without rounding to compute_dtype.
https://github.com/mobiusml/hqq, hqq/core/quantize.py and hqq/core/bitpack.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.converters.sources.json_file import Section
from edgeq.converters.sources.quantized.groups import Groups, as_tensor, even_groups
from edgeq.converters.sources.quantized.options import REMEDY, refuse
from edgeq.converters.sources.quantized.parts import SCALES, Decoded, Parts
from edgeq.converters.sources.stored import StoredTensor
from edgeq.errors import SourceError, UnsupportedError
from edgeq.grids import F32
from edgeq.group_grids import as_numbers
from edgeq.tensors import Bytes, LazyTensor


@dataclass(frozen=True)
class _Packing:
    """codes per item of `dtype`, of `bits` bits each, the first in the highest place that is used."""

    dtype: str
    bits: int
    per_item: int


_PACKINGS = {
    "8bit_u8": _Packing("u1", 8, 1),
    "4bit_u8": _Packing("u1", 4, 2),
    "3bit_32": _Packing("<i4", 3, 10),
    "2bit_u8": _Packing("u1", 2, 4),
    "1bit_u8": _Packing("u1", 1, 8),
}
# Options of quantizing and of running; what they chose stands in the tensors.
_BESIDE = ("nbits", "channel_wise", "optimize", "round_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config")


def read_hqq(config: Section, parts: Parts) -> Decoded:
    """Every module that has a W_q. Raises UnsupportedError for options that are not described here, SourceError for broken tensors."""
    params = config.get("quant_config")
    stated = params.get("weight_quant_params", params) if isinstance(params, dict) else None
    refuse(config, {"skip_modules", "modules_to_not_convert"})
    modules = list(parts.modules("W_q"))
    weights = {f"{m}.weight": _weight(parts, m) for m in modules}
    summary: dict[str, Any] = {"method": "hqq"}
    if isinstance(stated, dict):
        summary |= {new: stated[old] for old, new in (("nbits", "bits"), ("group_size", "group_size"), ("axis", "axis")) if old in stated}
    return Decoded(weights=weights, parts=frozenset(parts.taken), summary=summary)


def _weight(parts: Parts, module: str) -> LazyTensor:
    stored = parts.take(module, "W_q", ("U8", "I32", "F16", "BF16", "F32"), (None, None))
    for flag in ("quant_scale", "quant_zero"):
        if parts.has(module, flag) and parts.scalar(module, flag):
            raise UnsupportedError(f"{module}.{flag} is set: scales or zero points are quantized too, which is not read. {REMEDY}")
    shape = tuple(int(n) for n in parts.take(module, "shape", ("I64", "I32"), (2,)).array())
    n_out, n_in = shape
    if min(shape) < 1:
        raise SourceError(f"{module}.shape is {list(shape)}, expected rows and columns")
    axis = parts.scalar(module, "axis")
    if axis not in (0, 1):
        raise UnsupportedError(f"{module}.axis is {axis}; supported: 0, 1")
    packing = _packing(parts, module)
    scale = parts.take(module, "scale", SCALES)
    zero = parts.take(module, "zero", SCALES, scale.shape)
    n_groups = math.prod(scale.shape)
    size = n_out * n_in // max(n_groups, 1)
    stated = parts.scalar(module, "group_size") if parts.has(module, "group_size") else size
    if n_groups < 1 or n_out * n_in != n_groups * size or stated != size:
        raise SourceError(f"{scale.origin} has {n_groups} scales for {n_out} x {n_in} values, which are not groups of {stated}")
    parts.drop(module, "view_as_float", "unpack_view_dtype", *_BESIDE)
    rows, columns = (n_groups, size) if axis == 1 else (size, n_groups)
    step = -(-rows // packing.per_item)
    packed_bytes = step * columns * np.dtype(packing.dtype).itemsize
    if len(stored.data()) != packed_bytes:
        raise SourceError(
            f"{stored.origin} has {len(stored.data())} bytes, but {n_out} x {n_in} values of {packing.bits} bits in groups of {size} take "
            f"{packed_bytes}. Download the model again."
        )
    weight = _Weight(stored=stored, shape=(n_out, n_in), packing=packing, step=step, columns=columns, scale=scale, zero=zero)
    return _along_rows(weight, size) if axis == 1 else _across_rows(weight)


def _packing(parts: Parts, module: str) -> _Packing:
    if not parts.has(module, "packing"):
        raise UnsupportedError(f"{module}.packing is missing: codes that are not packed are not read. {REMEDY}")
    name = parts.text(module, "packing")
    if name not in _PACKINGS:
        raise UnsupportedError(f"{module}.packing is {name!r}; supported: {', '.join(_PACKINGS)}. {REMEDY}")
    return _PACKINGS[name]


@dataclass(frozen=True, kw_only=True)
class _Weight:
    """shape: n_out, n_in. W_q has `step` rows of `columns` items."""

    stored: StoredTensor
    shape: tuple[int, int]
    packing: _Packing
    step: int
    columns: int
    scale: StoredTensor
    zero: StoredTensor

    @property
    def origin(self) -> str:
        return f"{self.stored.file}: {self.stored.name.removesuffix('W_q')}weight"

    def codes(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Rows start..stop of the unpacked codes, (stop - start, columns)."""
        items = self.stored.data().view(self.packing.dtype).reshape(self.step, self.columns)
        found = []
        for part in range(start // self.step, -(-stop // self.step)):
            low, high = max(start - part * self.step, 0), min(stop - part * self.step, self.step)
            shift = (self.packing.per_item - 1 - part) * self.packing.bits
            found.append(items[low:high] >> shift & ((1 << self.packing.bits) - 1))
        return np.concatenate(found).astype(np.uint8)


def _along_rows(weight: _Weight, size: int) -> LazyTensor:
    """Axis 1: groups are runs of the flattened weight, and of its rows where they divide into groups."""
    n_in = weight.shape[1]
    run = math.gcd(n_in, size)
    if run == 1:
        raise UnsupportedError(f"{weight.origin}: rows of {n_in} values do not go with groups of {size}")

    def codes(start: int, stop: int) -> npt.NDArray[np.uint8]:
        first, last = start * n_in // size, -(-stop * n_in // size)
        flat = weight.codes(first, last).reshape(-1)[start * n_in - first * size :]
        return flat[: (stop - start) * n_in].reshape(-1, n_in)

    def of_groups(tensor: StoredTensor, start: int, stop: int) -> npt.NDArray[Any]:
        group = np.arange(start * n_in, stop * n_in, run) // size
        return tensor.array().reshape(-1)[group].reshape(-1, n_in // run)

    return as_tensor(
        Groups(
            name=f"HQQ {weight.packing.bits}-bit",
            shape=weight.shape,
            code_bits=weight.packing.bits,
            codes=codes,
            scales=lambda start, stop: of_groups(weight.scale, start, stop),
            scale=weight.scale.dtype,
            group=even_groups(n_in, run),
            zeros=lambda start, stop: of_groups(weight.zero, start, stop),
            zero=weight.zero.dtype,
            origin=weight.origin,
        )
    )


def _across_rows(weight: _Weight) -> LazyTensor:
    """Axis 0: the group of value i of the flattened weight is i modulo the number of groups."""
    n_in = weight.shape[1]

    def read(start: int, stop: int) -> Bytes:
        if stop <= start:
            return np.empty((0, 4 * n_in), dtype=np.uint8)
        place = np.arange(start * n_in, stop * n_in)
        first, last = start * n_in // weight.columns, -(-stop * n_in // weight.columns)
        codes = weight.codes(first, last).reshape(-1)[place - first * weight.columns]
        group = place % weight.columns
        scale, zero = (as_numbers(t.array().reshape(-1), t.dtype)[group].astype(np.float64) for t in (weight.scale, weight.zero))
        return ((codes - zero) * scale).astype(np.float32).reshape(-1, n_in).view(np.uint8)

    return LazyTensor(shape=weight.shape, grid=F32, read=read, origin=weight.origin)
