"""Kinds nobody has thought of yet: a change described by an einsum over stored and seeded tensors.

One entry per base tensor:

    {"einsum": "or,r,ri->oi", "tensors": ["b", "z", {"seed": 7, "shape": [8, 64], "std": 0.1}], "scale": 0.5, "shape": [48, 64]}

Operands are names of stored tensors, or {"seed", "shape", "std"}: normal values of numpy's PCG64 generator with that seed. The
result is reshaped to `shape`, times `scale`, and added. Tensor networks (TeRA, arXiv:2509.03234) and routed adapters with their
routes frozen (Queryable LoRA) fit in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeq.deltas.delta import Additive, AnyFloats, Array, f64
from edgeq.errors import ShapeError, SourceError

_KEYS = {"einsum", "tensors", "scale", "shape"}
MAX_SEEDED = 1 << 28  # values of one seeded tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Einsum(Additive):
    """W + scale * reshape(einsum(subscripts, *operands))."""

    subscripts: str
    operands: tuple[AnyFloats, ...]
    out: tuple[int, int]
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.out

    def change(self) -> Array:
        try:
            value = np.einsum(self.subscripts, *(f64(o) for o in self.operands), optimize=True)
        except ValueError as err:
            raise ShapeError(
                f"einsum {self.subscripts!r} does not fit operands of {[list(o.shape) for o in self.operands]}: {err}"
            ) from err
        if value.size != math.prod(self.out):
            raise ShapeError(f"einsum {self.subscripts!r} gives {list(value.shape)}, which does not reshape to {list(self.out)}")
        return self.scale * value.reshape(self.out)


def read_entry(entry: Mapping[str, Any], tensors: Mapping[str, AnyFloats], *, where: str) -> Einsum:
    """One entry of a manifest. Raises SourceError naming `where` for keys, operands or values that make no sense."""
    unknown = sorted(set(entry) - _KEYS)
    if unknown:
        raise SourceError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(_KEYS))}")
    subscripts, operands, shape = entry.get("einsum"), entry.get("tensors"), entry.get("shape")
    scale = entry.get("scale", 1.0)
    if not isinstance(subscripts, str) or not isinstance(operands, list) or not operands:
        raise SourceError(f"{where}: expected an `einsum` string and a list of `tensors`")
    if not isinstance(shape, list) or not _is_shape(shape) or len(shape) != 2:
        raise SourceError(f"{where}: shape is {shape!r}, expected [n_out, n_in]")
    if type(scale) not in (int, float) or not math.isfinite(scale):
        raise SourceError(f"{where}: scale is {scale!r}, expected a number")
    values = tuple(_operand(operand, tensors, where) for operand in operands)
    return Einsum(subscripts=subscripts, operands=values, out=(shape[0], shape[1]), scale=float(scale))


def _operand(operand: Any, tensors: Mapping[str, AnyFloats], where: str) -> AnyFloats:
    if isinstance(operand, str):
        if operand not in tensors:
            raise SourceError(f"{where}: tensor {operand!r} is not in the file; it has {', '.join(sorted(tensors)) or 'none'}")
        return tensors[operand]
    if not isinstance(operand, dict) or set(operand) != {"seed", "shape", "std"}:
        raise SourceError(f"{where}: operand {operand!r} is neither a tensor's name nor an object of seed, shape and std")
    seed, shape, std = operand["seed"], operand["shape"], operand["std"]
    if type(seed) is not int or seed < 0 or not _is_shape(shape) or type(std) not in (int, float) or not std > 0:
        raise SourceError(f"{where}: operand {operand!r} needs a seed from 0, a shape of positive numbers and a positive std")
    if math.prod(shape) > MAX_SEEDED:
        raise SourceError(f"{where}: a seeded tensor of shape {shape} has more than {MAX_SEEDED} values")
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape) * std


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(v) is int and v > 0 for v in value)
