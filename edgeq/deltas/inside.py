"""Adapters inside the quantizer: L4Q, LR-QAT and EfficientDM train a low-rank change together with the steps of a quantizer around it.

    codes = clamp(round(x) + zero point, low, high)        W = step * (codes - zero point) + offset

with x = (W0 + scale b a - offset) / step; or, where the change is in units of the step (LR-QAT), downcast(W0 / initial step) + scale b a.
Steps, zero points and offsets belong to a group of columns of one row; a row may be one group. The codes are what training has tuned:
rounding the merged weight with another step, or merging b a as a plain LoRA, gives other ones. So such an adapter's tensor leaves merging
in a grid of these codes and steps, which a carrier copies or recodes, and never measures anew.

Arithmetic is float64 and rounding is to even, as numpy's and torch's is. Training in float32 may have had another code where x is within
float32's precision of a half. L4Q: Jeon et al. 2024, arXiv:2402.04902. LR-QAT: Bondarenko et al. 2024, arXiv:2406.06385. EfficientDM: He
et al. 2023, arXiv:2310.03270.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from edgeq.deltas.delta import AnyFloats, Array, Delta, f64
from edgeq.deltas.lora import LoRA
from edgeq.errors import ShapeError, SourceError
from edgeq.grids import F32, grid
from edgeq.group_grids import GroupGrid, group_grid, is_exact, recoded, recodes
from edgeq.tensors import Bytes, Floats, LazyTensor

Downcast = Literal["float32", "bfloat16", "fixed8"]
_DOWNCASTS: tuple[Downcast, ...] = ("float32", "bfloat16", "fixed8")
# Grids of ggml that may be the same one, up to 4 bits and above; eight bits for codes of four would be a waste, and not go back.
_NARROW, _WIDE = ("Q4_0", "Q4_1"), ("Q8_0",)


@dataclass(frozen=True, kw_only=True, eq=False)
class Initial:
    """LR-QAT's frozen part: W0 over the step that training began with, kept in `downcast`; fixed8 is 8 bits, of which `bits` are whole."""

    step: AnyFloats
    downcast: Downcast = "float32"
    bits: int = 4

    def __post_init__(self) -> None:
        if self.downcast not in _DOWNCASTS:
            raise SourceError(f"downcast is {self.downcast!r}, expected one of {', '.join(_DOWNCASTS)}")

    def of(self, weight: Array, step: Array) -> Array:
        """The frozen part of rows, whose initial steps by column are `step`."""
        x: Floats = np.divide(weight.astype(np.float32), step.astype(np.float32), dtype=np.float32)
        if self.downcast == "bfloat16":
            x = _bfloat16(x)
        elif self.downcast == "fixed8":
            unit = float(1 << 8 - self.bits)
            x = (np.clip(np.rint(x.astype(np.float64) * unit), -128, 127) / unit).astype(np.float32)
        return f64(x)


@dataclass(frozen=True, kw_only=True, eq=False)
class Inside(Delta):
    """step, zero, offset, initial.step: (n_out, groups); zero holds whole numbers. low, high: least and largest code, at most 255 apart."""

    lora: LoRA
    step: AnyFloats
    low: int
    high: int
    zero: AnyFloats | None = None
    offset: AnyFloats | None = None
    initial: Initial | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.high - self.low <= 255:
            raise SourceError(f"codes from {self.low} to {self.high} are not 2 to 256 different ones")
        n_out, n_in = self.lora.shape
        groups = self.step.shape[-1] if self.step.ndim == 2 else 0
        if not groups or self.step.shape[0] != n_out or n_in % groups:
            raise ShapeError(f"steps of shape {list(self.step.shape)} do not divide a matrix of {[n_out, n_in]} into groups of columns")
        initial = None if self.initial is None else self.initial.step
        for what, values in (("zero points", self.zero), ("offsets", self.offset), ("initial steps", initial)):
            if values is not None and values.shape != self.step.shape:
                raise ShapeError(f"{what} have shape {list(values.shape)}, steps {list(self.step.shape)}: there must be one each")
        for what, values in (("steps", self.step), ("initial steps", initial)):
            if values is not None and not (values > 0).all():
                raise SourceError(
                    f"{what} must be above 0, found {values.min():g}. Training has not finished well; get a sound checkpoint."
                )
        if self.zero is not None and (self.zero != np.rint(self.zero)).any():
            raise SourceError("zero points must be whole numbers. Round them as the method's own integer export does.")
        if self.zero is not None and self.offset is not None:
            raise SourceError("a quantizer has zero points or offsets, not both")
        if self.initial is not None and (self.zero is not None or self.offset is not None):
            raise SourceError("a quantizer whose adapter is in units of the step is symmetric: it has no zero points and no offsets")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.lora.shape

    def codes(self, weight: Array) -> Array:
        """Whole numbers from low to high, (n_out, n_in), as float64."""
        step = self._by_column(self.step)
        if self.initial is not None:
            x = self.initial.of(weight, self._by_column(self.initial.step)) + self.lora.change()
        else:
            offset = 0.0 if self.offset is None else self._by_column(self.offset)
            x = (weight + self.lora.change() - offset) / step
        zero = 0.0 if self.zero is None else self._by_column(self.zero)
        return np.clip(np.rint(x) + zero, self.low, self.high)

    def apply(self, weight: Array, base: Array | None = None) -> Array:
        zero = 0.0 if self.zero is None else self._by_column(self.zero)
        offset = 0.0 if self.offset is None else self._by_column(self.offset)
        return (self.codes(weight) - zero) * self._by_column(self.step) + offset

    def rows(self, start: int, stop: int) -> Inside:
        part = slice(start, stop)
        initial = None if self.initial is None else replace(self.initial, step=self.initial.step[part])
        return replace(
            self,
            lora=self.lora.rows(start, stop),
            step=self.step[part],
            zero=None if self.zero is None else self.zero[part],
            offset=None if self.offset is None else self.offset[part],
            initial=initial,
        )

    def quantized(self, base: LazyTensor) -> LazyTensor:
        """The tensor in a grid that holds codes and steps: ggml's where that is the same one, else one of `edgeq.group_grids`."""
        kind, stored = self._grid()
        shape = (self.lora.shape[0], self.lora.shape[1])

        def read(start: int, stop: int) -> Bytes:
            if stop <= start:
                return np.empty((0, kind.row_bytes(shape[1])), dtype=np.uint8)
            codes = self.rows(start, stop).codes(f64(base.decode(start, stop)))
            return kind.pack((codes - self.low).astype(np.uint8), self.step[start:stop], None if stored is None else stored[start:stop])

        tensor = LazyTensor(shape=shape, grid=kind, read=read, origin=base.origin)
        targets = map(grid, _NARROW if kind.code_bits <= 4 else _WIDE)
        same = next((target for target in targets if recodes(kind, target) and self._in_half(target.name)), None)
        return tensor if same is None else recoded(tensor, same)

    def _in_half(self, target: str) -> bool:
        """Whether F16, which ggml's blocks store, holds every step, and for Q4_1 every least value."""
        least = self.low * f64(self.step) + f64(self.offset) if self.offset is not None else -self._zeros() * f64(self.step)
        return all(is_exact(values, values, F32) for values in ((self.step, least) if target == "Q4_1" else (self.step,)))

    def _grid(self) -> tuple[GroupGrid, AnyFloats | None]:
        """The grid of codes counted from low, and the zero points it stores; None when all are the same whole number."""
        zeros = self._zeros()
        largest = self.high - self.low
        bits = largest.bit_length()
        whole = self.offset is None and zeros.min() >= 0 and zeros.max() <= min(1 << bits, 255)
        first = float(zeros[0, 0])
        constant = whole and bool((zeros == first).all())
        kind = group_grid(
            f"{bits}-bit with its own steps",
            code_bits=bits,
            block_size=self.lora.shape[1] // self.step.shape[1],
            scale="F64" if self.step.dtype == np.float64 else "F32",
            zero="" if constant else "U8" if whole else "F64",
            center=int(first) if constant else 0,
        )
        return kind, None if constant else zeros

    def _zeros(self) -> Array:
        """Zero points of codes counted from low."""
        if self.offset is not None:
            return -self.low - f64(self.offset) / f64(self.step)
        return np.zeros(self.step.shape) - self.low if self.zero is None else f64(self.zero) - self.low

    def _by_column(self, values: AnyFloats) -> Array:
        return np.repeat(f64(values), self.lora.shape[1] // values.shape[1], axis=1)


def _bfloat16(x: Floats) -> Floats:
    """float32 rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)
