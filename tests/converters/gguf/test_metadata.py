"""Metadata: what is written for a model, and what is carried from a GGUF source."""

from __future__ import annotations

import math
from typing import Any

import pytest
from made_models import N_VOCAB, made_model, made_spec

from edgeq.converters.gguf.architectures import Arch
from edgeq.converters.gguf.lowering import lower
from edgeq.converters.gguf.metadata import (
    architecture_fields,
    carried_fields,
    context_notes,
    fitted_vocabulary,
    general_fields,
    with_quantization,
)
from edgeq.converters.sources.gguf_spec import RULES
from edgeq.errors import TokenizerError, UnsupportedError
from edgeq.families import family
from edgeq.gguf_fields import Field, ValueType
from edgeq.model import Vocabulary
from edgeq.rope import RopeSpec
from edgeq.spec import ModelSpec


def values(spec: ModelSpec) -> dict[str, Any]:
    return {f.key: f.value for f in architecture_fields(spec, arch(spec))}


def arch(spec: ModelSpec) -> Arch:
    return Arch(spec.family, RULES[spec.family], family(spec.family))


def test_general_facts_come_in_the_converters_order() -> None:
    facts = {
        "languages": ["en", "de"], "license": "mit", "name": "other", "size_label": "1B", "tags": [], "license.link": "u",
        "base_model.count": 2, "organization": None, "type": "adapter", "zeta": True,
    }  # fmt: skip
    fields = general_fields("qwen2", "Thing", facts)
    assert [(f.key.removeprefix("general."), f.value) for f in fields] == [
        ("architecture", "qwen2"),
        ("type", "model"),
        ("name", "Thing"),
        ("size_label", "1B"),
        ("license", "mit"),
        ("license.link", "u"),
        ("languages", ["en", "de"]),
        ("base_model.count", 2),
        ("zeta", True),
    ]


def test_facts_that_gguf_cannot_say_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"general\.card: \{'a': 1\} is not a text, a number, a truth value or a list of texts"):
        general_fields("llama", "x", {"card": {"a": 1}})
    with pytest.raises(UnsupportedError, match=r"general\.tags: \['a', 1\] is not a list of texts"):
        general_fields("llama", "x", {"tags": ["a", 1]})


def test_sizes_and_constants() -> None:
    fields = architecture_fields(made_spec("llama"), arch(made_spec("llama")))
    assert [(f.key.removeprefix("llama."), f.type.name, f.value) for f in fields] == [
        ("block_count", "UINT32", 2),
        ("context_length", "UINT32", 256),
        ("embedding_length", "UINT32", 64),
        ("feed_forward_length", "UINT32", 160),
        ("attention.head_count", "UINT32", 4),
        ("attention.head_count_kv", "UINT32", 2),
        ("rope.freq_base", "FLOAT32", 10000.0),
        ("attention.layer_norm_rms_epsilon", "FLOAT32", pytest.approx(1e-5, rel=1e-6)),
        ("attention.key_length", "UINT32", 24),
        ("attention.value_length", "UINT32", 24),
        ("vocab_size", "UINT32", N_VOCAB),
        ("rope.dimension_count", "UINT32", 24),
    ]


def test_yarn_states_what_llama_cpp_does_not_multiply_by_itself() -> None:
    own = 1 + 0.1 * math.log(4)
    yarn = {"dim": 24, "base": 1e4, "kind": "yarn", "factor": 4.0, "original_n_ctx": 64}
    plain = values(made_spec(rope=RopeSpec(**yarn, attn_factor=own)))
    assert plain["llama.rope.scaling.type"] == "yarn"
    assert (plain["llama.rope.scaling.factor"], plain["llama.rope.scaling.original_context_length"]) == (4.0, 64)
    assert "llama.rope.scaling.attn_factor" not in plain
    other = values(made_spec(rope=RopeSpec(**yarn, attn_factor=1.3)))
    assert other["llama.rope.scaling.attn_factor"] == pytest.approx(1.3 / own)
    # Another ramp is written as factors, so no scaling may be applied on top of them.
    baked = values(made_spec(rope=RopeSpec(**yarn, attn_factor=1.3, beta_fast=8.0)))
    assert baked["llama.rope.scaling.attn_factor"] == pytest.approx(1.3)
    assert "llama.rope.scaling.type" not in baked


def test_linear_and_longrope_scaling() -> None:
    linear = values(made_spec("qwen2", rope=RopeSpec(dim=24, base=1e4, kind="linear", factor=8.0)))
    assert (linear["qwen2.rope.scaling.type"], linear["qwen2.rope.scaling.factor"]) == ("linear", 8.0)
    factors = (1.0,) * 12
    rope = RopeSpec(dim=24, base=1e4, kind="longrope", short_factors=factors, long_factors=factors, original_n_ctx=64, attn_factor=1.19)
    spec = made_spec("phi3", rope=rope)
    long = values(spec)
    assert (long["phi3.rope.scaling.type"], long["phi3.rope.scaling.original_context_length"]) == ("longrope", 64)
    assert long["phi3.rope.scaling.attn_factor"] == pytest.approx(1.19)
    (note,) = context_notes(spec, arch(spec))
    assert note.startswith(
        "llama.cpp chooses between short and long rope factors by the size of the context, not by the length of the text: "
    )
    assert "at most 64 tokens" in note


def test_windows_that_are_ignored_cap_the_context() -> None:
    blocks = tuple(type(b)(**{**vars(b), "window": 100}) if hasattr(b, "window") else b for b in made_spec().blocks)
    spec = made_spec(blocks=blocks)
    assert values(spec)["llama.context_length"] == 100
    assert values(spec)["llama.attention.sliding_window"] == 100
    (note,) = context_notes(spec, arch(spec))
    assert note == (
        "The model has a sliding window of 100 tokens, which llama.cpp's llama architecture ignores. "
        "The file says a context of 100 tokens instead of 256, up to which both agree."
    )
    assert context_notes(made_spec(), arch(made_spec())) == ()


def test_windows_that_are_honoured_are_stated_and_so_is_an_unusual_pattern() -> None:
    spec = made_spec("gemma3", n_layers=3)
    gemma = values(spec)
    assert gemma["gemma3.context_length"] == 256
    assert gemma["gemma3.attention.sliding_window"] == 8
    assert gemma["gemma3.attention.sliding_window_pattern"] == [True, True, False]
    assert gemma["gemma3.rope.freq_base_swa"] == 5000.0
    pattern = next(f for f in architecture_fields(spec, arch(spec)) if f.key.endswith("_pattern"))
    assert pattern.item_type is ValueType.BOOL
    usual = made_spec("gemma3", n_layers=2)
    assert "gemma3.attention.sliding_window_pattern" not in values(usual)


def short_vocabulary(n: int) -> Vocabulary:
    return Vocabulary(
        kind="spm", pre="default", tokens=tuple(f"t{i}" for i in range(n)), types=(1,) * n, scores=tuple(-float(i) for i in range(n))
    )


def test_a_vocabulary_is_padded_to_the_embedding() -> None:
    vocabulary = short_vocabulary(10)
    fitted = fitted_vocabulary(vocabulary, 13)
    assert fitted.tokens[:10] == vocabulary.tokens
    assert fitted.tokens[10:] == ("[PAD10]", "[PAD11]", "[PAD12]")
    assert fitted.types[10:] == (5, 5, 5)
    assert fitted.scores[10:] == (-10000.0,) * 3
    assert fitted_vocabulary(vocabulary, 10) == vocabulary
    taken = (*vocabulary.tokens[:9], "[PAD10]")
    assert fitted_vocabulary(type(vocabulary)(**{**vars(vocabulary), "tokens": taken}), 11).tokens[10] == "[[PAD10]]"
    with pytest.raises(TokenizerError, match=r"the tokenizer has 10 tokens, the embedding 9 rows\. Use the model's own tokenizer"):
        fitted_vocabulary(vocabulary, 9)


def test_carried_fields_are_the_sources_own_unless_the_model_has_changed() -> None:
    spec = made_spec("llama")
    low = lower(made_model(spec))
    ours = list(low.fields)
    source = {f.key: f for f in ours if not f.key.endswith(("key_length", "value_length"))}
    source["llama.expert_used_count"] = Field.u32("llama.expert_used_count", 0)
    source["llama.context_length"] = Field.of("llama.context_length", 256, ValueType.UINT64)
    source["split.count"] = Field.of("split.count", 2, ValueType.UINT16)
    source["split.no"] = Field.of("split.no", 0, ValueType.UINT16)
    carried = carried_fields(source, ours, "llama")
    assert carried == [f for key, f in source.items() if not key.startswith("split.")]
    assert next(f for f in carried if f.key == "llama.context_length").type is ValueType.UINT64

    narrower = architecture_fields(made_spec("llama", n_ff=128), arch(spec))
    changed = {f.key: f.value for f in carried_fields(source, narrower, "llama")}
    assert changed["llama.feed_forward_length"] == 128
    assert changed["llama.attention.key_length"] == 24
    assert list(changed)[:3] == list(source)[:3]


def test_quantization_fields_are_replaced_where_they_stand_or_added() -> None:
    a, b = Field.u32("a", 1), Field.u32("b", 2)
    fields = with_quantization([a, Field.u32("general.file_type", 3), b], 15)
    assert [(f.key, f.value) for f in fields] == [("a", 1), ("general.file_type", 15), ("b", 2), ("general.quantization_version", 2)]
