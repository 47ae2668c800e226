"""Kinds built on element-wise products: LoHa, LoKr (a Kronecker product) and HiRA.

LoHa and LoKr: LyCORIS, arXiv:2309.14859. HiRA: Huang et al. 2025, ICLR.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from edgeq.deltas.delta import Additive, AnyFloats, Array, Delta, Factors, f64, low_rank
from edgeq.deltas.lora import LoRA
from edgeq.errors import ShapeError


@dataclass(frozen=True, kw_only=True, eq=False)
class LoHa(Additive):
    """W + (b1 @ a1) * (b2 @ a2): of rank r1 * r2."""

    first: LoRA
    second: LoRA

    def __post_init__(self) -> None:
        if self.first.shape != self.second.shape:
            raise ShapeError(f"LoHa's products have shapes {list(self.first.shape)} and {list(self.second.shape)}, which differ")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.first.shape

    def change(self) -> Array:
        return self.first.change() * self.second.change()

    def factors(self, base: Array | None = None) -> Factors | None:
        one, two = self.first.factors(), self.second.factors()
        a = (one.a[:, None, :] * two.a[None, :, :]).reshape(-1, one.a.shape[1])
        b = (one.b[:, :, None] * two.b[:, None, :]).reshape(len(one.b), -1)
        return low_rank(a, b)

    def rows(self, start: int, stop: int) -> Delta:
        return LoHa(first=self.first.rows(start, stop), second=self.second.rows(start, stop))


@dataclass(frozen=True, kw_only=True, eq=False)
class LoKr(Additive):
    """W + scale * kron(left, right); `right` a matrix, or factors of one."""

    left: AnyFloats
    right: AnyFloats | LoRA
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.left.shape[0] * self.right.shape[0], self.left.shape[1] * self.right.shape[1])

    def change(self) -> Array:
        right = self.right.change() if isinstance(self.right, LoRA) else f64(self.right)
        return kron(self.scale * f64(self.left), right)

    def factors(self, base: Array | None = None) -> Factors | None:
        """kron(l, b a) = kron(l, b) kron(1, a): rank n_cols(l) * rank(right), where `right` has factors."""
        if not isinstance(self.right, LoRA):
            return None
        right = self.right.factors()
        if self.left.shape[1] * right.rank >= min(self.shape):
            return None
        return low_rank(kron(np.eye(self.left.shape[1]), right.a), kron(self.scale * f64(self.left), right.b))


@dataclass(frozen=True, kw_only=True, eq=False)
class HiRA(Delta):
    """W + base * (b @ a), element by element."""

    product: LoRA

    @property
    def shape(self) -> tuple[int, ...]:
        return self.product.shape

    def apply(self, weight: Array, base: Array | None = None) -> Array:
        return weight + (weight if base is None else base) * self.product.change()

    def rows(self, start: int, stop: int) -> Delta:
        return replace(self, product=self.product.rows(start, stop))


def kron(left: Array, right: Array) -> Array:
    """Kronecker product of two matrices, in float64."""
    shape = (left.shape[0] * right.shape[0], left.shape[1] * right.shape[1])
    return (left[:, None, :, None] * right[None, :, None, :]).reshape(shape)
