"""What smaller heads change about the rotary embedding of an elastic GGUF file: divisors, sizes, and the magnitude of cos and sin.

ggml turns pair j of n dimensions by base^(-2j/n) / ff[j] per position, ff being `rope_freqs.weight`, or two such tensors with LongRoPE.
The pairs that stay are the first ones, and must turn as they did among the D dimensions of a whole head: cut to n, their divisors are

    ff'[j] = ff[j] * base^(2j/D - 2j/n)

Linear scaling is common to all pairs and stays as it is. llama.cpp divides scores by sqrt(n), where the model means sqrt(D): queries and
keys are both multiplied by cos and sin, so a magnitude of (n/D)^(1/4) makes up for it (`rope.scaling.attn_factor`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.errors import PlanError, SourceError, UnsupportedError
from edgeq.gguf_fields import Field
from edgeq.gguf_file import Header, TensorInfo, TensorLayout
from edgeq.grids import F32
from edgeq.tensors import Bytes

# Architectures whose graphs read divisors for every pair, turn whole heads in every layer, and do not normalise them (models/deci.cpp).
HEAD_ARCHITECTURES = frozenset({"deci"})

_SIZE_KEYS = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_PLAIN, _LONG = ("rope_freqs.weight",), ("rope_factors_long.weight", "rope_factors_short.weight")


def check_head_cut(header: Header, arch: str, full: int, kept: int) -> None:
    """Raises PlanError for a head size or architecture that cannot be, UnsupportedError for a rotation that cannot be cut."""
    if arch not in HEAD_ARCHITECTURES:
        raise PlanError(
            f"heads cannot be cut to {kept} dimensions: llama.cpp's {arch} architecture has no divisors for RoPE pairs. Keep all {full}."
        )
    if not 0 < kept < full or kept % 2:
        raise PlanError(f"heads of {full} dimensions cannot be cut to {kept}. Keep an even number from 2 to {full}.")
    for key in _SIZE_KEYS:
        if (stated := header.value(f"{arch}.{key}", full)) != full:
            raise UnsupportedError(f"{header.path}: {arch}.{key} is {stated!r}, but heads have {full} dimensions. Export the model again.")
    kind = header.value(f"{arch}.rope.scaling.type")
    if kind == "yarn":
        raise UnsupportedError(
            f"{header.path}: YaRN scales RoPE pairs by their number, which changes when heads are cut. Keep all {full} dimensions, or "
            "export the model again, which writes YaRN as one divisor per pair."
        )
    names = _factor_names(header, arch)
    if names == _LONG and any(name not in header.tensors for name in names):
        raise SourceError(f"{header.path}: scales RoPE by longrope without {' and '.join(names)}. Export the model again.")
    for name in names:
        info = header.tensors.get(name)
        if info is not None and (info.shape != (full // 2,) or info.grid is not F32):
            raise SourceError(
                f"{header.path}: tensor {name} has shape {list(info.shape)} in {info.grid.name}, expected [{full // 2}] in F32. "
                "Export the model again."
            )


def head_fields(header: Header, arch: str, full: int, kept: int) -> dict[str, Field]:
    """Metadata of smaller heads, by key."""
    magnitude = _number(header, f"{arch}.rope.scaling.attn_factor", 1.0) * (kept / full) ** 0.25
    fields = [Field.u32(f"{arch}.{key}", kept) for key in _SIZE_KEYS]
    return {f.key: f for f in (*fields, Field.f32(f"{arch}.rope.scaling.attn_factor", magnitude))}


def head_factors(header: Header, arch: str, full: int, kept: int) -> Mapping[str, tuple[TensorLayout, Callable[[], Iterable[Bytes]]]]:
    """The divisors of smaller heads: tensors by name and what writes them. Nothing is read before that."""
    base = _number(header, f"{arch}.rope.freq_base", 10000.0)
    pair = np.arange(kept // 2)
    ratios = base ** (2 * pair / full - 2 * pair / kept)

    def values(info: TensorInfo | None) -> Iterable[Bytes]:
        old = 1.0 if info is None else _read(header.path, info, kept // 2)
        yield (old * ratios).astype("<f4").view(np.uint8)

    return {
        name: (TensorLayout(name, (kept // 2,), F32), partial(values, header.tensors.get(name))) for name in _factor_names(header, arch)
    }


def _factor_names(header: Header, arch: str) -> tuple[str, ...]:
    return _LONG if header.value(f"{arch}.rope.scaling.type") == "longrope" else _PLAIN


def _number(header: Header, key: str, default: float) -> float:
    value = header.value(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise SourceError(f"{header.path}: {key} is {value!r}, expected a positive number. Export the model again.")
    return float(value)


def _read(path: Path, info: TensorInfo, n: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    try:
        values = np.fromfile(path, "<f4", n, offset=info.offset)
    except OSError as err:
        raise SourceError(f"{path}: cannot be read: {err.strerror or err}. Copy the file again.") from err
    if len(values) < n:
        raise SourceError(f"{path}: ended within {info.name} while it was read. Copy the file again.")
    return values.astype(np.float64)
