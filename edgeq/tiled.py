"""Matrix products on the calling thread alone, for code that has threads of its own.

numpy's BLAS starts as many threads as there are cores for every larger product; two callers, or other work on the machine, make them wait
for each other. OpenBLAS computes products of up to 64 x 64 x 64 where it is called (interface/gemm.c), and numpy passes a stack of them on
one by one without the GIL, tiles of larger arrays as they lie. On two busy cores, cutting SmolLM2-135M with the products of this module
takes a third of the processor time.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

_SIDE = 64

Real = TypeVar("Real", np.float32, np.float64)


def product(a: npt.NDArray[Real], b: npt.NDArray[Real]) -> npt.NDArray[Real]:
    """a (m, k) @ b (k, n), both of one type."""
    (m, k), n = a.shape, b.shape[1]
    rows, columns = -(-m // _SIDE), -(-n // _SIDE)
    a, b = _padded(a, rows * _SIDE, k), _padded(b, k, columns * _SIDE)
    out = np.empty((rows * _SIDE, columns * _SIDE), dtype=a.dtype)
    if k == 0:
        out[:] = 0
    part = np.empty_like(out) if k > _SIDE else out
    for start in range(0, k, _SIDE):
        depth, target = min(_SIDE, k - start), part if start else out
        left = a[:, start : start + depth].reshape(rows, 1, _SIDE, depth)
        right = b[start : start + depth].reshape(depth, columns, _SIDE).swapaxes(0, 1)
        np.matmul(left, right, out=target.reshape(rows, _SIDE, columns, _SIDE).swapaxes(1, 2))
        if start:
            out += part
    return out[:m, :n]


def _padded(a: npt.NDArray[Real], m: int, n: int) -> npt.NDArray[Real]:
    """a with zeros up to (m, n)."""
    if a.shape == (m, n):
        return a
    whole = np.zeros((m, n), dtype=a.dtype)
    whole[: a.shape[0], : a.shape[1]] = a
    return whole


def times(a: npt.NDArray[Real], x: npt.NDArray[Real]) -> npt.NDArray[Real]:
    """a (m, n) @ x (n,)."""
    result: npt.NDArray[Real] = np.einsum("ij,j->i", a, x)
    return result
