"""Kinds that repeat or mix small blocks: MiSS (once Bone), GraLoRA, RandLoRA.

MiSS: Kang and Yin 2024, arXiv:2409.15371. GraLoRA: Jung et al. 2025, arXiv:2505.20355. RandLoRA: Albert et al. 2025,
arXiv:2502.00987.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from edgeq.deltas.delta import AnyFloats, Array, Delta, f64, need_shape
from edgeq.deltas.lora import LoRA
from edgeq.errors import ShapeError


def miss(block: AnyFloats, n_in: int) -> LoRA:
    """W plus block.T (n_out, rank) repeated over the inputs, the last copy cut short: low rank with a tiled identity as `a`."""
    rank = len(block)
    return LoRA(a=np.tile(np.eye(rank), (1, -(-n_in // rank)))[:, :n_in], b=f64(block).T)


@dataclass(frozen=True, kw_only=True, eq=False)
class MissBat(Delta):
    """MiSS's "bat" form: every rank x rank block of W, in the block row m, becomes w + w @ block_m + block_m.

    block (n_out / rank, rank, rank).
    """

    block: AnyFloats
    n_in: int

    def __post_init__(self) -> None:
        if self.block.ndim != 3 or self.block.shape[1] != self.block.shape[2] or self.n_in % self.block.shape[1]:
            raise ShapeError(f"MiSS blocks of shape {list(self.block.shape)} do not tile {self.n_in} inputs")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.block.shape[0] * self.block.shape[1], self.n_in)

    def apply(self, weight: Array, base: Array | None = None) -> Array:
        m, rank, _ = self.block.shape
        tiles = weight.reshape(m, rank, self.n_in // rank, rank).transpose(2, 0, 1, 3)  # (block columns, m, rank, rank)
        block = f64(self.block)
        return (tiles + tiles @ block + block).transpose(1, 2, 0, 3).reshape(weight.shape)

    def rows(self, start: int, stop: int) -> Delta | None:
        rank = self.block.shape[1]
        return None if start % rank or stop % rank else replace(self, block=self.block[start // rank : stop // rank])


def gralora(a: AnyFloats, b: AnyFloats, scale: float) -> LoRA:
    """GraLoRA: k x k blocks of rank r / k each, as one LoRA of rank r * k.

    a (k, n_in / k, r), b (k, r, n_out / k). Output block j is made of what slice j of every input block's r directions gives.
    """
    k, width, rank = a.shape
    need_shape("gralora_B", b, (k, rank, b.shape[2]))
    if rank % k:
        raise ShapeError(f"GraLoRA's rank {rank} does not divide into {k} blocks")
    part, height = rank // k, b.shape[2]
    wide = np.zeros((k, k, part, k * width))
    tall = np.zeros((k * height, k, k, part))
    for i in range(k):  # input block
        for j in range(k):  # output block
            wide[i, j, :, i * width : (i + 1) * width] = f64(a)[i, :, j * part : (j + 1) * part].T
            tall[j * height : (j + 1) * height, i, j] = f64(b)[j, i * part : (i + 1) * part].T
    return LoRA(a=wide.reshape(-1, k * width), b=tall.reshape(k * height, -1), scale=scale)


def randlora(a: AnyFloats, b: AnyFloats, strengths: AnyFloats, gamma: AnyFloats, *, shape: tuple[int, int], scale: float) -> LoRA:
    """Random bases b and a, weighed by strengths and gamma, put the way round the module is.

    a (rank, 1, >= small), b (>= large, >= n, rank) are shared random bases; strengths (rank, n), gamma (n, small), where small and
    large are the module's dimensions. The rank of the whole is rank * n, which training chose to reach the full one.
    """
    small, large = min(shape), max(shape)
    rank, n = strengths.shape
    need_shape("randlora_gamma", gamma, (n, small))
    if a.shape[0] != rank or a.shape[2] < small or b.shape[0] < large or b.shape[1] < n or b.shape[2] != rank:
        raise ShapeError(
            f"RandLoRA's bases {list(a.shape)} and {list(b.shape)} are too small for a module of {shape[0]} x {shape[1]} and {n} bases"
        )
    # thin rows count (direction, base), wide columns (base, direction): PEFT multiplies them as they stand, so that is what was trained
    thin = (f64(strengths)[:, :, None] * f64(a)[:, :, :small] * f64(gamma)[None]).reshape(rank * n, small)
    wide = f64(b)[:large, :n].reshape(large, n * rank)
    return LoRA(a=thin, b=wide, scale=scale) if small == shape[1] else LoRA(a=wide.T, b=thin.T, scale=scale)
