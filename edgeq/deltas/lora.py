"""LoRA and what only changes how its factors come about; DoRA, which adds a magnitude per row.

LoRA: Hu et al. 2021, arXiv:2106.09685. rsLoRA differs in the scale alone (alpha / sqrt r, arXiv:2312.03732), LoRA-XS and LoRA-SB
in a core between the factors (arXiv:2405.17604, 2411.19557), AdaLoRA in a diagonal (arXiv:2303.10512), VeRA in two vectors around
shared random factors (arXiv:2310.11454), DeLoRA in norms (arXiv:2503.18225). DoRA: arXiv:2402.09353.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from edgeq.deltas.delta import Additive, AnyFloats, Array, Delta, Factors, f64, need_shape
from edgeq.errors import ShapeError


@dataclass(frozen=True, kw_only=True, eq=False)
class LoRA(Additive):
    """W + scale * b @ a: a (rank, n_in), b (n_out, rank). Any rank of 1 and more, also above the dimensions."""

    a: AnyFloats
    b: AnyFloats
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise ShapeError(f"LoRA factors of shapes {list(self.b.shape)} and {list(self.a.shape)} do not multiply")
        if not self.a.shape[0]:
            raise ShapeError("LoRA factors have rank 0. The adapter was not saved whole (partitioned training); save it again.")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.b.shape[0], self.a.shape[1])

    @property
    def rank(self) -> int:
        return len(self.a)

    def change(self) -> Array:
        return self.scale * (f64(self.b) @ f64(self.a))

    def factors(self, base: Array | None = None) -> Factors:
        """Always there, even where the rank exceeds the dimensions: the file has them."""
        return Factors(a=f64(self.a), b=self.scale * f64(self.b))

    def rows(self, start: int, stop: int) -> LoRA:
        return replace(self, b=self.b[start:stop])


@dataclass(frozen=True, kw_only=True, eq=False)
class DoRA(Delta):
    """magnitude * (W + scale b a) / |W + scale b a|, norms over `axis`: 1 (rows, every projection) or 0 (columns, embeddings).

    The norms are those of the base alone. QDoRA is this on a base of dequantized values.
    """

    lora: LoRA
    magnitude: AnyFloats
    axis: int = 1

    def __post_init__(self) -> None:
        need_shape("DoRA's magnitude", self.magnitude, (self.lora.shape[1 - self.axis],))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.lora.shape

    def apply(self, weight: Array, base: Array | None = None) -> Array:
        change = self.lora.change()
        norms = np.linalg.norm((weight if base is None else base) + change, axis=self.axis, keepdims=True)
        return f64(self.magnitude).reshape(norms.shape) / norms * (weight + change)

    def rows(self, start: int, stop: int) -> Delta | None:
        if self.axis == 0:
            return None
        return replace(self, lora=self.lora.rows(start, stop), magnitude=self.magnitude[start:stop])


def with_core(a: AnyFloats, core: AnyFloats, b: AnyFloats, scale: float = 1.0) -> LoRA:
    """W + scale * b @ core @ a, core (rank, rank): LoRA-XS, LoRA-SB, TinyLoRA."""
    need_shape("the latent core", core, (b.shape[1], a.shape[0]))
    return LoRA(a=a, b=f64(b) @ f64(core), scale=scale)


def with_diagonal(a: AnyFloats, diagonal: AnyFloats, b: AnyFloats, scale: float = 1.0) -> LoRA:
    """W + scale * b @ diag(diagonal) @ a: AdaLoRA, KaSA's update."""
    need_shape("the diagonal", diagonal, (len(a),))
    return LoRA(a=f64(a) * f64(diagonal)[:, None], b=b, scale=scale)


def vera(a: AnyFloats, b: AnyFloats, lambda_d: AnyFloats, lambda_b: AnyFloats) -> LoRA:
    """diag(lambda_b) b diag(lambda_d) a, with a and b the shared matrices cut to this module."""
    need_shape("vera_lambda_d", lambda_d, (len(a),))
    need_shape("vera_lambda_b", lambda_b, (len(b),))
    return LoRA(a=f64(a) * f64(lambda_d)[:, None], b=f64(b) * f64(lambda_b)[:, None])


def delora(a: AnyFloats, b: AnyFloats, strength: float, norms: AnyFloats) -> LoRA:
    """b diag(strength / (rank |a_i| |b_i|)) a diag(norms); norms (n_in,) are the base's column norms when training began."""
    need_shape("delora_w_norm", norms, (a.shape[1],))
    a_norm = np.maximum(np.linalg.norm(f64(a), axis=1), 1e-4)
    b_norm = np.maximum(np.linalg.norm(f64(b), axis=0), 1e-4)
    return LoRA(a=f64(a) * f64(norms), b=f64(b) * (strength / len(a) / (a_norm * b_norm)))


def truncate(lora: LoRA, rank: int, *, scale: float) -> LoRA:
    """The first `rank` directions of a nested adapter, with that rank's own scale.

    DyLoRA (arXiv:2210.07558) and MatryoshkaLoRA train every prefix; a plain LoRA cut this way is a different adapter.
    """
    if not 1 <= rank <= lora.rank:
        raise ShapeError(f"rank {rank} was asked of an adapter of rank {lora.rank}. Choose 1 to {lora.rank}.")
    return LoRA(a=lora.a[:rank], b=lora.b[:, :rank], scale=scale)


def matryoshka_scale(rank: int, mode: str) -> float:
    """MatryoshkaLoRA's strength of a slice: "none" 1, "linear" 1 / rank, "sqrt" 1 / sqrt rank."""
    scales = {"none": 1.0, "linear": 1.0 / rank, "sqrt": rank**-0.5}
    if mode not in scales:
        raise ShapeError(f"unknown Matryoshka scale {mode!r}; known: {', '.join(scales)}")
    return scales[mode]
