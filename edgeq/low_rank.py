"""Low-rank factors of a change of weights: of a given rank or a given energy, best in a metric of the inputs.

A change D of a matrix (n_out, n_in) costs E |D x|^2 when it is left out, x being what the matrix reads. With R = E[x x^T] = S S^T that
is the squared Frobenius norm of D S, so the best change of rank k is the truncated singular value decomposition of D S with S taken off
again (Eckart and Young 1936). Without second moments R is the identity. A change given as factors b @ a is decomposed by QR of both and
a small decomposition between them, and never multiplied out; a dense one by a randomized range finder where it is large (Halko et al.
2011, arXiv:0909.4061), with a fixed seed, so that the same input gives the same bytes.

Energy always means the sum of squared singular values, that is, E |D x|^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeq.deltas.delta import AnyFloats, Array, Factors, f64
from edgeq.errors import PlanError, ShapeError, SourceError

EXACT_SIZE = 512  # the smaller dimension up to which a dense change is decomposed whole: about a second
_OVERSAMPLING, _POWER_STEPS, _FIRST_WIDTH = 16, 3, 64
_LEAST_MOMENT = 1e-6  # of the mean: inputs that calibration never saw still count this much


class Metric:
    """Second moments of a matrix's inputs, as their root. moments: (n_in,) for those of each input alone, (n_in, n_in) for all, or None.

    Raises ShapeError for another shape than n_in asks for, SourceError for moments that are not finite or negative.
    """

    def __init__(self, moments: AnyFloats | None, n_in: int) -> None:
        self.root: Array | None = None
        self.inverse: Array | None = None
        if moments is None:
            return
        if moments.shape not in ((n_in,), (n_in, n_in)):
            raise ShapeError(f"second moments have shape {list(moments.shape)}, expected [{n_in}] or [{n_in}, {n_in}] for {n_in} inputs")
        values = f64(moments)
        vectors = None
        if values.ndim == 2 and np.isfinite(values).all():
            values, vectors = np.linalg.eigh((values + values.T) / 2)
        if not np.isfinite(values).all() or values.min() < -1e-6 * max(values.max(), 0):
            raise SourceError("second moments of inputs must be finite and not negative. Calibrate again.")
        mean = values.mean()
        if mean <= 0:
            return
        roots = np.sqrt(np.maximum(values, _LEAST_MOMENT * mean))
        self.root = roots if vectors is None else vectors * roots
        self.inverse = 1 / roots if vectors is None else (vectors / roots).T

    def weighted(self, a: Array) -> Array:
        """a @ S."""
        return a if self.root is None else a * self.root if self.root.ndim == 1 else a @ self.root

    def unweighted(self, a: Array) -> Array:
        """a @ S^-1."""
        return a if self.inverse is None else a * self.inverse if self.inverse.ndim == 1 else a @ self.inverse


@dataclass(frozen=True, kw_only=True, eq=False)
class Spectrum:
    """A change as u @ diag(values) @ v: u (n_out, k) orthonormal, values (k,) falling, v (k, n_in) orthonormal in the metric.

    rest: energy of the directions that are not listed; 0 when all are.
    """

    u: Array
    values: Array
    v: Array
    rest: float = 0.0

    @property
    def total(self) -> float:
        """Energy of the whole change."""
        return float(np.sum(self.values**2)) + self.rest

    def truncated(self, rank: int) -> Factors:
        """The best change of this rank, the strength split evenly between both factors."""
        roots = np.sqrt(self.values[:rank])
        return Factors(a=roots[:, None] * self.v[:rank], b=self.u[:, :rank] * roots)

    def lost(self, rank: int) -> float:
        """Fraction of the energy that goes with all but the first `rank` directions."""
        return (float(np.sum(self.values[rank:] ** 2)) + self.rest) / self.total if self.total else 0.0

    def rank_for(self, energy: float) -> int:
        """The smallest rank, at least 1, that keeps this fraction of the energy; all that are listed when none does."""
        sums = np.cumsum(self.values**2)
        return min(int(np.searchsorted(sums, energy * (sums[-1] + self.rest))) + 1, len(sums))


def decompose(factors: Factors, moments: AnyFloats | None = None) -> Spectrum:
    """Spectrum of b @ a: QR of b and of the weighted a, then a decomposition of (at most) rank x rank numbers."""
    metric = Metric(moments, factors.a.shape[1])
    qb, rb = np.linalg.qr(factors.b)
    qa, ra = np.linalg.qr(metric.weighted(factors.a).T)
    u, values, v = np.linalg.svd(rb @ ra.T)
    k = len(values)
    return Spectrum(u=qb @ u[:, :k], values=values, v=metric.unweighted(v[:k] @ qa.T))


def decompose_matrix(change: Array, moments: AnyFloats | None = None, *, rank: int | None = None, energy: float | None = None) -> Spectrum:
    """Spectrum of a dense change: whole where it is small, else as many directions as `rank` or `energy` ask for."""
    metric = Metric(moments, change.shape[1])
    weighted = metric.weighted(change)
    total, smaller = float(np.sum(weighted**2)), min(change.shape)
    width = smaller if smaller <= EXACT_SIZE or (rank is None and energy is None) else rank or _FIRST_WIDTH
    while True:
        if width + _OVERSAMPLING >= smaller:
            u, values, v = np.linalg.svd(weighted, full_matrices=False)
            break
        u, values, v = _leading(weighted, width)
        if rank is not None or (energy is not None and float(np.sum(values**2)) >= energy * total):
            break
        width *= 2
    rest = 0.0 if len(values) == smaller else max(0.0, total - float(np.sum(values**2)))
    return Spectrum(u=u, values=values, v=metric.unweighted(v), rest=rest)


def _leading(matrix: Array, width: int) -> tuple[Array, Array, Array]:
    sketch = np.random.Generator(np.random.PCG64(0)).standard_normal((matrix.shape[1], width + _OVERSAMPLING))
    basis = np.linalg.qr(matrix @ sketch)[0]
    for _ in range(_POWER_STEPS):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
    u, values, v = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ u)[:, :width], values[:width], v[:width]


def check_target(rank: int | None, energy: float | None) -> None:
    """Raise PlanError unless exactly one of both is given, and makes sense."""
    if (rank is None) == (energy is None):
        raise PlanError("give either a rank or an energy")
    if rank is not None and rank < 1:
        raise PlanError(f"rank {rank} keeps nothing. Give 1 or more.")
    if energy is not None and not 0 < energy <= 1:
        raise PlanError(f"energy {energy:g} is no fraction to keep. Give a number above 0 and up to 1, such as 0.99.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Approximation:
    """lost: fraction of the energy E |D x|^2 that the factors leave out."""

    factors: Factors
    lost: float


def approximate(
    change: Array | Factors, *, rank: int | None = None, energy: float | None = None, moments: AnyFloats | None = None
) -> Approximation:
    """The best factors of a rank, or the fewest that keep an energy, of a dense change or of other factors.

    moments: second moments of the inputs, see `Metric`. A rank above the change's own gives all of it. Raises PlanError as `check_target`.
    """
    check_target(rank, energy)
    if isinstance(change, Factors):
        spectrum = decompose(change, moments)
    else:
        spectrum = decompose_matrix(change, moments, rank=rank, energy=energy)
    chosen = min(rank, len(spectrum.values)) if rank is not None else spectrum.rank_for(energy or 1.0)
    return Approximation(factors=spectrum.truncated(chosen), lost=spectrum.lost(chosen))


def distance(one: Factors, other: Factors, moments: AnyFloats | None = None) -> float:
    """Energy of the difference of two changes, neither of them multiplied out."""
    both = Factors(a=np.concatenate([one.a, -other.a]), b=np.concatenate([one.b, other.b], axis=1))
    return decompose(both, moments).total


def stacked(parts: Sequence[tuple[int, Factors | None]]) -> Factors:
    """One pair of factors for a matrix that is several below each other: (rows, factors or None for an unchanged one) of each.

    Parts that read the same directions share them, so that what was one adapter on the whole matrix is one again; the ranks of others add
    up. Raises ShapeError when the parts have inputs of several sizes.
    """
    widths = {part.a.shape[1] for _, part in parts if part is not None}
    if len(widths) != 1:
        raise ShapeError(f"factors with {sorted(widths)} inputs cannot be those of one matrix")
    distinct: list[Array] = []
    blocks: list[tuple[int, int, Array]] = []  # first row, number of the directions, b
    n_rows = 0
    for rows, part in parts:
        if part is not None:
            if part.b.shape[0] != rows:
                raise ShapeError(f"factors with {part.b.shape[0]} outputs cannot be those of a matrix of {rows} rows")
            known = (i for i, a in enumerate(distinct) if np.array_equal(a, part.a))
            place = next(known, len(distinct))
            if place == len(distinct):
                distinct.append(part.a)
            blocks.append((n_rows, place, part.b))
        n_rows += rows
    a, starts = np.concatenate(distinct), np.cumsum([0, *(len(d) for d in distinct)])
    b = np.zeros((n_rows, len(a)))
    for row, place, block in blocks:
        b[row : row + len(block), starts[place] : starts[place + 1]] = block
    return Factors(a=a, b=b)


def split(factors: Factors, rows: Sequence[int]) -> list[Factors]:
    """The factors of matrices of so many rows each that lie below each other. What `stacked` joins when they share directions."""
    return [Factors(a=factors.a, b=b) for b in np.split(factors.b, np.cumsum(rows)[:-1])]
