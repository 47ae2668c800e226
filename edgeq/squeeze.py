"""Making an adapter smaller after it was trained: a lower rank of each module, and fewer bits of each number.

Rank by module: a number for all, the fewest directions that keep an energy, or what fits a budget of bytes best. For a budget, directions
of all modules compete by energy per byte. In a module energies only fall, so that the best first is also the order in which each module's
own directions come, and taking them until the budget is full loses least for the bytes taken (what water-filling does for continuous
sizes). A module may be left with nothing: it is then not part of the adapter any more.

Bits: see `edgeq.codec`. Singular directions differ in strength, so that one deviation for all would suit none; b @ a is b Q @ Q^T a for
any rotation Q, and one that spreads every direction over all (a discrete cosine transform) makes rows alike. Byte budgets count a number as
`bits` bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgeq import codec
from edgeq.deltas.delta import AnyFloats, Array, Factors, f64
from edgeq.errors import PlanError
from edgeq.low_rank import Spectrum, check_target, decompose, distance

FLOAT_BITS = (16, 32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Squeezed:
    """One module. factors: what is left, decoded; None when nothing is. before: its rank as trained. lost: fraction of the energy.

    coded: a and b in codes, where these were asked for.
    """

    factors: Factors | None
    before: int
    lost: float
    nbytes: int
    coded: tuple[codec.Coded, codec.Coded] | None = None

    @property
    def rank(self) -> int:
        return 0 if self.factors is None else self.factors.rank


def squeeze(
    modules: Mapping[str, Factors],
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    bits: int = 32,
    moments: Mapping[str, AnyFloats] | None = None,
) -> dict[str, Squeezed]:
    """Squeeze every module to a rank, to an energy (0 to 1), or all of them together to a budget in bytes; none of them: bits alone.

    bits: 32, 16, or the codec's 8, 4, 2, 1; factors come back with the values that such a file holds. moments: second moments of the
    inputs by module, for the energy that counts (`edgeq.low_rank.Metric`). Raises PlanError for requests that make no sense, or that keep
    nothing.
    """
    given = [value for value in (rank, energy, budget) if value is not None]
    if len(given) > 1:
        raise PlanError("give one of rank, energy and budget")
    if rank is not None or energy is not None:
        check_target(rank, energy)
    if bits not in (*codec.BITS, *FLOAT_BITS):
        raise PlanError(f"{bits} bits per value are not supported; choose one of {', '.join(map(str, (*codec.BITS, *FLOAT_BITS)))}")
    known = moments or {}
    if not given:
        return {name: _coded(name, factors, factors, bits, known.get(name)) for name, factors in modules.items()}
    spectra = {name: decompose(factors, known.get(name)) for name, factors in modules.items()}
    if budget is not None:
        ranks = ranks_for_budget(spectra, budget, bits)
    else:
        ranks = {name: s.rank_for(energy) if energy is not None else min(rank or 1, len(s.values)) for name, s in spectra.items()}
    result = {}
    for name, factors in modules.items():
        if not ranks[name]:
            result[name] = Squeezed(factors=None, before=factors.rank, lost=1.0 if spectra[name].total else 0.0, nbytes=0)
        else:
            result[name] = _coded(name, factors, spectra[name].truncated(ranks[name]), bits, known.get(name))
    return result


def ranks_for_budget(spectra: Mapping[str, Spectrum], budget: int, bits: int) -> dict[str, int]:
    """Rank of each module, 0 for those that get nothing: directions by energy per byte, as long as they fit.

    When one does not fit, its module is done, and others may still use what is left. Raises PlanError when not one direction fits.
    """
    sizes = {name: (s.u.shape[0], s.v.shape[1]) for name, s in spectra.items()}
    ranks = dict.fromkeys(spectra, 0)
    offers = [
        (-(value**2) / sum(sizes[name]), i, order, name)
        for order, (name, s) in enumerate(spectra.items())
        for i, value in enumerate(s.values)
        if value > 0
    ]
    left = budget
    for _, i, _, name in sorted(offers):
        cost = factor_bytes(sizes[name], i + 1, bits) - (factor_bytes(sizes[name], i, bits) if i else 0)
        if ranks[name] == i and cost <= left:
            ranks[name], left = i + 1, left - cost
    if not any(ranks.values()):
        least = min(factor_bytes(size, 1, bits) for size in sizes.values())
        raise PlanError(f"a budget of {budget:,} bytes keeps nothing: one direction of the smallest module takes {least:,}. Give more.")
    return ranks


def factor_bytes(shape: tuple[int, int], rank: int, bits: int) -> int:
    """Bytes of both factors of a matrix (n_out, n_in), with the codec's two floats for each."""
    if bits in FLOAT_BITS:
        return rank * sum(shape) * bits // 8
    return sum(codec.coded_bytes(rank * n, bits) + 8 for n in shape)


def encode_factors(factors: Factors, bits: int) -> tuple[codec.Coded, codec.Coded]:
    """Codes of a and b, turned so that their directions are about equally strong."""
    balanced = decompose(factors).truncated(factors.rank)
    turn = cosine_transform(balanced.rank)
    return codec.encode(turn.T @ balanced.a, bits), codec.encode(balanced.b @ turn, bits)


def cosine_transform(n: int) -> Array:
    """Orthogonal (n, n): row k is a cosine of k half waves (DCT-II).

    >>> bool(np.allclose(cosine_transform(5) @ cosine_transform(5).T, np.eye(5)))
    True
    """
    k, i = np.arange(n)[:, None], np.arange(n)[None, :]
    return np.where(k == 0, 1 / math.sqrt(n), math.sqrt(2 / n) * np.cos(math.pi * (2 * i + 1) * k / (2 * n)))


def _coded(name: str, whole: Factors, left: Factors, bits: int, moments: AnyFloats | None) -> Squeezed:
    """What is left of a module in numbers of so many bits, and how far that is from the whole."""
    coded = encode_factors(left, bits) if bits in codec.BITS else None
    if coded is not None:
        a, b = (codec.decode(half) for half in coded)
    elif bits == 16:
        even = decompose(left).truncated(left.rank)  # as trained, b may be so small that 16 bits hold little of it
        with np.errstate(over="ignore"):
            a, b = (values.astype(np.float16).astype(np.float32) for values in (even.a, even.b))
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise PlanError(f"{name}: factors are beyond the largest 16-bit number. Use 32 bits.")
    else:
        a, b = left.a.astype(np.float32), left.b.astype(np.float32)
    found = Factors(a=f64(a), b=f64(b))
    total = decompose(whole, moments).total
    lost = distance(whole, found, moments) / total if total else 0.0
    shape = (whole.b.shape[0], whole.a.shape[1])
    return Squeezed(factors=found, before=whole.rank, lost=lost, nbytes=factor_bytes(shape, found.rank, bits), coded=coded)
