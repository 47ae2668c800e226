"""GGUF metadata of a model: general facts, then `<arch>.*`, in the order and spelling of llama.cpp's converter.

Source: conversion/base.py and the family files beside it, and gguf-py's metadata.py, in llama.cpp. Written in addition to what the
converter writes: key_length, value_length, rope.dimension_count and vocab_size always (the loader's defaults differ from a pruned
model's sizes), and the sliding-window pattern where it is not the default.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from edgeq.converters.gguf.architectures import Arch
from edgeq.errors import TokenizerError, UnsupportedError
from edgeq.gguf_fields import Field, ValueType
from edgeq.model import Vocabulary
from edgeq.rope import RopeSpec
from edgeq.spec import ModelSpec

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
FILE_TYPE_KEY, QUANTIZATION_KEY = "general.file_type", "general.quantization_version"

# The converter's order; facts that are not listed follow in alphabetical order.
_GENERAL_ORDER = (
    "name",
    "author",
    "version",
    "organization",
    "finetune",
    "basename",
    "description",
    "quantized_by",
    "size_label",
    "license",
    "license.name",
    "license.link",
    "url",
    "doi",
    "uuid",
    "repo_url",
    "tags",
    "languages",
)
_UNUSED, _UNUSED_SCORE = 5, -10000.0
# Facts that this writer decides.
_OWN = {"architecture", "type", "file_type", "quantization_version", "alignment"}


def general_fields(arch: str, name: str, metadata: Mapping[str, Any]) -> list[Field]:
    """`general.*` before the architecture's own keys. metadata: keys without the prefix; None and empty lists are left out.

    Raises UnsupportedError for a value that is neither text, number, truth value nor a list of texts.
    """
    facts = {**metadata, "name": name}
    rank = {key: i for i, key in enumerate(_GENERAL_ORDER)}
    fields = [Field.string("general.architecture", arch), Field.string("general.type", "model")]
    for key in sorted(facts.keys() - _OWN, key=lambda k: (rank.get(k, len(rank)), k)):
        value = facts[key]
        if value is None or value == [] or value == ():
            continue
        if not isinstance(value, str | int | float | list | tuple):
            raise UnsupportedError(f"general.{key}: {value!r} is not a text, a number, a truth value or a list of texts")
        if isinstance(value, list | tuple) and not all(isinstance(v, str) for v in value):
            raise UnsupportedError(f"general.{key}: {value!r} is not a list of texts")
        fields.append(Field.of(f"general.{key}", list(value) if isinstance(value, tuple) else value))
    return fields


def architecture_fields(spec: ModelSpec, arch: Arch) -> list[Field]:
    """`<arch>.*`: sizes, constants and rotary embedding. The spec must have passed `architectures.arch_for`."""
    attention = spec.attention[0]
    u32, f32 = Field.u32, Field.f32
    fields = [
        u32("block_count", spec.n_layers),
        u32("context_length", usable_context(spec, arch)),
        u32("embedding_length", spec.n_embd),
        *_size_fields(spec, arch),
        *_rope_scaling_fields(spec.rope),
        f32("rope.freq_base", spec.rope.base),
    ]
    if spec.rope_local is not None:
        fields.append(f32("rope.freq_base_swa", spec.rope_local.base))
    fields += [
        f32("attention.layer_norm_rms_epsilon", spec.norm_eps),
        u32("attention.key_length", attention.head_dim),
        u32("attention.value_length", attention.head_dim),
        *_window_fields(spec, arch),
        u32("vocab_size", spec.n_vocab),
        u32("rope.dimension_count", spec.rope.dim),
    ]
    return [f.renamed(f"{arch.name}.{f.key}") for f in fields]


def _size_fields(spec: ModelSpec, arch: Arch) -> list[Field]:
    """n_ff, heads and kv heads: of all layers, or of each, with 0 for what a layer does not have."""
    n_ff = {b.layer: b.n_ff for b in spec.mlps}
    n_heads, n_kv_heads = ({b.layer: getattr(b, name) for b in spec.attention} for name in ("n_heads", "n_kv_heads"))
    sizes = {"feed_forward_length": n_ff, "attention.head_count": n_heads, "attention.head_count_kv": n_kv_heads}
    if arch.rules.layered:
        return [Field.i32s(key, [by_layer.get(i, 0) for i in range(spec.n_layers)]) for key, by_layer in sizes.items()]
    return [Field.u32(key, by_layer[0]) for key, by_layer in sizes.items()]


def quantization_fields(file_type: int) -> list[Field]:
    return [Field.u32(FILE_TYPE_KEY, file_type), Field.u32(QUANTIZATION_KEY, QUANTIZATION_VERSION)]


def usable_context(spec: ModelSpec, arch: Arch) -> int:
    """Tokens for which the graph computes what the model means: an ignored sliding window makes no difference up to its length."""
    ignored = [b.window for b in spec.attention if b.window is not None and arch.rules.window_period is None]
    return min([spec.n_ctx, *ignored])


def context_notes(spec: ModelSpec, arch: Arch) -> tuple[str, ...]:
    """What the runtime does differently because of the context length, as sentences for the user."""
    notes = []
    usable = usable_context(spec, arch)
    if usable < spec.n_ctx:
        notes.append(
            f"The model has a sliding window of {usable} tokens, which {arch.title} ignores. The file says a context of "
            f"{usable} tokens instead of {spec.n_ctx}, up to which both agree."
        )
    if spec.rope.kind == "longrope":
        notes.append(
            f"llama.cpp chooses between short and long rope factors by the size of the context, not by the length of the text: run with "
            f"a context of at most {spec.rope.original_n_ctx} tokens unless longer texts are needed."
        )
    return tuple(notes)


def is_baked(rope: RopeSpec) -> bool:
    """Whether scaling is written as one divisor per pair. YaRN is when its ramp is not the default one: loaders read no key for it."""
    return rope.kind == "factors" or (rope.kind == "yarn" and (rope.beta_fast, rope.beta_slow) != (32, 1))


def _rope_scaling_fields(rope: RopeSpec) -> list[Field]:
    attn_factor = rope.attn_factor
    original = rope.original_n_ctx or 0
    fields = []
    if rope.kind == "yarn" and not is_baked(rope):
        fields = [
            Field.string("rope.scaling.type", "yarn"),
            Field.f32("rope.scaling.factor", rope.factor),
            Field.u32("rope.scaling.original_context_length", original),
        ]
        # llama.cpp multiplies by YaRN's own magnitude correction; the key holds what is left.
        attn_factor /= 1 + 0.1 * math.log(rope.factor) if rope.factor > 1 else 1.0
    elif rope.kind == "linear":
        fields = [Field.string("rope.scaling.type", "linear"), Field.f32("rope.scaling.factor", rope.factor)]
    elif rope.kind == "longrope":
        fields = [
            Field.string("rope.scaling.type", "longrope"),
            Field.u32("rope.scaling.original_context_length", original),
        ]
    if not math.isclose(attn_factor, 1.0, rel_tol=1e-6):
        fields.append(Field.f32("rope.scaling.attn_factor", attn_factor))
    return fields


def _window_fields(spec: ModelSpec, arch: Arch) -> list[Field]:
    windows = [b.window for b in spec.attention if b.window is not None]
    if not windows:
        return []
    fields = [Field.u32("attention.sliding_window", min(windows))]
    period = arch.rules.window_period
    if period is not None:
        pattern = [b.window is not None for b in spec.attention]
        if pattern != [(i + 1) % period != 0 for i in range(spec.n_layers)]:
            fields.append(Field.of("attention.sliding_window_pattern", pattern, ValueType.ARRAY, ValueType.BOOL))
    return fields


def fitted_vocabulary(vocabulary: Vocabulary, n_vocab: int) -> Vocabulary:
    """The vocabulary with one token per embedding row: checkpoints round the number of rows up, and llama.cpp wants both equal.

    Added tokens are spelled `[PAD<id>]` and typed unused, as the converter has them. Raises TokenizerError when there are too many tokens.
    """
    n = len(vocabulary.tokens)
    if n > n_vocab:
        raise TokenizerError(f"the tokenizer has {n} tokens, the embedding {n_vocab} rows. Use the model's own tokenizer.")
    known, added = set(vocabulary.tokens), []
    for i in range(n, n_vocab):
        spelling = f"[PAD{i}]"
        while spelling in known:
            spelling = f"[{spelling}]"
        added.append(spelling)
    return replace(
        vocabulary,
        tokens=(*vocabulary.tokens, *added),
        types=(*vocabulary.types, *[_UNUSED] * len(added)),
        scores=(*vocabulary.scores, *[_UNUSED_SCORE] * len(added)) if vocabulary.scores else (),
    )


def carried_fields(source: Mapping[str, Field], ours: Sequence[Field], arch: str) -> list[Field]:
    """Fields of a GGUF source, byte for byte in its order. Where the model has changed since (`<arch>.*` values that the source states
    differ from ours), ours take their place and those it left to defaults are added. When the architecture has changed, the source's
    keys take its prefix, but for those about rotation, which we state whole. A rotary scaling that we do not state is dropped.

    Keys that tell parts of a split file apart are dropped: what we write is whole.
    """
    if (old := source["general.architecture"].value) != arch:
        source = {key: f for key, f in source.items() if not key.startswith(f"{old}.rope.")}
        source = {f.key: f for key, f in source.items() for f in [f.renamed(re.sub(rf"^{re.escape(old)}\.", f"{arch}.", key))]}
    mine = {f.key: f for f in ours if f.key.startswith(f"{arch}.") or f.key == "general.architecture"}
    if f"{arch}.rope.scaling.type" not in mine and _scales(source, arch):  # now part of the divisors in `rope_freqs.weight`
        source = {key: f for key, f in source.items() if key not in _scaling_keys(arch)}
    changed = {key for key, f in mine.items() if key in source and not _same_value(source[key].value, f.value)}
    fields = [mine[key] if key in changed else field for key, field in source.items() if not key.startswith("split.")]
    if changed:
        fields += [f for key, f in mine.items() if key not in source]
    return fields


def _scaling_keys(arch: str) -> tuple[str, ...]:
    return (f"{arch}.rope.scaling.type", f"{arch}.rope.scaling.factor", f"{arch}.rope.scale_linear")


def _scales(source: Mapping[str, Field], arch: str) -> bool:
    """Whether a source's metadata scale angles; without a type, llama.cpp takes the factor for a linear one."""
    kind, factor, old_factor = (source[key].value if key in source else None for key in _scaling_keys(arch))
    return kind in ("yarn", "longrope") or (kind != "none" and (factor or old_factor or 1.0) != 1.0)


def with_quantization(fields: Sequence[Field], file_type: int) -> list[Field]:
    """The same fields with these two set: in their place where they stand already, else at the end."""
    new = {f.key: f for f in quantization_fields(file_type)}
    replaced = [new.pop(f.key, f) for f in fields]
    return replaced + list(new.values())


def _same_value(stated: Any, ours: Any) -> bool:
    if isinstance(stated, float) or isinstance(ours, float):
        return math.isclose(stated, ours, rel_tol=1e-5)
    return stated == ours
