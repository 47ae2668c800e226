"""compressed-tensors checkpoints (llm-compressor): packed 4- and 8-bit integers, plain 8-bit integers, 8-bit floats.

pack-quantized:
    weight_packed      int32 (n_out, ceil(n_in * bits / 32)), values back to back from the low bits up, stored plus 2 ** (bits - 1)
    weight_shape       n_out, n_in
    weight_zero_point  asymmetric only: packed in the same way along the rows (groups beside), or int8 (n_out, groups) in old files
int-quantized, float-quantized, naive-quantized:
    weight             int8 or F8_E4M3 (n_out, n_in)
    weight_zero_point  int8, as scales are shaped
all: weight_scale, one per tensor, per row (channel), per group of a row, or per block; weight_g_idx with act-order.
value = (code - zero point) * scale, here without rounding to the type of the scale. Scales of activations and of the cache say nothing
about weights. https://github.com/vllm-project/compressed-tensors, compressors/pack_quantized and quantization/quant_args.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.converters.sources.json_file import Section
from edgeq.converters.sources.quantized.fp8 import float8, spread_scales
from edgeq.converters.sources.quantized.groups import Groups, Rows, as_tensor, even_groups
from edgeq.converters.sources.quantized.options import REMEDY, choice, refuse
from edgeq.converters.sources.quantized.packing import unpack_words
from edgeq.converters.sources.quantized.parts import AGAIN, SCALES, Decoded, Parts
from edgeq.converters.sources.stored import StoredTensor
from edgeq.errors import SourceError, UnsupportedError
from edgeq.tensors import LazyTensor

PACKED, PLAIN = ("pack-quantized",), ("int-quantized", "float-quantized", "naive-quantized")
STRATEGIES = ("tensor", "channel", "group", "block")
HARMLESS = frozenset({"ignore", "kv_cache_scheme", "global_compression_ratio", "quantization_status", "version", "run_compressed"})
_HARMLESS_OF_WEIGHTS = frozenset({"observer", "observer_kwargs", "actorder", "scale_dtype", "zp_dtype"})
_ACTIVATION_SCHEMES = frozenset({"input_activations", "output_activations"})
# Static scales of activations and of the cache: no part of the weights.
_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale", "q_scale")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a group of modules is quantized. block: rows and columns that share a scale."""

    targets: tuple[str, ...]
    format: str
    bits: int
    kind: str
    symmetric: bool
    strategy: str
    group_size: int | None
    block: tuple[int, int] | None


def read_compressed_tensors(config: Section, parts: Parts) -> Decoded:
    """Every weight with a scale. Raises UnsupportedError for options that are not described here, SourceError for broken tensors."""
    sparsity = config.optional_section("sparsity_config")
    if sparsity is not None and sparsity.get("format") not in (None, "dense"):
        raise UnsupportedError(f"{sparsity.where('format')} is {sparsity.get('format')!r}; supported: dense. {REMEDY}")
    transform = config.get("transform_config")
    if transform and (not isinstance(transform, dict) or transform.get("config_groups")):
        raise UnsupportedError(f"{config.where('transform_config')} changes weights when the model runs, which is not read. {REMEDY}")
    default_format = config.get("format") or "dense"
    groups = config.optional_section("config_groups")
    if groups is None:
        raise SourceError(f"{config.where('config_groups')} is missing. The file is not complete: download it again.")
    schemes = [_scheme(section, default_format) for key in groups.values if (section := groups.optional_section(key)) is not None]
    refuse(config, HARMLESS)
    weights = {}
    for module in dict.fromkeys((*parts.modules("weight_packed"), *parts.modules("weight_scale"))):
        weights[f"{module}.weight"] = _weight(parts, module, _scheme_of(schemes, module, config))
    for name in parts.stored:
        module, _, suffix = name.rpartition(".")
        if suffix in _ACTIVATIONS:
            parts.drop(module, suffix)
    return Decoded(weights=weights, parts=frozenset(parts.taken), summary=_summary(schemes))


def _summary(schemes: Sequence[Scheme]) -> Mapping[str, Any]:
    formats = [f"{s.kind}{s.bits} {s.strategy}" + (f" {s.group_size}" if s.strategy == "group" else "") for s in schemes]
    return {"method": "compressed-tensors", "format": ", ".join(dict.fromkeys(s.format for s in schemes)), "weights": ", ".join(formats)}


def _scheme(group: Section, default_format: str) -> Scheme:
    weights = group.optional_section("weights")
    if weights is None:
        raise UnsupportedError(f"{group.where('weights')} is missing: only weights that are quantized are described. {REMEDY}")
    form = choice(group, "format", (*PACKED, *PLAIN), default=default_format)
    kind = choice(weights, "type", ("int", "float"), default="int")
    bits = choice(weights, "num_bits", (8,) if kind == "float" else (4, 8) if form in PACKED else (8,), default=8)
    if kind == "float" and form in PACKED:
        raise UnsupportedError(f"{weights.where('type')} is 'float' in a pack-quantized checkpoint; supported: int. {REMEDY}")
    size = weights.get("group_size")
    block = weights.optional_list("block_structure")
    strategy = choice(weights, "strategy", STRATEGIES, default="tensor" if size is None else "channel" if size == -1 else "group")
    if strategy == "group" and (type(size) is not int or size < 1):
        raise SourceError(f"{weights.where('group_size')} is {size!r}, expected a positive whole number")
    if strategy == "block" and (block is None or len(block) != 2 or not all(type(n) is int and n > 0 for n in block)):
        raise SourceError(f"{weights.where('block_structure')} is {block!r}, expected rows and columns")
    symmetric = weights.boolean("symmetric", default=True)
    choice(weights, "dynamic", (False,), default=False)
    refuse(weights, _HARMLESS_OF_WEIGHTS)
    targets = group.optional_list("targets") or []
    refuse(group, _ACTIVATION_SCHEMES)
    return Scheme(
        targets=tuple(map(str, targets)),
        format=form,
        bits=bits,
        kind=kind,
        symmetric=symmetric,
        strategy=strategy,
        group_size=size if strategy == "group" else None,
        block=(block[0], block[1]) if strategy == "block" and block is not None else None,
    )


def _scheme_of(schemes: Sequence[Scheme], module: str, config: Section) -> Scheme:
    """The scheme whose targets name the module, by name or pattern first, then by class."""
    for by_class in (False, True):
        for scheme in schemes:
            if any(_names(target, module, by_class=by_class) for target in scheme.targets):
                return scheme
    raise SourceError(f"{config.where('config_groups')}: no group has {module} among its targets, but its weight is quantized. {AGAIN}")


def _names(target: str, module: str, *, by_class: bool) -> bool:
    if by_class:
        return target == "Linear"
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target == module


def _weight(parts: Parts, module: str, scheme: Scheme) -> LazyTensor:
    scale = parts.take(module, "weight_scale", SCALES)
    if scheme.format not in PACKED and scheme.kind == "float":
        if not scheme.symmetric:
            raise UnsupportedError(f"{module}: 8-bit floats with zero points are not read. {REMEDY}")
        if scheme.strategy == "group":
            raise UnsupportedError(f"{module}: 8-bit floats in groups are not read; supported: tensor, channel, block. {REMEDY}")
        parts.drop(module, "weight_zero_point")
        return float8(parts, module, scale, scheme.block)
    if scheme.format in PACKED:
        weight = parts.take(module, "weight_packed", ("I32",), (None, None))
        stated = parts.take(module, "weight_shape", ("I64", "I32"), (2,)).array().tolist()
        n_out, n_in = int(stated[0]), int(stated[1])
        wanted = (n_out, -(-n_in * scheme.bits // 32))
        if weight.shape != wanted:
            raise SourceError(
                f"{weight.origin} has shape {list(weight.shape)}, but {n_out} x {n_in} values of {scheme.bits} bits take {list(wanted)}"
            )
    else:
        weight = parts.take(module, "weight", ("I8",), (None, None))
        n_out, n_in = weight.shape
    offset = 1 << (scheme.bits - 1)

    def codes(start: int, stop: int) -> npt.NDArray[np.uint8]:
        rows = weight.array()[start:stop]
        return unpack_words(rows, scheme.bits, 0, n_in) if scheme.format in PACKED else rows.view(np.uint8) ^ np.uint8(0x80)

    group, scales = _groups(parts, module, scheme, scale, (n_out, n_in))
    zeros = None if scheme.symmetric else _zeros(parts, module, scheme, (n_out, scales(0, 1).shape[1]))
    if scheme.symmetric:
        parts.drop(module, "weight_zero_point")
    return as_tensor(
        Groups(
            name=f"INT{scheme.bits}",
            shape=(n_out, n_in),
            code_bits=scheme.bits,
            codes=codes,
            scales=scales,
            scale="F32" if scheme.strategy != "group" else scale.dtype,
            group=group,
            zeros=zeros,
            zero="" if zeros is None else "U8",
            center=offset,
            origin=f"{weight.file}: {module}.weight",
        )
    )


def _groups(parts: Parts, module: str, scheme: Scheme, scale: StoredTensor, shape: tuple[int, int]) -> tuple[npt.NDArray[np.int32], Rows]:
    """Group of each column, and the scales of rows."""
    n_out, n_in = shape
    if scheme.strategy != "group" or scheme.group_size is None:
        size = scheme.block[1] if scheme.block else n_in
        return even_groups(n_in, size), spread_scales(scale, shape, scheme.block)
    n_groups = math.ceil(n_in / scheme.group_size)
    if scale.shape != (n_out, n_groups):
        raise SourceError(
            f"{scale.origin} has shape {list(scale.shape)}, expected {[n_out, n_groups]} for {n_out} x {n_in} values in groups of "
            f"{scheme.group_size}"
        )
    group = even_groups(n_in, scheme.group_size)
    if parts.has(module, "weight_g_idx"):
        group = parts.take(module, "weight_g_idx", ("I32", "I64"), (n_in,)).array().astype(np.int32)
    return group, lambda start, stop: scale.array()[start:stop]


def _zeros(parts: Parts, module: str, scheme: Scheme, shape: tuple[int, int]) -> Rows:
    """Zero points (rows, groups) plus 2 ** (bits - 1), as codes are."""
    n_out, n_groups = shape
    stored = parts.take(module, "weight_zero_point", ("I8", "I32"))
    offset = 1 << (scheme.bits - 1)
    packed = stored.dtype == "I32"
    expected = (-(-n_out * scheme.bits // 32), n_groups) if packed else (n_out, n_groups)
    one = not packed and math.prod(stored.shape) == 1 and scheme.strategy == "tensor"
    if stored.shape != expected and not one:
        raise SourceError(f"{stored.origin} has shape {list(stored.shape)}, expected {list(expected)}")

    def read(start: int, stop: int) -> npt.NDArray[np.uint8]:
        if one:
            return np.full((stop - start, 1), int(stored.array().reshape(-1)[0]) + offset, dtype=np.uint8)
        if packed:
            return unpack_words(stored.array().T, scheme.bits, start, stop).T
        return (stored.array()[start:stop].astype(np.int16) + offset).astype(np.uint8)

    return read
