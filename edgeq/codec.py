"""A codec of few bits for tensors whose values are about normally distributed, as trained adapters' are.

A tensor is standardized by its own mean and standard deviation, and every value becomes the number of the nearest of 2^bits levels: the
ones that lose least on a normal distribution (Lloyd 1957; Max 1960). Decoded, a value is mean + deviation * level. For one bit the levels
are +- sqrt(2 / pi). Costs bits per value and two floats per tensor. That adapters bear this well: Jie et al. 2023, arXiv:2307.16867.

Codes are packed from the low bits of a byte up, in row-major order; the last byte is filled with zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt

from edgeq.errors import PlanError, SourceError
from edgeq.tensors import Bytes, Floats

BITS = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True, eq=False)
class Coded:
    """codes: packed, uint8 (ceil(values * bits / 8),)."""

    codes: Bytes
    bits: int
    shape: tuple[int, ...]
    mean: float
    deviation: float

    def __post_init__(self) -> None:
        check_bits(self.bits)
        expected = coded_bytes(math.prod(self.shape), self.bits)
        if self.codes.shape != (expected,) or not (math.isfinite(self.mean) and 0 <= self.deviation < math.inf):
            raise SourceError(
                f"{self.codes.size} bytes of {self.bits}-bit codes, mean {self.mean} and deviation {self.deviation} cannot be those of a "
                f"tensor of shape {list(self.shape)}, which takes {expected} bytes. Get the file again."
            )


def check_bits(bits: int) -> None:
    if bits not in BITS:
        raise PlanError(f"{bits} bits per value are not supported; choose one of {', '.join(map(str, BITS))}")


def coded_bytes(n_values: int, bits: int) -> int:
    return -(-n_values * bits // 8)


def encode(values: npt.NDArray[np.floating], bits: int, *, mean: float | None = None, deviation: float | None = None) -> Coded:
    """mean, deviation: standardize by these instead of the tensor's own; with those of a decoded tensor, its codes come back.

    Raises SourceError for values that are not finite, PlanError for bits other than 1, 2, 4 and 8.
    """
    check_bits(bits)
    x = values.astype(np.float64)
    if not np.isfinite(x).all():
        raise SourceError("values that are not finite cannot be coded. The adapter is damaged or its training diverged; get a sound one.")
    # what is stored are float32 numbers
    mean = float(np.float32(x.mean() if mean is None else mean))
    deviation = float(np.float32(x.std() if deviation is None else deviation))
    standard = (x - mean) / deviation if deviation else np.zeros_like(x)
    table = levels(bits)
    codes = np.searchsorted((table[1:] + table[:-1]) / 2, standard.reshape(-1)).astype(np.uint8)
    return Coded(codes=_pack(codes, bits), bits=bits, shape=values.shape, mean=mean, deviation=deviation)


def decode(coded: Coded) -> Floats:
    codes = _unpack(coded.codes, coded.bits, math.prod(coded.shape))
    return (coded.mean + coded.deviation * levels(coded.bits)[codes]).astype(np.float32).reshape(coded.shape)


def transposed(coded: Coded) -> Coded:
    """The codes of a matrix as those of its transpose."""
    codes = _unpack(coded.codes, coded.bits, math.prod(coded.shape)).reshape(coded.shape).T
    return replace(coded, codes=_pack(codes.reshape(-1), coded.bits), shape=codes.shape)


def _pack(codes: Bytes, bits: int) -> Bytes:
    per_byte = 8 // bits
    padded = np.zeros(-(-len(codes) // per_byte) * per_byte, dtype=np.uint8)
    padded[: len(codes)] = codes
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return np.bitwise_or.reduce(padded.reshape(-1, per_byte) << shifts, axis=1)


def _unpack(packed: Bytes, bits: int, n_values: int) -> Bytes:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (packed[:, None] >> shifts & np.uint8((1 << bits) - 1)).reshape(-1)[:n_values]


@cache
def levels(bits: int) -> npt.NDArray[np.float64]:
    """The 2^bits levels, rising, of least mean squared error on a standard normal distribution; symmetric about 0.

    Every level is the mean of what lies nearest to it. Newton's method on the positive half, from where levels of a fine quantizer lie:
    at quantiles of the density's cube root, which is normal with variance 3 (Panter and Dite 1951).
    """
    half = (1 << bits) // 2
    x = np.array([_quantile(0.5 + (i + 0.5) / (2 * half)) for i in range(half)]) * math.sqrt(3)
    for _ in range(100):
        edges = np.concatenate([[0.0], (x[1:] + x[:-1]) / 2, [math.inf]])
        tails = np.array([_tail(edge) for edge in edges])
        mass = tails[:-1] - tails[1:]
        density = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
        centre = (density[:-1] - density[1:]) / mass
        # how a centre follows its edges, which move half as far as a level next to them; those at 0 and infinity stay
        by_low = density[1:-1] * (centre[1:] - edges[1:-1]) / mass[1:] / 2
        by_high = density[1:-1] * (edges[1:-1] - centre[:-1]) / mass[:-1] / 2
        diagonal = 1 - np.concatenate([[0.0], by_low]) - np.concatenate([by_high, [0.0]])
        jacobian = np.diag(diagonal) - np.diag(by_low, -1) - np.diag(by_high, 1)
        step = np.linalg.solve(jacobian, x - centre)
        x = x - step
        if np.abs(step).max() < 1e-14:
            break
    return np.concatenate([-x[::-1], x])


def _tail(x: float) -> float:
    """Probability above x."""
    return math.erfc(x / math.sqrt(2)) / 2


def _quantile(p: float) -> float:
    """Where the standard normal distribution reaches p, for p of one half and more."""
    low, high = 0.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - _tail(middle) < p else (low, middle)
    return (low + high) / 2
