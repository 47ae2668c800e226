"""Rotary embedding as config.json states it, to a RopeSpec.

Two spellings of one thing: transformers 4 writes `rope_theta` beside a `rope_scaling` object, transformers 5 writes both into
`rope_parameters`. The numbers that follow from them (attention factors, defaults) are those of transformers'
modeling_rope_utils.py; a test compares the resulting frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgeq.converters.sources.json_file import Section
from edgeq.errors import SourceError, UnsupportedError
from edgeq.rope import RopeSpec, llama3_factors

_EVERY_KIND = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_WITH_ORIGIN = frozenset({"factor", "original_max_position_embeddings"})
# What each kind reads. Other keys are refused: they belong to a kind that nobody asked for. YaRN's `finetuned` says how the
# checkpoint was made and changes nothing.
_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": _WITH_ORIGIN | {"low_freq_factor", "high_freq_factor"},
    "yarn": _WITH_ORIGIN | {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "finetuned"},
    "longrope": _WITH_ORIGIN | {"attention_factor", "short_factor", "long_factor"},
}
ROPE_KINDS = tuple(_KEYS)


def read_rope(
    values: Mapping[str, Any],
    config: Section,
    *,
    key: str,
    theta: float,
    head_dim: int,
    partial: float | None = None,
    kinds: tuple[str, ...] = ROPE_KINDS,
) -> RopeSpec:
    """values: the rope object (may be empty) found under `key` of the config; theta and partial hold where it states none.

    partial: share of a head's dimensions that rotates; None where the architecture rotates all of them.

    Raises UnsupportedError for a kind or key that no code here describes, SourceError for values of the wrong type.
    """
    rope = Section(values, config.path, within=f"{key}.")
    kind = _kind(rope, kinds)
    for extra in rope.values.keys() - _EVERY_KIND - _KEYS[kind]:
        if rope.values[extra] is not None:
            raise UnsupportedError(
                f"{rope.where(extra)} is not known for rope type {kind!r}; known: {', '.join(sorted(_KEYS[kind])) or 'none'}"
            )
    base = rope.optional_number("rope_theta") or theta
    if base <= 1:
        raise SourceError(f"{rope.where('rope_theta')} is {base}, expected more than 1")
    dim = _rotary_dim(rope, head_dim, partial)
    n_ctx = config.integer("max_position_embeddings")
    if kind == "linear":
        return RopeSpec(dim=dim, base=base, kind="linear", factor=rope.number("factor"))
    if kind == "llama3":
        return _llama3(rope, dim=dim, base=base, original=_original_n_ctx(rope, config, n_ctx))
    if kind == "yarn":
        return _yarn(rope, dim=dim, base=base, n_ctx=n_ctx, original=_original_n_ctx(rope, config, n_ctx))
    if kind == "longrope":
        return _longrope(rope, dim=dim, base=base, n_ctx=n_ctx, original=_original_n_ctx(rope, config, n_ctx))
    return RopeSpec(dim=dim, base=base)


def _kind(rope: Section, kinds: tuple[str, ...]) -> str:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "su":  # what LongRoPE was called when Phi-3 came out
        kind = "longrope"
    if kind not in kinds:
        raise UnsupportedError(f"{rope.where('rope_type')} is {kind!r}; supported: {', '.join(kinds)}")
    return kind


def _rotary_dim(rope: Section, head_dim: int, partial: float | None) -> int:
    stated = rope.optional_number("partial_rotary_factor")
    if partial is None and stated not in (None, 1.0):
        raise UnsupportedError(f"{rope.where('partial_rotary_factor')} is {stated}; supported for this architecture: 1.0")
    dim = int(head_dim * (stated or partial or 1.0))
    if dim < 2 or dim % 2:
        raise UnsupportedError(f"{rope.path}: {dim} of {head_dim} dimensions of a head would rotate; supported: an even number, 2 or more")
    return dim


def _per_pair(rope: Section, key: str, dim: int) -> tuple[float, ...]:
    factors = rope.numbers(key)
    if len(factors) != dim // 2:
        raise SourceError(f"{rope.where(key)} has {len(factors)} values, expected {dim // 2} (one for each pair of rotating dimensions)")
    return factors


def _original_n_ctx(rope: Section, config: Section, n_ctx: int) -> int:
    """Context length before scaling; Phi-3 states it beside the rope object, others inside."""
    outside = config.optional_integer("original_max_position_embeddings")
    inside = rope.optional_integer("original_max_position_embeddings")
    if outside and inside and outside != inside:
        raise SourceError(
            f"{rope.where('original_max_position_embeddings')} is {inside}, but the config itself says {outside}. Make them agree."
        )
    original = outside or inside or n_ctx
    if original < 2:
        raise SourceError(f"{rope.where('original_max_position_embeddings')} is {original}, expected more than 1")
    return original


def _llama3(rope: Section, *, dim: int, base: float, original: int) -> RopeSpec:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        raise SourceError(f"{rope.where('low_freq_factor')} is {low}, expected less than high_freq_factor ({high})")
    factors = llama3_factors(
        dim=dim, base=base, factor=rope.number("factor"), low_freq_factor=low, high_freq_factor=high, original_n_ctx=original
    )
    return RopeSpec(dim=dim, base=base, kind="factors", factors=factors, original_n_ctx=original)


def _yarn(rope: Section, *, dim: int, base: float, n_ctx: int, original: int) -> RopeSpec:
    if not rope.boolean("truncate", default=True):
        raise UnsupportedError(f"{rope.where('truncate')} is false; supported: true")
    factor = rope.optional_number("factor") or n_ctx / original
    mscale, mscale_all_dim = rope.optional_number("mscale"), rope.optional_number("mscale_all_dim")
    inferred = _yarn_mscale(factor, 1.0)
    if mscale and mscale_all_dim:
        inferred = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
    return RopeSpec(
        dim=dim,
        base=base,
        kind="yarn",
        factor=factor,
        original_n_ctx=original,
        attn_factor=rope.optional_number("attention_factor") or inferred,
        beta_fast=rope.optional_number("beta_fast") or 32.0,
        beta_slow=rope.optional_number("beta_slow") or 1.0,
    )


def _yarn_mscale(scale: float, mscale: float) -> float:
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def _longrope(rope: Section, *, dim: int, base: float, n_ctx: int, original: int) -> RopeSpec:
    factor = rope.optional_number("factor") or n_ctx / original
    inferred = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeSpec(
        dim=dim,
        base=base,
        kind="longrope",
        factor=factor,
        short_factors=_per_pair(rope, "short_factor", dim),
        long_factors=_per_pair(rope, "long_factor", dim),
        original_n_ctx=original,
        attn_factor=rope.optional_number("attention_factor") or inferred,
    )
