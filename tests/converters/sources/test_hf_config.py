"""config.json to ModelSpec, against transformers' own configuration and rotary classes."""

from __future__ import annotations

import functools
import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import TINY_FAMILIES, random_model

from edgeq.converters.sources.hf_config import HfConfig, parse_config, read_config
from edgeq.converters.sources.hf_dialects import DIALECTS, HARMLESS, ONLY, WRAPPERS
from edgeq.errors import EdgeqError, SourceError, UnsupportedError
from edgeq.families import FAMILIES, family_of_hf
from edgeq.rope import RopeSpec
from edgeq.spec import ModelSpec

HERE = Path("m/config.json")

# As published, in the spelling of transformers 4. Values are facts of https://huggingface.co/<key>/blob/main/config.json.
PUBLISHED: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "transformers_version": "4.42.3",
        "use_cache": True,
        "vocab_size": 49152,
    },
    "meta-llama/Llama-3.2-1B": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "use_cache": True,
        "vocab_size": 128256,
    },
    "mistralai/Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "Qwen/Qwen2.5-0.5B-Instruct": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen/Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    # The 48 factors of each list are longer than a test needs: these are made up, the rest is not.
    "microsoft/Phi-3-mini-128k-instruct": {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
        "bos_token_id": 1,
        "embd_pdrop": 0.0,
        "eos_token_id": 32000,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "model_type": "phi3",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 32000,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "long_factor": [1.0 + i for i in range(48)],
            "short_factor": [1.0 + 0.02 * i for i in range(48)],
            "type": "longrope",
        },
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.2",
        "use_cache": True,
        "vocab_size": 32064,
    },
    "microsoft/Phi-4-mini-instruct": {
        "_name_or_path": "Phi-4-mini-instruct",
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
        "bos_token_id": 199999,
        "embd_pdrop": 0.0,
        "eos_token_id": 199999,
        "full_attn_mod": 1,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "phi3",
        "num_attention_heads": 24,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 199999,
        "partial_rotary_factor": 0.75,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "long_factor": [1.0 + i for i in range(48)],
            "short_factor": [1.0] * 48,
            "type": "longrope",
        },
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0",
        "use_cache": True,
        "vocab_size": 200064,
    },
    "google/gemma-3-1b-it": {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "initializer_range": 0.02,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "use_cache": True,
        "vocab_size": 262144,
    },
    "HuggingFaceTB/SmolLM3-3B": {
        "architectures": ["SmolLM3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": 128012,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "layer_types": ["full_attention"] * 36,
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "mlp_bias": False,
        "model_type": "smollm3",
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 4,
        "pad_token_id": 128004,
        "pretraining_tp": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.54.0.dev0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 128256,
    },
}


def transformers_config(values: dict[str, Any]) -> Any:
    """The configuration object that transformers makes of the same JSON."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**json.loads(json.dumps(values)))


def rotary(config: Any, layer_type: str | None = None) -> tuple[np.ndarray, float]:
    """Frequencies and attention factor of transformers' rotary module for this config."""
    name = {"gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    (embedding,) = [getattr(module, n) for n in dir(module) if n.endswith("RotaryEmbedding")]
    made = embedding(config)
    prefix = f"{layer_type}_" if layer_type else ""
    return getattr(made, f"{prefix}inv_freq").numpy(), getattr(made, f"{prefix}attention_scaling")


def assert_rope_equal(rope: RopeSpec, oracle: tuple[np.ndarray, float], *, n_ctx: int = 1) -> None:
    """transformers computes in float32: a power and a few products, good to about 1e-6."""
    np.testing.assert_allclose(rope.frequencies(n_ctx), oracle[0], rtol=3e-6)
    assert rope.attn_factor == pytest.approx(oracle[1], rel=1e-12)


def assert_spec_equal(spec: ModelSpec, config: Any) -> None:
    """Every fact of the spec, against what transformers made of the same file."""
    assert (spec.n_embd, spec.n_vocab, spec.n_ctx) == (config.hidden_size, config.vocab_size, config.max_position_embeddings)
    assert (spec.n_layers, spec.norm_eps, spec.tied) == (config.num_hidden_layers, config.rms_norm_eps, config.tie_word_embeddings)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    types = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    for block, kind in zip(spec.attention, types, strict=True):
        assert (block.n_heads, block.n_kv_heads, block.head_dim) == (config.num_attention_heads, config.num_key_value_heads, head_dim)
        window = None if kind == "full_attention" else getattr(config, "sliding_window", None)
        assert block.window == (window if window is not None and window < spec.n_ctx else None)
    assert {mlp.n_ff for mlp in spec.mlps} == {config.intermediate_size}
    if config.model_type == "gemma3_text":
        assert spec.rope_local is not None
        assert_rope_equal(spec.rope, rotary(config, "full_attention"))
        assert_rope_equal(spec.rope_local, rotary(config, "sliding_attention"))
        assert [b.rope for b in spec.attention] == [{"full_attention": "main", "sliding_attention": "local"}[kind] for kind in types]
        assert spec.embed_scale == pytest.approx(math.sqrt(config.hidden_size))
        assert spec.attn_scale == pytest.approx(config.query_pre_attn_scalar**-0.5)
        return
    assert_rope_equal(spec.rope, rotary(config))
    rotates = getattr(config, "no_rope_layers", [1] * config.num_hidden_layers)
    assert [b.rope for b in spec.attention] == ["main" if r else "none" for r in rotates]
    assert (spec.embed_scale, spec.rope_local) == (1.0, None)
    assert spec.attn_scale == pytest.approx(head_dim**-0.5)


def transformers_4(values: dict[str, Any]) -> dict[str, Any]:
    """The same config as transformers 4 would have spelled it."""
    old = dict(values)
    rope = old.pop("rope_parameters")
    if "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
        del old["layer_types"]
        old["sliding_window_pattern"] = 3
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    old["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if scaling.get("rope_type") == "longrope":
        scaling["type"] = scaling.pop("rope_type")
    old["rope_scaling"] = None if scaling.get("rope_type") == "default" else scaling
    old["torch_dtype"] = old.pop("dtype")
    return old


def tiny_config(name: str, **overrides: Any) -> dict[str, Any]:
    """What config.json of a tiny model says, in the spelling of transformers 5."""
    return json.loads(_tiny_config(name, json.dumps(overrides)))


@functools.cache
def _tiny_config(name: str, overrides: str) -> str:
    config = random_model(name, **json.loads(overrides)).config
    config.dtype = "float32"
    return config.to_json_string(use_diff=False)


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_spec_equals_transformers_config(name: str) -> None:
    values = tiny_config(name)
    assert_spec_equal(parse_config(values, HERE).spec, transformers_config(values))


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_both_spellings_give_one_spec(name: str) -> None:
    values = tiny_config(name)
    assert parse_config(transformers_4(values), HERE) == parse_config(values, HERE)


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_configs(model: str) -> None:
    values = PUBLISHED[model]
    assert_spec_equal(parse_config(values, HERE).spec, transformers_config(values))


def test_every_family_has_a_dialect() -> None:
    assert {row.architecture for row in DIALECTS} == {name for row in FAMILIES for name in row.hf_architectures}
    for row in DIALECTS:
        assert row.model_type in family_of_hf(row.architecture).hf_model_types
    for wrapper in WRAPPERS:
        assert wrapper.model_type in {row.model_type for row in DIALECTS}
    assert not HARMLESS & ONLY.keys()


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": YARN,
    "yarn-betas": {**YARN, "beta_fast": 16, "beta_slow": 2},
    "yarn-attention-factor": {**YARN, "attention_factor": 1.25},
    "yarn-mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-one-mscale": {**YARN, "mscale": 0.7},
    "yarn-no-original": {"rope_type": "yarn", "factor": 4.0},
    "yarn-shrinking": {**YARN, "factor": 1.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + i / 10 for i in range(12)],
        "long_factor": [2.0 + i for i in range(12)],
        "original_max_position_embeddings": 64,
    },
    "longrope-factor": {
        "rope_type": "longrope",
        "factor": 16.0,
        "short_factor": [1.0] * 12,
        "long_factor": [2.0 + i for i in range(12)],
        "original_max_position_embeddings": 64,
    },
    "longrope-attention-factor": {
        "rope_type": "longrope",
        "attention_factor": 1.5,
        "short_factor": [1.0] * 12,
        "long_factor": [2.0 + i for i in range(12)],
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling", "type"])
def test_rope_kinds_equal_transformers(name: str, spelling: str) -> None:
    values = tiny_config("llama")
    rope = ROPES[name]
    if spelling == "rope_parameters":
        values["rope_parameters"] = {**rope, "rope_theta": 20000.0}
    else:
        del values["rope_parameters"]
        values["rope_theta"] = 20000.0
        values["rope_scaling"] = rope
        if spelling == "type":
            values["rope_scaling"] = {"type": rope["rope_type"], **{k: v for k, v in rope.items() if k != "rope_type"}}
    config = transformers_config(values)
    spec = parse_config(values, HERE).spec
    assert_rope_equal(spec.rope, rotary(config))
    if spec.rope.kind == "longrope":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        assert_rope_equal(spec.rope, ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=65), n_ctx=65)
        assert not np.allclose(spec.rope.frequencies(64), spec.rope.frequencies(65))


def test_su_is_longrope() -> None:
    values = transformers_4(tiny_config("phi3-longrope"))
    longrope = parse_config(values, HERE)
    values["rope_scaling"]["type"] = "su"
    assert parse_config(values, HERE) == longrope
    assert longrope.spec.rope.kind == "longrope"


def test_gemma3_pattern_without_layer_types() -> None:
    values = tiny_config("gemma3", num_hidden_layers=7, layer_types=None)
    del values["layer_types"]
    del values["_sliding_window_pattern"]
    assert [b.window for b in parse_config(values, HERE).spec.attention] == [8, 8, 8, 8, 8, None, 8]
    assert [b.window for b in parse_config({**values, "sliding_window_pattern": 2}, HERE).spec.attention] == [8, None] * 3 + [8]
    assert [b.window for b in parse_config({**values, "_sliding_window_pattern": 3}, HERE).spec.attention][2::3] == [None, None]


def test_gemma3_inside_a_multimodal_config() -> None:
    """As google/gemma-3-4b-it publishes it: the text part states only what differs from its class."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    values = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": text,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    }
    parsed = parse_config(values, HERE)
    assert parsed.wrapper is WRAPPERS[0]
    assert_spec_equal(parsed.spec, transformers_config(values).text_config)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_qwen_windows(name: str) -> None:
    values = tiny_config(name, num_hidden_layers=4, use_sliding_window=True, sliding_window=16, max_window_layers=3)
    assert_spec_equal(parse_config(values, HERE).spec, transformers_config(values))
    del values["layer_types"]
    spec = parse_config(values, HERE).spec
    assert [b.window for b in spec.attention] == [None, None, None, 16]
    values["max_window_layers"] = 0
    assert [b.window for b in parse_config(values, HERE).spec.attention] == [16] * 4
    values["layer_types"] = ["sliding_attention", "full_attention"] * 2
    assert [b.window for b in parse_config(values, HERE).spec.attention] == [16, None, 16, None]


@pytest.mark.parametrize("name", ["mistral", "phi3"])
def test_one_window_for_all_layers(name: str) -> None:
    values = tiny_config(name, sliding_window=16)
    assert_spec_equal(parse_config(values, HERE).spec, transformers_config(values))
    assert {b.window for b in parse_config(values, HERE).spec.attention} == {16}
    values["sliding_window"] = values["max_position_embeddings"]  # no query of this context looks that far
    assert {b.window for b in parse_config(values, HERE).spec.attention} == {None}


def test_mistral_without_a_window_key_has_the_default_window() -> None:
    values = tiny_config("mistral", max_position_embeddings=8192)
    del values["sliding_window"]
    assert {b.window for b in parse_config(values, HERE).spec.attention} == {4096}
    assert transformers_config(values).sliding_window == 4096


def test_smollm3_layers_without_rope() -> None:
    values = tiny_config("smollm3", no_rope_layers=[0, 1, 1, 0])
    assert [b.rope for b in parse_config(values, HERE).spec.attention] == ["none", "main", "main", "none"]
    del values["no_rope_layers"]
    values["no_rope_layer_interval"] = 2
    assert [b.rope for b in parse_config(values, HERE).spec.attention] == ["main", "none"] * 2
    del values["layer_types"]
    values |= {"use_sliding_window": True, "sliding_window": 16}
    assert [b.window for b in parse_config(values, HERE).spec.attention] == [None, 16] * 2
    assert_spec_equal(parse_config(values, HERE).spec, transformers_config(values))


@pytest.mark.parametrize(
    ("name", "overrides", "biases"),
    [
        ("llama", {}, set()),
        ("llama", {"attention_bias": True}, {"wq", "wk", "wv", "wo"}),
        ("llama", {"mlp_bias": True}, {"gate", "up", "down"}),
        ("qwen2", {}, {"wq", "wk", "wv"}),
        ("qwen3", {"attention_bias": True}, {"wq", "wk", "wv", "wo"}),
        ("phi3", {}, set()),
    ],
)
def test_biases(name: str, overrides: dict[str, Any], biases: set[str]) -> None:
    assert parse_config(tiny_config(name, **overrides), HERE).spec.biases == biases


def test_architecture_follows_from_model_type() -> None:
    values = tiny_config("qwen3")
    expected = parse_config(values, HERE)
    del values["architectures"]
    assert parse_config(values, HERE) == expected


def test_harmless_keys_change_nothing() -> None:
    values = tiny_config("llama")
    expected = parse_config(values, HERE)
    values |= {"unsloth_version": "2025.1", "_name_or_path": "x", "transformers.js_config": {}, "rope_interleaved": False}
    values |= {"layer_types": ["full_attention"] * 2, "partial_rotary_factor": 1, "quantization_config": None, "pretraining_tp": 2}
    assert parse_config(values, HERE) == expected


Change = dict[str, Any]
ABSENT = object()


def altered(name: str, change: Change) -> dict[str, Any]:
    values = tiny_config(name)
    for key, value in change.items():
        if value is ABSENT:
            del values[key]
        else:
            values[key] = value
    return values


UNSUPPORTED = [
    (
        "llama",
        {"architectures": ["MambaForCausalLM"]},
        "m/config.json: architecture 'MambaForCausalLM' is not supported; supported: LlamaForCausalLM, ",
    ),
    (
        "llama",
        {"architectures": ABSENT, "model_type": "gpt2"},
        "m/config.json: model_type 'gpt2' is not supported; supported: llama, mistral, ",
    ),
    ("llama", {"hidden_act": "gelu"}, "m/config.json: hidden_act is 'gelu'; supported for llama: silu, swish"),
    ("gemma3", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; supported for gemma3: gelu_pytorch_tanh"),
    ("llama", {"attn_magic": 3}, r"m/config.json: attn_magic \(value 3\) is a setting edgeq does not know. Remove it if "),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; supported: null"),
    ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0; supported: null"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True; supported: False"),
    ("mistral", {"attention_bias": True}, "attention_bias is True; supported: False"),
    ("phi3", {"full_attn_mod": 2}, "full_attn_mod is 2; supported: 1"),
    ("qwen2", {"use_mrope": True}, "use_mrope is True; supported: False"),
    ("llama", {"sliding_window": 16}, "sliding_window is 16; supported: null"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; supported: 1.0"),
    (
        "llama",
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor is 0.5; supported for this architecture: 1.0",
    ),
    ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types .* is a setting edgeq does not know"),
    (
        "qwen3",
        {"layer_types": ["full_attention", "chunked_attention"]},
        "contains 'chunked_attention'; supported: full_attention, sliding_attention",
    ),
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_parameters.rope_type is 'dynamic'; supported: default, linear, llama3, yarn",
    ),
    ("llama", {"rope_scaling": {"type": "mrope"}}, "rope_scaling.rope_type is 'mrope'; supported"),
    ("phi3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'; supported: default, longrope"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}},
        "rope_parameters.beta_fast is not known for rope type 'linear'",
    ),
    (
        "llama",
        {"rope_parameters": {"rope_type": "default", "factor": 2.0}},
        "rope_parameters.factor is not known for rope type 'default'; known: none",
    ),
    ("llama", {"rope_parameters": {**YARN, "truncate": False}}, "rope_parameters.truncate is false; supported: true"),
    (
        "gemma3",
        {"rope_parameters": {"rope_type": "default"}},
        "rope_parameters.rope_type is not known; supported: full_attention, sliding_attention",
    ),
    ("llama", {"head_dim": 23}, "m/config.json: 23 of 23 dimensions of a head would rotate; supported: an even number"),
    (
        "llama",
        {"quantization_config": {"quant_method": "aqlm", "nbits_per_codebook": 16}},
        r"config.json: quantization_config has quant_method 'aqlm'; supported: awq, bitsandbytes, .*Use the float checkpoint",
    ),
    ("llama", {"quantization_config": {"bits": 4}}, r"quantization_config names no quant_method; supported: awq"),
    ("llama", {"compression_config": "int8"}, r"compression_config says that the weights are quantized, in a way that is not read"),
    ("llama", {"quantization": {"group_size": 64, "bits": 4}}, "Use the float checkpoint this one was made from, or a GGUF file of it"),
]


@pytest.mark.parametrize(("name", "change", "message"), UNSUPPORTED)
def test_unsupported(name: str, change: Change, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        parse_config(altered(name, change), HERE)


BROKEN = [
    ("llama", {"hidden_size": ABSENT}, "m/config.json: hidden_size is missing. The file is not complete"),
    ("llama", {"hidden_size": 64.0}, "hidden_size is 64.0, expected a positive whole number"),
    ("llama", {"num_hidden_layers": True}, "num_hidden_layers is True, expected a positive whole number"),
    ("llama", {"vocab_size": 0}, "vocab_size is 0, expected a positive whole number"),
    ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', expected a positive number"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a positive number"),
    ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
    ("llama", {"num_key_value_heads": 3}, "m/config.json: layer 0: 4 heads do not divide into 3 kv heads"),
    ("llama", {"architectures": ["A", "B"]}, r"architectures is \['A', 'B'\], expected a list of one name"),
    ("llama", {"architectures": ABSENT, "model_type": ABSENT}, "architectures is None, expected a list of one name"),
    ("llama", {"model_type": "mistral"}, "model_type is 'mistral', but architecture LlamaForCausalLM goes with 'llama'"),
    ("llama", {"rope_parameters": [1]}, r"rope_parameters is \[1\], expected an object"),
    ("llama", {"rope_parameters": {"rope_theta": 1}}, "rope_parameters.rope_theta is 1.0, expected more than 1"),
    ("llama", {"rope_parameters": {**YARN, "original_max_position_embeddings": 1}}, "original_max_position_embeddings is 1, expected more"),
    ("llama", {"rope_scaling": []}, r"rope_scaling is \[\], expected an object"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is missing"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": -2}}, "rope_parameters.factor is -2, expected a positive number"),
    (
        "llama3",
        {"rope_parameters": {**ROPES["llama3"], "low_freq_factor": 4.0}},
        "low_freq_factor is 4.0, expected less than high_freq_factor",
    ),
    (
        "phi3-longrope",
        {"rope_scaling": {"type": "longrope", "short_factor": "x", "long_factor": []}},
        "rope_scaling.short_factor is 'x', expected a list",
    ),
    (
        "phi3-longrope",
        {"rope_scaling": {"type": "longrope", "short_factor": [0], "long_factor": []}},
        "short_factor contains 0, expected positive numbers",
    ),
    ("phi3-longrope", {"original_max_position_embeddings": 32}, "original_max_position_embeddings is 64, but the config itself says 32"),
    (
        "phi3-longrope",
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        "rope_scaling.short_factor has 1 values, expected 12",
    ),
    ("qwen3", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 layers"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "has 'sliding_attention' layers, but no sliding_window is in use"),
    (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": None, "max_window_layers": -1},
        "max_window_layers is -1, expected a whole number",
    ),
    ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers is \[1, 0\], expected a 0 or 1 for each of 4 layers"),
]


@pytest.mark.parametrize(("name", "change", "message"), BROKEN)
def test_broken(name: str, change: Change, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        parse_config(altered(name, change), HERE)


def test_multimodal_config_without_its_text_part() -> None:
    with pytest.raises(SourceError, match=r"m/config.json: text_config is missing"):
        parse_config({"architectures": ["Gemma3ForConditionalGeneration"]}, HERE)


def test_multimodal_config_names_the_key_inside() -> None:
    with pytest.raises(UnsupportedError, match=r"m/config.json: text_config.depth \(value 3\)"):
        parse_config({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"depth": 3}}, HERE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"config.json: not valid JSON \(.*\). Download the file again"),
        (b'{"a": "\xff"}', "config.json: not valid JSON"),
        (b"[1]", "config.json: expected a JSON object, found a list"),
        (b"3", "config.json: expected a JSON object, found a number"),
        (b"[" * 100000, "config.json: not valid JSON"),
    ],
)
def test_not_json(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read_config(tmp_path / "config.json")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"config.json is missing. Download the model's folder again"):
        read_config(tmp_path / "config.json")


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"cannot be read \(Is a directory\)"):
        read_config(tmp_path)


@pytest.mark.parametrize("name", TINY_FAMILIES)
@pytest.mark.parametrize("value", [[], {}, "x", -1, 1, 1.5, None, True])
def test_any_value_of_another_type_is_our_error_or_understood(name: str, value: Any) -> None:
    for key in tiny_config(name):
        try:
            parsed = parse_config({**tiny_config(name), key: value}, HERE)
        except EdgeqError as err:
            assert str(err)
        else:
            assert isinstance(parsed, HfConfig)
