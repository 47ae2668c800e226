"""Kinds that multiply rows or columns by a vector, or turn pairs of outputs: IA3 and RoAd.

IA3: Liu et al. 2022, arXiv:2205.05638. RoAd: Liao and Monz 2024, arXiv:2409.00119.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgeq.deltas.delta import AnyFloats, Array, Delta, f64, need_shape


@dataclass(frozen=True, kw_only=True, eq=False)
class Scale(Delta):
    """W * vector along `axis`: 0 scales outputs (rows, and the bias with them), 1 inputs (columns)."""

    vector: AnyFloats
    base_shape: tuple[int, ...]
    axis: int

    def __post_init__(self) -> None:
        need_shape("the scaling vector", self.vector, (self.base_shape[self.axis],))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base_shape

    def apply(self, weight: Array, base: Array | None = None) -> Array:
        vector = f64(self.vector)
        return weight * (vector.reshape(-1, *[1] * (weight.ndim - 1)) if self.axis == 0 else vector)

    def rows(self, start: int, stop: int) -> Delta:
        vector = self.vector[start:stop] if self.axis == 0 else self.vector
        return Scale(vector=vector, base_shape=(stop - start, *self.base_shape[1:]), axis=self.axis)


@dataclass(frozen=True, kw_only=True, eq=False)
class RoAd(Delta):
    """Outputs i and i + group/2 of every group turned together: y_i = c1_i x_i - s1_i x_j, y_j = s2_i x_i + c2_i x_j.

    cos and sin (n_out,), by output: the first half of a group holds c1 and s1, the second c2 and s2. Applies to weight and bias alike.
    """

    cos: AnyFloats
    sin: AnyFloats
    group: int
    base_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        need_shape("RoAd's cosines", self.cos, self.base_shape[:1])
        need_shape("RoAd's sines", self.sin, self.base_shape[:1])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base_shape

    def apply(self, weight: Array, base: Array | None = None) -> Array:
        halves = weight.reshape(-1, 2, self.group // 2, *weight.shape[1:])
        partner = np.stack([-halves[:, 1], halves[:, 0]], axis=1).reshape(weight.shape)
        column = (-1, *[1] * (weight.ndim - 1))
        return f64(self.cos).reshape(column) * weight + f64(self.sin).reshape(column) * partner
