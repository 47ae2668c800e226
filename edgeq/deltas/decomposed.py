"""Kinds whose fixed parts are a decomposition of the base: LoLDU and KaSA.

LoLDU: Shi et al. 2024, arXiv:2410.13618. KaSA: Wang et al. 2024, arXiv:2412.06071. Decompositions are of the base in float64; a base
that differs from the one trained on gives other directions, and nothing here can tell: keep the base's fingerprint beside such
adapters. LoRA-XS without its factors is not among them: singular vectors have arbitrary signs, which its core depends on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgeq.deltas.delta import AnyFloats, Array, Delta, Factors, f64, low_rank
from edgeq.deltas.lora import LoRA
from edgeq.errors import ShapeError


@dataclass(frozen=True, kw_only=True, eq=False)
class LoLDU(Delta):
    """W + scale * P L_r (diag(z) - D_r) U_r, with base = P L diag(D) U, L and U of unit diagonal, r = len(z)."""

    z: AnyFloats
    base_shape: tuple[int, int]
    scale: float

    def __post_init__(self) -> None:
        if self.z.ndim != 1 or not 1 <= len(self.z) <= min(self.base_shape):
            raise ShapeError(f"LoLDU's diagonal has shape {list(self.z.shape)}; expected 1 to {min(self.base_shape)} values")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base_shape

    def factors(self, base: Array | None = None) -> Factors | None:
        if base is None:
            return None
        left, diagonal, right = ldu(base)
        rank = len(self.z)
        return low_rank((f64(self.z) - diagonal[:rank])[:, None] * right[:rank], self.scale * left[:, :rank])

    def apply(self, weight: Array, base: Array | None = None) -> Array:
        left, diagonal, right = ldu(weight if base is None else base)
        rank = len(self.z)
        return weight + self.scale * (left[:, :rank] * (f64(self.z) - diagonal[:rank])) @ right[:rank]


@dataclass(frozen=True, kw_only=True, eq=False)
class KaSA(Delta):
    """The base without its `lora.rank` smallest singular values, plus a LoRA (whose diagonal is folded in).

    A base that has lost them already is left as it is.
    """

    lora: LoRA

    @property
    def shape(self) -> tuple[int, ...]:
        return self.lora.shape

    def apply(self, weight: Array, base: Array | None = None) -> Array:
        u, s, v = np.linalg.svd(weight if base is None else base, full_matrices=False)
        kept = len(s) - self.lora.rank
        if kept < 1:
            raise ShapeError(
                f"KaSA drops {self.lora.rank} singular values of a matrix that has {len(s)}. The adapter does not fit this base."
            )
        return weight - (u[:, kept:] * s[kept:]) @ v[kept:] + self.lora.change()


def ldu(matrix: Array) -> tuple[Array, Array, Array]:
    """P @ L (n_out, k), the pivots (k,), and U with unit diagonal (k, n_in), k the smaller dimension; partial pivoting.

    Raises ShapeError for a matrix whose elimination meets a pivot of zero.
    """
    work, k = matrix.copy(), min(matrix.shape)
    order = np.arange(len(matrix))
    for i in range(k):
        pivot = i + int(np.argmax(np.abs(work[i:, i])))
        if work[pivot, i] == 0.0:
            raise ShapeError(f"the base has no LDU decomposition: pivot {i} is zero. LoLDU adapters need a base of full rank.")
        if pivot != i:
            work[[i, pivot]], order[[i, pivot]] = work[[pivot, i]], order[[pivot, i]]
        work[i + 1 :, i] /= work[i, i]
        work[i + 1 :, i + 1 :] -= np.outer(work[i + 1 :, i], work[i, i + 1 :])
    left = np.empty((len(matrix), k))
    left[order] = np.tril(work[:, :k], -1) + np.eye(len(matrix), k)
    diagonal = np.diagonal(work)[:k].copy()
    right = np.triu(work[:k] / diagonal[:, None], 1) + np.eye(k, matrix.shape[1])
    return left, diagonal, right
