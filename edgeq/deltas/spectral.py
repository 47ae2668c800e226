"""Kinds with a few coefficients in another basis: FourierFT, WaveFT, QWHA (Walsh-Hadamard), C3A (circulant blocks); SHiRA in none.

FourierFT: Gao et al. 2024, arXiv:2405.03003. WaveFT: arXiv:2505.12532. QWHA: arXiv:2509.17428. C3A: Chen et al. 2024,
arXiv:2407.19342. SHiRA: Bhardwaj et al. 2024, arXiv:2406.13175.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgeq.deltas.delta import Additive, AnyFloats, Array, Delta, Indices, Sparse, f64
from edgeq.deltas.wavelets import reconstruct
from edgeq.errors import ShapeError


@dataclass(frozen=True, kw_only=True, eq=False)
class Entries:
    """Few values of a matrix of shape `shape`, at distinct (rows, cols)."""

    rows: Indices
    cols: Indices
    values: AnyFloats
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        if not len(self.rows) == len(self.cols) == len(self.values):
            raise ShapeError(f"{len(self.values)} values have {len(self.rows)} row and {len(self.cols)} column positions")
        n_rows, n_cols = self.shape
        within = (self.rows >= 0) & (self.rows < n_rows) & (self.cols >= 0) & (self.cols < n_cols)
        if not within.all():
            first = int(np.argmin(within))
            raise ShapeError(f"position ({self.rows[first]}, {self.cols[first]}) is outside a matrix of {n_rows} x {n_cols}")

    def dense(self) -> Array:
        """Later entries win where a position occurs twice, as they do in PEFT."""
        matrix = np.zeros(self.shape)
        matrix[self.rows, self.cols] = self.values
        return matrix

    def summed(self) -> Array:
        """Entries at the same position add up, as they do in torch's sparse matrices."""
        matrix = np.zeros(self.shape)
        np.add.at(matrix, (self.rows, self.cols), f64(self.values))
        return matrix


@dataclass(frozen=True, kw_only=True, eq=False)
class SHiRA(Additive):
    """Single elements added to."""

    entries: Entries
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entries.shape

    def change(self) -> Array:
        return self.scale * self.entries.summed()

    def sparse(self, base: Array | None = None) -> Sparse:
        flat = self.entries.rows.astype(np.intp) * self.shape[1] + self.entries.cols
        places, inverse = np.unique(flat, return_inverse=True)
        values = np.zeros(len(places))
        np.add.at(values, inverse, self.scale * f64(self.entries.values))
        return Sparse(rows=places // self.shape[1], cols=places % self.shape[1], values=values)

    def rows(self, start: int, stop: int) -> Delta:
        entries = self.entries
        inside = (entries.rows >= start) & (entries.rows < stop)
        part = Entries(
            rows=entries.rows[inside] - start,
            cols=entries.cols[inside],
            values=entries.values[inside],
            shape=(stop - start, entries.shape[1]),
        )
        return SHiRA(entries=part, scale=self.scale)


@dataclass(frozen=True, kw_only=True, eq=False)
class Fourier(Additive):
    """scale * real part of the inverse 2-D Fourier transform of the entries."""

    entries: Entries
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entries.shape

    def change(self) -> Array:
        return self.scale * np.fft.ifft2(self.entries.dense()).real


@dataclass(frozen=True, kw_only=True, eq=False)
class Wavelet(Additive):
    """scale * one level of inverse wavelet transform of the entries, which lie centred in a matrix wide enough for the filter."""

    entries: Entries
    scale: float
    family: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entries.shape

    def change(self) -> Array:
        return self.scale * reconstruct(self.entries.dense(), self.family)


@dataclass(frozen=True, kw_only=True, eq=False)
class Hadamard(Additive):
    """QWHA: scale * entries @ H.T / n_in, with the Hadamard matrix of Sylvester's construction (n_in a power of two)."""

    entries: Entries
    scale: float

    def __post_init__(self) -> None:
        n = self.entries.shape[1]
        if n & (n - 1):
            raise ShapeError(
                f"QWHA needs inputs of a power of two here, this module has {n}. Its authors' other Hadamard tables are not a published "
                "format; merge the adapter with their code first."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entries.shape

    def change(self) -> Array:
        return self.scale * hadamard_transform(self.entries.dense()) / self.entries.shape[1]


def hadamard_transform(rows: Array) -> Array:
    """rows @ H for the symmetric Sylvester matrix H, in n log n."""
    result, n, step = rows.copy(), rows.shape[1], 1
    while step < n:
        pairs = result.reshape(len(rows), -1, 2, step)
        result = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2).reshape(rows.shape)
        step *= 2
    return result


@dataclass(frozen=True, kw_only=True, eq=False)
class Circulant(Additive):
    """C3A: blocks (m, n, size), each the first row of a circulant block; divided by n_in."""

    kernel: AnyFloats

    @property
    def shape(self) -> tuple[int, ...]:
        m, n, size = self.kernel.shape
        return (m * size, n * size)

    def change(self) -> Array:
        m, n, size = self.kernel.shape
        shift = (np.arange(size)[None, :] - np.arange(size)[:, None]) % size
        blocks = f64(self.kernel)[:, :, shift]  # (m, n, size out, size in)
        return blocks.transpose(0, 2, 1, 3).reshape(m * size, n * size) / (n * size)
