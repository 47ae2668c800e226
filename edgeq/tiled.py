"""Matrix products on the calling thread alone, for code that has threads of its own.

numpy's BLAS starts as many threads as there are cores for every larger product; two callers, or other work on the machine, make them wait
for each other. OpenBLAS computes products of up to 64 x 64 x 64 where it is called (interface/gemm.c), and numpy passes a stack of them on
one by one without the GIL. On two busy cores, cutting SmolLM2-135M with the products of this module takes a third of the processor time.
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
    out = np.zeros((rows * _SIDE, columns * _SIDE), dtype=a.dtype)
    tiles = out.reshape(rows, _SIDE, columns, _SIDE).swapaxes(1, 2)
    for start in range(0, k, _SIDE):
        depth = min(_SIDE, k - start)
        left = np.zeros((rows * _SIDE, depth), dtype=a.dtype)
        left[:m] = a[:, start : start + depth]
        right = np.zeros((depth, columns * _SIDE), dtype=a.dtype)
        right[:, :n] = b[start : start + depth]
        stack = np.ascontiguousarray(right.reshape(depth, columns, _SIDE).swapaxes(0, 1))
        tiles += np.matmul(left.reshape(rows, 1, _SIDE, depth), stack)
    return out[:m, :n]


def times(a: npt.NDArray[Real], x: npt.NDArray[Real]) -> npt.NDArray[Real]:
    """a (m, n) @ x (n,)."""
    result: npt.NDArray[Real] = np.einsum("ij,j->i", a, x)
    return result
