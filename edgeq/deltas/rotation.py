"""Kinds that turn the input: OFT, BOFT and HRA. W @ R.T with R orthogonal, or nearly so.

OFT: Qiu et al. 2023, arXiv:2306.07280, in the input-side form of OFTv2 (arXiv:2506.19847), whose Cayley-Neumann series stands in
for the inverse. BOFT: Liu et al. 2024, arXiv:2311.06243. HRA: Yuan et al. 2024, arXiv:2405.17484.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgeq.deltas.delta import AnyFloats, Array, Delta, Factors, f64, low_rank, need_shape
from edgeq.errors import ShapeError


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockRotation(Delta):
    """W @ block_diag(blocks).T; blocks (n_in / size, size, size)."""

    blocks: Array
    n_out: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n_out, self.blocks.shape[0] * self.blocks.shape[1])

    def apply(self, weight: Array, base: Array | None = None) -> Array:
        n, size, _ = self.blocks.shape
        return np.einsum("onk,nck->onc", weight.reshape(-1, n, size), self.blocks, optimize=True).reshape(weight.shape)

    def rows(self, start: int, stop: int) -> Delta:
        return BlockRotation(blocks=self.blocks, n_out=stop - start)


@dataclass(frozen=True, kw_only=True, eq=False)
class Butterfly(Delta):
    """BOFT: scale[:, None] * (W @ R.T), R = R_m ... R_1, each P_i block_diag(blocks_i) P_i.T with a butterfly permutation.

    blocks (m, n, size, size) orthogonal; orders (m, n_in): row j of P_i is unit vector orders[i, j]. scale (n_out,).
    """

    blocks: Array
    orders: tuple[tuple[int, ...], ...]
    scale: AnyFloats

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.scale), self.blocks.shape[1] * self.blocks.shape[2])

    def apply(self, weight: Array, base: Array | None = None) -> Array:
        result = weight
        for blocks, order in zip(self.blocks, self.orders, strict=True):
            # W @ (P D P.T).T = ((W P) @ D.T) P.T, where column order[j] of P is unit vector j
            index = np.argsort(order)
            inner = BlockRotation(blocks=blocks, n_out=len(weight)).apply(result[:, index])
            result = inner[:, np.argsort(index)]
        return f64(self.scale)[:, None] * result

    def rows(self, start: int, stop: int) -> Delta:
        return Butterfly(blocks=self.blocks, orders=self.orders, scale=self.scale[start:stop])


@dataclass(frozen=True, kw_only=True, eq=False)
class Householder(Delta):
    """HRA: W @ (1 - 2 u_1 u_1.T) ... (1 - 2 u_r u_r.T), u (n_in, r) columns made unit length.

    orthogonal: columns are made orthogonal to each other first (Gram-Schmidt).
    """

    u: AnyFloats
    n_out: int
    orthogonal: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n_out, len(self.u))

    def units(self) -> Array:
        u = f64(self.u)
        if not self.orthogonal:
            return u / np.linalg.norm(u, axis=0)
        columns: list[Array] = []
        for column in u.T:
            for other in columns:
                column = column - (other @ column) * other
            columns.append(column / np.linalg.norm(column))
        return np.stack(columns, axis=1)

    def left(self, weight: Array) -> Array:
        """(n_out, r): the change of `weight` is this @ units.T."""
        u, result, columns = self.units(), weight, []
        for i in range(u.shape[1]):
            columns.append(-2.0 * (result @ u[:, i]))
            result = result + np.outer(columns[-1], u[:, i])
        return np.stack(columns, axis=1)

    def apply(self, weight: Array, base: Array | None = None) -> Array:
        return weight + self.left(weight) @ self.units().T

    def factors(self, base: Array | None = None) -> Factors | None:
        return None if base is None else low_rank(self.units().T, self.left(base))

    def rows(self, start: int, stop: int) -> Delta:
        return Householder(u=self.u, n_out=stop - start, orthogonal=self.orthogonal)


def skew(vectors: AnyFloats, size: int) -> Array:
    """Skew-symmetric matrices (n, size, size) from their strict upper triangles (n, size * (size - 1) / 2), row by row."""
    need_shape("the rotation's parameters", vectors, (len(vectors), size * (size - 1) // 2))
    matrices = np.zeros((len(vectors), size, size))
    rows, cols = np.triu_indices(size, 1)
    matrices[:, rows, cols] = vectors
    return matrices - matrices.swapaxes(1, 2)


def cayley(matrices: Array) -> Array:
    """(1 - Q) (1 + Q)^-1 for skew Q: orthogonal."""
    one = np.eye(matrices.shape[-1])
    return f64(np.linalg.solve((one + matrices).swapaxes(1, 2), (one - matrices).swapaxes(1, 2))).swapaxes(1, 2)


def cayley_neumann(matrices: Array, terms: int) -> Array:
    """1 + 2 Q + 2 Q^2 + ... + Q^(terms - 1): the last term counts once. As PEFT sums it, which for terms 1 to 4 differs in detail."""
    one: Array = np.broadcast_to(np.eye(matrices.shape[-1], dtype=np.float64), matrices.shape)
    if terms < 2:
        return one.copy()
    result = one + 2.0 * matrices
    if terms == 2:
        return result
    power = matrices @ matrices
    result = result + 2.0 * power
    for _ in range(3, terms - 1):
        power = power @ matrices
        result = result + 2.0 * power
    return result + power @ matrices


def constrain(matrices: Array, eps: float) -> Array:
    """COFT: every block pulled back to Frobenius norm eps / sqrt(number of blocks)."""
    limit = eps / np.sqrt(len(matrices))
    norms = np.linalg.norm(matrices, axis=(1, 2), keepdims=True)
    factor = np.minimum(1.0, limit / np.maximum(norms, np.finfo(np.float64).tiny))
    return matrices * factor


def butterfly_order(n: int, n_blocks: int, half: int) -> tuple[int, ...]:
    """Even pieces of `half` values before odd ones, within each of n_blocks stretches of n values."""
    if n_blocks < 1 or half < 1 or n % n_blocks or (n // n_blocks) % (2 * half):
        raise ShapeError(f"{n} inputs do not divide into {n_blocks} butterflies of pieces of {half}")
    pieces = np.arange(n).reshape(n_blocks, -1, half)
    return tuple(np.concatenate([pieces[:, 0::2], pieces[:, 1::2]], axis=1).reshape(-1).tolist())
