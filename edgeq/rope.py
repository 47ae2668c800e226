"""Rotary position embedding: what a checkpoint says about it, and the angles that follow.

Canonical layout everywhere in edgeq is "rotate half": pair j of a head is (j, j + dim/2). Readers and carriers
that use interleaved pairs permute rows on the way in and out.

Su et al. 2021, arXiv:2104.09864; YaRN: Peng et al. 2023, arXiv:2309.00071; LongRoPE: Ding et al. 2024, arXiv:2402.13753;
Llama 3.1 frequency scaling: the `llama3` rope type of Hugging Face configs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgeq.errors import UnsupportedError

RopeKind = Literal["plain", "linear", "factors", "yarn", "longrope"]

NEVER = 1e30  # divisor of a pair that does not rotate: a billion tokens turn it by 1e-21. Loaders that check tensors refuse infinity


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

    def widened(self, head_dim: int) -> RopeSpec:
        """The same rotation stated for whole heads: dimensions beyond `dim` become pairs that never turn, behind those that do.

        Raises UnsupportedError when they do not come in pairs.
        """
        if self.dim == head_dim:
            return self
        if head_dim % 2:
            raise UnsupportedError(f"heads of {head_dim} dimensions do not divide into pairs")
        return self._with_pairs(head_dim, tuple(range(self.dim // 2)))

    def take(self, pairs: Sequence[int]) -> RopeSpec:
        """A rotation whose pair j turns as pair pairs[j] does here. Scaling becomes one divisor per pair, but for longrope's two.

        YaRN is written out even if no pair moves: its ramp goes by the number of a pair, so that another number of pairs would change it.
        Raises UnsupportedError for pairs that are not there, or named twice.
        """
        if len(set(pairs)) != len(pairs) or not all(0 <= pair < self.dim // 2 for pair in pairs):
            raise UnsupportedError(f"the rope has pairs 0 to {self.dim // 2 - 1}, each at most once; got {list(pairs)}")
        if self.kind != "yarn" and list(pairs) == list(range(self.dim // 2)):
            return self
        return self._with_pairs(2 * len(pairs), tuple(pairs))

    def _with_pairs(self, dim: int, pairs: tuple[int, ...]) -> RopeSpec:
        """Frequencies of `pairs`, in the first pairs of `dim` dimensions; the others never turn."""
        plain = self.base ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)

        def divisors(frequencies: npt.NDArray[np.float64]) -> tuple[float, ...]:
            values = np.full(dim // 2, NEVER)
            values[: len(pairs)] = np.minimum(plain[: len(pairs)] / frequencies[list(pairs)], NEVER)
            return tuple(values.tolist())

        if self.kind == "longrope":
            assert self.original_n_ctx is not None
            short, long = (divisors(self.frequencies(n_ctx)) for n_ctx in (self.original_n_ctx, self.original_n_ctx + 1))
            return replace(self, dim=dim, short_factors=short, long_factors=long)
        return RopeSpec(dim=dim, base=self.base, kind="factors", factors=divisors(self.frequencies(0)), attn_factor=self.attn_factor)

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
