"""Means with standard errors, and differences of two means over the same things.

What is averaged is a unit: an item of a task, or a window of a text. Units are taken as independent; tokens of one window are not, which
is why a perplexity over ten windows has ten units and not ten thousand. Every estimate keeps its influences, how far each unit pulls it
from its value; for a function of a mean these are linearised (the delta method). The standard error is the influences' sample standard
deviation over sqrt(units), so that of a difference of two estimates over the same units counts only what they do not have in common.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeq.runtime.likelihood import Doubles


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """n: what was counted (items, tokens), at least as many as there are units. influences: None where no standard error is defined."""

    value: float
    n: int
    influences: Doubles | None

    @property
    def stderr(self) -> float | None:
        """None for fewer than two units."""
        return None if self.influences is None else _error(self.influences)

    def minus(self, other: Estimate) -> tuple[float, float | None]:
        """The difference and its standard error, both estimates over the same units."""
        error = None
        if self.influences is not None and other.influences is not None and len(self.influences) == len(other.influences):
            error = _error(self.influences - other.influences)
        return self.value - other.value, error


def mean_of(units: Sequence[float] | npt.NDArray[np.generic], *, n: int | None = None) -> Estimate:
    """The mean of at least one unit; n: how many things the units stand for, by default their number."""
    values = np.asarray(units, dtype=np.float64)
    mean = float(values.mean())
    return Estimate(value=mean, n=n or len(values), influences=values - mean)


def exp_of(mean: Estimate) -> Estimate:
    """exp of a mean, with influences to first order. Raises OverflowError."""
    value = math.exp(mean.value)
    return Estimate(value=value, n=mean.n, influences=None if mean.influences is None else value * mean.influences)


def without_error(value: float, *, n: int) -> Estimate:
    return Estimate(value=value, n=n, influences=None)


def _error(influences: Doubles) -> float | None:
    if len(influences) < 2:
        return None
    return float(influences.std(ddof=1) / math.sqrt(len(influences)))
