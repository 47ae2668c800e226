"""One level of the inverse 2-D wavelet transform, with Daubechies' filters computed rather than listed.

Daubechies 1992, "Ten Lectures on Wavelets", section 6.1: the filter of order N is the spectral factor with all roots inside the
unit circle of ((1 + z) / 2)^2N times the binomial polynomial of degree N - 1. Orders up to 10 come out to 1e-9 this way in float64.
"""

from __future__ import annotations

from functools import cache
from math import comb

import numpy as np

from edgeq.deltas.delta import Array
from edgeq.errors import UnsupportedError

MAX_ORDER = 10
_KNOWN = {"haar": 1, "sym2": 2, "sym3": 3} | {f"db{n}": n for n in range(1, MAX_ORDER + 1)}  # the first symlets are Daubechies'


def order(family: str) -> int:
    """Order of a filter by its usual name. Raises UnsupportedError for other families."""
    if family not in _KNOWN:
        raise UnsupportedError(
            f"wavelet {family!r} is not supported; supported: haar, db1 to db{MAX_ORDER}, sym2, sym3. Merge this adapter with PEFT first."
        )
    return _KNOWN[family]


@cache
def daubechies(n: int) -> tuple[float, ...]:
    """The 2n coefficients of the reconstruction low-pass filter; their squares sum to 1."""
    # y = (2 - z - 1/z) / 4; each root y of the binomial polynomial gives a pair z, 1/z, of which the one inside the circle is taken
    roots = np.roots([comb(n - 1 + k, k) for k in range(n - 1, -1, -1)])
    inside = []
    for y in roots:
        pair = np.roots([1.0, 4.0 * y - 2.0, 1.0])
        inside.append(pair[np.argmin(np.abs(pair))])
    filter_ = np.poly([-1.0] * n + inside).real
    return tuple((filter_ * np.sqrt(2.0) / filter_.sum()).tolist())


def margin(family: str) -> int:
    """Rows and columns by which coefficients must exceed the matrix they make."""
    return 2 * order(family) - 2


def reconstruct(entries: Array, family: str) -> Array:
    """Inverse transform of coefficients given in a matrix of the result's size, placed centred among zeros of the transform's size.

    Quarters of the padded matrix are approximation, horizontal, vertical and diagonal detail, in reading order; horizontal detail is
    high from row to row, so it is synthesized with the lower half. What the transform returns in excess is cut off evenly.
    """
    low = np.array(daubechies(order(family)))
    high = low[::-1] * (-1.0) ** np.arange(len(low))
    n_rows, n_cols = entries.shape
    padded = np.zeros([n + margin(family) + (n + margin(family)) % 2 for n in entries.shape])
    top, left = ((have - n) // 2 for have, n in zip(padded.shape, entries.shape, strict=True))
    padded[top : top + n_rows, left : left + n_cols] = entries
    upper, lower = np.split(padded, 2)
    (approximation, horizontal), (vertical, diagonal) = np.split(upper, 2, axis=1), np.split(lower, 2, axis=1)
    quarters = np.block([[approximation, vertical], [horizontal, diagonal]])
    result = _synthesize(_synthesize(quarters, low, high).T, low, high).T
    top, left = ((have - n) // 2 for have, n in zip(result.shape, entries.shape, strict=True))
    return result[top : top + n_rows, left : left + n_cols]


def _synthesize(halves: Array, low: Array, high: Array) -> Array:
    """Along rows: the first half of them through the low-pass filter, the second through the high-pass one, up by two, ends cut."""
    n = len(halves) // 2
    whole = np.zeros((2 * n + len(low) - 2, halves.shape[1]))
    for k in range(len(low)):
        whole[k : k + 2 * n : 2] += low[k] * halves[:n] + high[k] * halves[n:]
    cut = (2 * len(low) - 3) // 2
    return whole[cut : len(whole) - cut] if cut else whole
