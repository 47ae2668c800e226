"""config.json of a Hugging Face folder, to a ModelSpec.

Every key has to be understood: read, known to change nothing, or holding the one value that our code is written for. A key that
is none of these may describe a model that we would compute wrongly, so it is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeq.converters.sources.hf_dialects import (
    DIALECTS,
    HARMLESS,
    HARMLESS_PREFIXES,
    ONLY,
    QUANTIZATION,
    WRAPPERS,
    Dialect,
    Wrapper,
)
from edgeq.converters.sources.hf_layers import FULL, SLIDING, layer_kinds
from edgeq.converters.sources.hf_rope import read_rope
from edgeq.converters.sources.json_file import Section, read_json_object
from edgeq.converters.sources.quantized.methods import check_method
from edgeq.converters.sources.quantized.options import REMEDY
from edgeq.errors import ShapeError, SourceError, UnsupportedError
from edgeq.families import Family, family_of_hf
from edgeq.rope import RopeSpec
from edgeq.spec import Attention, Block, Mlp, ModelSpec

_ACTIVATIONS = {"silu": ("silu", "swish"), "gelu_tanh": ("gelu_pytorch_tanh",)}


@dataclass(frozen=True, kw_only=True)
class HfConfig:
    """What config.json says. wrapper: set when the text model is a part of a multimodal checkpoint.

    quantization: how weights are quantized, None when they are floats.
    """

    spec: ModelSpec
    wrapper: Wrapper | None = None
    quantization: Section | None = None


def read_config(path: Path) -> HfConfig:
    """Raises SourceError when the file is broken or contradicts itself, UnsupportedError when no row of ours describes the model."""
    return parse_config(read_json_object(path), path)


def parse_config(values: Mapping[str, Any], path: Path) -> HfConfig:
    """`values` as read from `path`, which is only named in messages."""
    quantization = _quantization(Section(values, path))
    architecture = _architecture(values, path)
    wrapper = next((row for row in WRAPPERS if row.architecture == architecture), None)
    if wrapper is None:
        row = _dialect(values, architecture, path)
        return HfConfig(spec=_spec(values, row, path), quantization=quantization)
    inner = Section(values, path).optional_section(wrapper.section)
    if inner is None:
        raise SourceError(f"{path}: {wrapper.section} is missing. The file is not complete: download it again.")
    text = {"tie_word_embeddings": values["tie_word_embeddings"], **inner.values} if "tie_word_embeddings" in values else inner.values
    return HfConfig(
        spec=_spec(text, _dialect_of_type(wrapper.model_type, path), path, within=inner.within),
        wrapper=wrapper,
        quantization=quantization or _quantization(inner),
    )


def _quantization(config: Section) -> Section | None:
    """The description of quantized weights. Raises UnsupportedError for one that no method of ours goes with."""
    for key in QUANTIZATION:
        value = config.get(key)
        if value and (not isinstance(value, dict) or key == "quantization"):  # mlx-lm writes `quantization`, and names no method
            raise UnsupportedError(f"{config.where(key)} says that the weights are quantized, in a way that is not read. {REMEDY}")
    for key in QUANTIZATION:
        section = config.optional_section(key)
        if section is not None:
            check_method(section)
            return section
    return None


def _architecture(values: Mapping[str, Any], path: Path) -> str:
    names = values.get("architectures")
    if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str):
        return names[0]
    if names is None and isinstance(values.get("model_type"), str):
        return _dialect_of_type(values["model_type"], path).architecture
    raise SourceError(f"{path}: architectures is {names!r}, expected a list of one name. Is this the config.json of a language model?")


def _dialect_of_type(model_type: str, path: Path) -> Dialect:
    for row in DIALECTS:
        if row.model_type == model_type:
            return row
    supported = ", ".join(row.model_type for row in DIALECTS)
    raise UnsupportedError(f"{path}: model_type {model_type!r} is not supported; supported: {supported}")


def _dialect(values: Mapping[str, Any], architecture: str, path: Path) -> Dialect:
    row = next((row for row in DIALECTS if row.architecture == architecture), None)
    if row is None:
        supported = ", ".join(row.architecture for row in (*DIALECTS, *WRAPPERS))
        raise UnsupportedError(f"{path}: architecture {architecture!r} is not supported; supported: {supported}")
    model_type = values.get("model_type", row.model_type)
    if model_type != row.model_type:
        raise SourceError(f"{path}: model_type is {model_type!r}, but architecture {architecture} goes with {row.model_type!r}")
    return row


def _spec(values: Mapping[str, Any], row: Dialect, path: Path, *, within: str = "") -> ModelSpec:
    config = Section({**row.defaults, **values}, path, within=within)
    family = family_of_hf(row.architecture)
    try:
        spec = _build(config, row, family)
    except ShapeError as err:
        raise SourceError(f"{path}: {err}") from err
    _check_activation(config, family)
    _check_leftovers(config)
    return spec


def _build(config: Section, row: Dialect, family: Family) -> ModelSpec:
    n_embd, n_heads, n_layers = (config.integer(key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    head_dim = config.optional_integer("head_dim") or n_embd // n_heads
    n_kv_heads = config.optional_integer("num_key_value_heads") or n_heads
    n_ff, n_ctx = config.integer("intermediate_size"), config.integer("max_position_embeddings")
    rope, rope_local = _ropes(config, row, head_dim)
    blocks: list[Block] = []
    for i, kind in enumerate(layer_kinds(config, row, n_layers, n_ctx)):
        blocks.append(Attention(layer=i, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, rope=kind.rope, window=kind.window))
        blocks.append(Mlp(layer=i, n_ff=n_ff))
    return ModelSpec(
        family=family.name,
        n_embd=n_embd,
        n_vocab=config.integer("vocab_size"),
        n_ctx=n_ctx,
        blocks=tuple(blocks),
        rope=rope,
        norm_eps=config.number("rms_norm_eps"),
        tied=config.boolean("tie_word_embeddings", default=False),
        attn_scale=_attn_scale(config, row, head_dim),
        embed_scale=math.sqrt(n_embd) if family.scaled_embedding else 1.0,
        rope_local=rope_local,
        biases=_biases(config, row, family),
    )


def _attn_scale(config: Section, row: Dialect, head_dim: int) -> float:
    scalar = config.number("query_pre_attn_scalar") if row.states_attn_scalar else head_dim
    return float(scalar) ** -0.5


def _biases(config: Section, row: Dialect, family: Family) -> frozenset[str]:
    def present(rule: str) -> bool:
        return rule == "yes" or (rule != "no" and row.states_biases and config.boolean(rule, default=False))

    groups = ((family.qkv_bias, ("wq", "wk", "wv")), (family.o_bias, ("wo",)), (family.mlp_bias, ("gate", "up", "down")))
    return frozenset(role for rule, roles in groups if present(rule) for role in roles)


def _ropes(config: Section, row: Dialect, head_dim: int) -> tuple[RopeSpec, RopeSpec | None]:
    """The main rotary embedding, and the local one of families that have it."""
    theta = config.optional_number("rope_theta") or 10000.0
    scaling, parameters = config.optional_section("rope_scaling"), config.optional_section("rope_parameters")
    if row.window != "local":
        partial = (config.optional_number("partial_rotary_factor") or 1.0) if row.partial_rotary else None
        found, key = (scaling, "rope_scaling") if scaling else (parameters, "rope_parameters")
        values = found.values if found else {}
        return read_rope(values, config, key=key, theta=theta, head_dim=head_dim, partial=partial, kinds=row.rope_kinds), None
    theta_local = config.number("rope_local_base_freq")
    nested: dict[str, Any] = {FULL: {}, SLIDING: {}}
    for key in parameters.values if parameters else ():
        if key not in nested:
            raise UnsupportedError(f"{config.where('rope_parameters')}.{key} is not known; supported: {FULL}, {SLIDING}")
        section = parameters.optional_section(key) if parameters else None
        nested[key] = section.values if section else {}
    full = {**nested[FULL], **scaling.values} if scaling else nested[FULL]
    key = "rope_scaling" if scaling else f"rope_parameters.{FULL}"
    return (
        read_rope(full, config, key=key, theta=theta, head_dim=head_dim),
        read_rope(nested[SLIDING], config, key=f"rope_parameters.{SLIDING}", theta=theta_local, head_dim=head_dim),
    )


def _check_activation(config: Section, family: Family) -> None:
    supported = _ACTIVATIONS[family.activation]
    for key in ("hidden_act", "hidden_activation"):
        value = config.get(key)
        if value is not None and value not in supported:
            raise UnsupportedError(f"{config.where(key)} is {value!r}; supported for {family.name}: {', '.join(supported)}")


def _check_leftovers(config: Section) -> None:
    """Refuse every key that was neither read, nor is harmless, nor holds the one value we compute."""
    for key in config.unused():
        value = config.values[key]
        if key in HARMLESS or key in QUANTIZATION or key.startswith(HARMLESS_PREFIXES):
            continue
        if key == "layer_types" and isinstance(value, list) and all(kind == FULL for kind in value):
            continue
        if key in ONLY:
            if any(isinstance(value, bool) == isinstance(only, bool) and value == only for only in ONLY[key]):
                continue
            supported = ", ".join(repr(v) for v in ONLY[key]) or "null"
            raise UnsupportedError(f"{config.where(key)} is {value!r}; supported: {supported}")
        raise UnsupportedError(
            f"{config.where(key)} (value {value!r}) is a setting edgeq does not know. Remove it if the model computes the same without it."
        )
