"""Rotary position embedding: what a checkpoint says about it, and the angles that follow.

Canonical layout everywhere in edgeq is "rotate half": pair j of a head is (j, j + dim/2). Readers and carriers
that use interleaved pairs permute rows on the way in and out.

Su et al. 2021, arXiv:2104.09864; YaRN: Peng et al. 2023, arXiv:2309.00071; LongRoPE: Ding et al. 2024, arXiv:2402.13753;
Llama 3.1 frequency scaling: the `llama3` rope type of Hugging Face configs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgeq.errors import UnsupportedError

RopeKind = Literal["plain", "linear", "factors", "yarn", "longrope"]


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """One set of rotary frequencies.

    dim: rotated dimensions of a head (even, <= head_dim; the rest of the head passes through).
    kind: "plain"; "linear" divides all angles by `factor`; "factors" divides pair j's frequency by `factors[j]` (Llama 3.1 is
    stored so); "yarn" interpolates between both; "longrope" uses `short_factors` up to `original_n_ctx` tokens and `long_factors` beyond.
    attn_factor multiplies cos and sin (YaRN's and LongRoPE's mscale), 1.0 otherwise.
    """

    dim: int
    base: float
    kind: RopeKind = "plain"
    factor: float = 1.0
    factors: tuple[float, ...] = ()
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    original_n_ctx: int | None = None
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise UnsupportedError(f"rope dimension {self.dim} is not a positive even number")
        if not self.base > 0 or not math.isfinite(self.base):
            raise UnsupportedError(f"rope base {self.base} is not a positive number")
        needed = {"factors": ("factors",), "longrope": ("short_factors", "long_factors")}.get(self.kind, ())
        for name in ("factors", "short_factors", "long_factors"):
            values = getattr(self, name)
            if (values or name in needed) and len(values) != self.dim // 2:
                raise UnsupportedError(f"rope {name} has {len(values)} values, expected {self.dim // 2} (half of the rope dimension)")
        for name in ("factor", "attn_factor", "factors", "short_factors", "long_factors"):
            for value in np.atleast_1d(getattr(self, name)):
                if not value > 0 or not math.isfinite(value):
                    raise UnsupportedError(f"rope {name} {value} is not a positive number")
        if self.kind in ("yarn", "longrope") and self.original_n_ctx is None:
            raise UnsupportedError(f"{self.kind} rope scaling needs the original context length")

    def frequencies(self, n_ctx: int) -> npt.NDArray[np.float64]:
        """Angle per position of each pair, (dim/2,), for a context of n_ctx tokens (only longrope depends on n_ctx)."""
        pairs = np.arange(0, self.dim, 2, dtype=np.float64) / self.dim
        plain = self.base**-pairs
        if self.kind == "linear":
            return plain / self.factor
        if self.kind == "factors":
            return plain / np.asarray(self.factors, dtype=np.float64)
        if self.kind == "longrope":
            assert self.original_n_ctx is not None
            return plain / np.asarray(self.long_factors if n_ctx > self.original_n_ctx else self.short_factors, dtype=np.float64)
        if self.kind == "yarn":
            return self._yarn(plain)
        return plain

    def _yarn(self, plain: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        low, high = (self._yarn_dim(beta) for beta in (self.beta_fast, self.beta_slow))
        low, high = max(math.floor(low), 0), min(math.ceil(high), self.dim - 1)
        ramp = np.clip((np.arange(self.dim // 2) - low) / max(high - low, 0.001), 0, 1)
        return plain / self.factor * ramp + plain * (1 - ramp)

    def _yarn_dim(self, beta: float) -> float:
        assert self.original_n_ctx is not None
        return self.dim * math.log(self.original_n_ctx / (beta * 2 * math.pi)) / (2 * math.log(self.base))


def llama3_factors(
    *, dim: int, base: float, factor: float, low_freq_factor: float, high_freq_factor: float, original_n_ctx: int
) -> tuple[float, ...]:
    """Per-pair frequency divisors of the `llama3` rope type: 1 for short wavelengths, `factor` for long ones, smooth between."""
    frequency = base ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    wavelength = 2 * math.pi / frequency
    smooth = (original_n_ctx / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    between = 1 / ((1 - smooth) / factor + smooth)
    divisors = np.where(
        wavelength < original_n_ctx / high_freq_factor, 1.0, np.where(wavelength > original_n_ctx / low_freq_factor, factor, between)
    )
    return tuple(float(d) for d in divisors)
