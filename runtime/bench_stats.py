"""Medians, spread and bootstrap intervals of repeated measurements, and ratios of paired repeats. Pure functions of samples.

An interval is the percentile bootstrap of the median over repeats (Efron and Tibshirani 1993, chapter 13): repeats are drawn again with
replacement, 2000 times with a fixed seed, and the middle 95 % of the medians taken. It cannot reach beyond the fastest and the slowest
repeat, which enclose the true median with probability 1 - 2 / 2^n: 75 % for 3 repeats, 94 % for 5, 98 % for 7. Below 3 repeats there is
none. A repeat is a process of its own, so what differs between processes (the place of memory, say) is in the interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
LEVEL = 0.95
MIN_REPEATS = 3
_SEED = 95
_CHUNK = 1 << 20  # values that are resampled together


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Median of ratios of paired repeats and its interval; low and high are None below MIN_REPEATS pairs."""

    ratio: float
    low: float | None
    high: float | None

    def to_json(self) -> dict[str, float | None]:
        return asdict(self)


def median(samples: Sequence[float]) -> float | None:
    """None for no samples."""
    return float(np.median(samples)) if samples else None


def spread(samples: Sequence[float]) -> float | None:
    """Interquartile range, in the samples' unit; None for fewer than two."""
    if len(samples) < 2:
        return None
    low, high = np.percentile(samples, [25, 75])
    return float(high - low)


def interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """95 % bootstrap interval of the median; None for fewer than MIN_REPEATS samples."""
    if len(samples) < MIN_REPEATS:
        return None
    values = np.asarray(samples, dtype=np.float64)
    return _middle(np.median(values[_drawn(len(values))], axis=1))


def pooled_percentile(groups: Sequence[Sequence[float]], percent: float) -> float:
    """A percentile (linear interpolation) over the values of all groups together."""
    return float(np.percentile(np.concatenate([np.asarray(group) for group in groups]), percent))


def percentile_interval(groups: Sequence[Sequence[float]], percent: float) -> tuple[float, float] | None:
    """95 % bootstrap interval of `pooled_percentile`, groups being of one size. Whole groups are drawn: values within are alike."""
    if len(groups) < MIN_REPEATS:
        return None
    values = np.asarray(groups, dtype=np.float64)
    drawn = _drawn(len(values))
    at_once = max(1, _CHUNK // values.size)
    parts = (values[drawn[start : start + at_once]].reshape(-1, values.size) for start in range(0, len(drawn), at_once))
    return _middle(np.concatenate([np.percentile(part, percent, axis=1) for part in parts]))


def paired_ratio(samples: Sequence[float | None], base: Sequence[float | None]) -> Ratio | None:
    """Of repeats taken in the same rounds, sample / base; pairs with a None or a base of 0 do not count. None without any pair."""
    pairs = zip(samples, base, strict=True)
    ratios = [mine / theirs for mine, theirs in pairs if mine is not None and theirs is not None and theirs > 0]
    middle = median(ratios)
    if middle is None:
        return None
    low, high = interval(ratios) or (None, None)
    return Ratio(ratio=middle, low=low, high=high)


def overlap(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether two intervals have a value in common."""
    return a[0] <= b[1] and b[0] <= a[1]


def _drawn(n: int) -> npt.NDArray[np.int64]:
    """Indices of resamples, (RESAMPLES, n): the same for the same n."""
    return np.random.default_rng(_SEED).integers(0, n, (RESAMPLES, n))


def _middle(statistics: Sequence[float] | npt.NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(statistics, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)
