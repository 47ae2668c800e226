"""Architectures as rows: what distinguishes one model family from another, and how its tensors are called elsewhere.

Canonical tensor names (ours): `embed`, `final_norm`, `head`, and per layer `layers.3.<role>`, each followed by `.weight` or `.bias`.
Roles: attn_norm wq wk wv wo q_norm k_norm post_attn_norm mlp_norm gate up down post_mlp_norm.
Canonical layout: projections are (n_out, n_in), q and k in "rotate half" order, norms multiply by their weight as stored,
fused projections are split. Readers bring a checkpoint into this form; carriers take it out again.

Code asks a row's fields, never its name. A new family is a new row, and a new behaviour is a new field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from edgeq.errors import UnsupportedError

Activation = Literal["silu", "gelu_tanh"]

ROLES = ("attn_norm", "wq", "wk", "wv", "wo", "q_norm", "k_norm", "post_attn_norm", "mlp_norm", "gate", "up", "down", "post_mlp_norm")
LINEAR_ROLES = ("wq", "wk", "wv", "wo", "gate", "up", "down")

# Joined projections: the canonical roles whose rows lie one after another in one matrix.
FUSED: Mapping[str, tuple[str, ...]] = {"wqkv": ("wq", "wk", "wv"), "gate_up": ("gate", "up")}

# Hugging Face module names below `model.`, by canonical role. A row overrides what it spells differently.
_HF = {
    "embed": "embed_tokens",
    "final_norm": "norm",
    "attn_norm": "layers.{i}.input_layernorm",
    "wq": "layers.{i}.self_attn.q_proj",
    "wk": "layers.{i}.self_attn.k_proj",
    "wv": "layers.{i}.self_attn.v_proj",
    "wo": "layers.{i}.self_attn.o_proj",
    "q_norm": "layers.{i}.self_attn.q_norm",
    "k_norm": "layers.{i}.self_attn.k_norm",
    "mlp_norm": "layers.{i}.post_attention_layernorm",
    "gate": "layers.{i}.mlp.gate_proj",
    "up": "layers.{i}.mlp.up_proj",
    "down": "layers.{i}.mlp.down_proj",
}

# GGUF names, by canonical role (gguf-py tensor_mapping.py). The same in every family; fused ones are extra roles.
GGUF_NAMES = {
    "embed": "token_embd",
    "final_norm": "output_norm",
    "head": "output",
    "attn_norm": "blk.{i}.attn_norm",
    "wq": "blk.{i}.attn_q",
    "wk": "blk.{i}.attn_k",
    "wv": "blk.{i}.attn_v",
    "wqkv": "blk.{i}.attn_qkv",
    "wo": "blk.{i}.attn_output",
    "q_norm": "blk.{i}.attn_q_norm",
    "k_norm": "blk.{i}.attn_k_norm",
    "post_attn_norm": "blk.{i}.post_attention_norm",
    "mlp_norm": "blk.{i}.ffn_norm",
    "gate": "blk.{i}.ffn_gate",
    "up": "blk.{i}.ffn_up",
    "down": "blk.{i}.ffn_down",
    "post_mlp_norm": "blk.{i}.post_ffw_norm",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """Facts of one family.

    hf_architectures / hf_model_types: `architectures[0]` and `model_type` in config.json. gguf_arch: `general.architecture`.
    gguf_layered: the architecture that computes the same with sizes of its own in every layer, if llama.cpp has one.
    norm_offset: added to stored Hugging Face norm weights to get the multiplier (Gemma stores w - 1; GGUF stores the multiplier).
    qkv_bias / o_bias / mlp_bias: "yes", "no", or the name of the config key that decides.
    gguf_rope: order of q and k rows in GGUF: "neox" = rotate half as ours, "norm" = interleaved pairs.
    fused_qkv / fused_gate_up: stored as one matrix, rows [q; k; v] and [gate; up].
    square_attention: the stock llama.cpp loader wants n_heads * head_dim == n_embd.
    windowed_cache: llama.cpp applies sliding windows and keeps a cache of a window's size for those layers; elsewhere it ignores them.
    """

    name: str
    hf_architectures: tuple[str, ...]
    hf_model_types: tuple[str, ...]
    gguf_arch: str
    gguf_layered: str | None = None
    activation: Activation = "silu"
    norm_offset: float = 0.0
    qk_norm: bool = False
    post_norms: bool = False
    qkv_bias: str = "no"
    o_bias: str = "no"
    mlp_bias: str = "no"
    fused_qkv: bool = False
    fused_gate_up: bool = False
    gguf_rope: Literal["norm", "neox"] = "neox"
    scaled_embedding: bool = False
    square_attention: bool = False
    windowed_cache: bool = False
    hf_overrides: Mapping[str, str] = field(default_factory=dict)

    def hf_name(self, role: str) -> str:
        """Module name below `model.` for a role, with `{i}` for the layer."""
        return self.hf_overrides.get(role) or _HF[role]

    @property
    def roles(self) -> tuple[str, ...]:
        """Per-layer roles this family has, in canonical order."""
        absent = set()
        if not self.qk_norm:
            absent |= {"q_norm", "k_norm"}
        if not self.post_norms:
            absent |= {"post_attn_norm", "post_mlp_norm"}
        return tuple(r for r in ROLES if r not in absent)


FAMILIES = (
    # Llama 1-3.x, TinyLlama, SmolLM2, Mistral: https://huggingface.co/docs/transformers/model_doc/llama, .../mistral
    Family(
        name="llama",
        hf_architectures=("LlamaForCausalLM", "MistralForCausalLM"),
        hf_model_types=("llama", "mistral"),
        gguf_arch="llama",
        gguf_layered="deci",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        gguf_rope="norm",
    ),
    # Qwen2 and Qwen2.5: https://huggingface.co/docs/transformers/model_doc/qwen2
    Family(
        name="qwen2",
        hf_architectures=("Qwen2ForCausalLM",),
        hf_model_types=("qwen2",),
        gguf_arch="qwen2",
        gguf_layered="deci",
        qkv_bias="yes",
        square_attention=True,
    ),
    # Qwen3 dense: https://huggingface.co/docs/transformers/model_doc/qwen3
    Family(
        name="qwen3",
        hf_architectures=("Qwen3ForCausalLM",),
        hf_model_types=("qwen3",),
        gguf_arch="qwen3",
        qk_norm=True,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
    ),
    # Phi-3, Phi-3.5-mini, Phi-4-mini: https://huggingface.co/docs/transformers/model_doc/phi3
    Family(
        name="phi3",
        hf_architectures=("Phi3ForCausalLM",),
        hf_model_types=("phi3",),
        gguf_arch="phi3",
        gguf_layered="deci",
        fused_qkv=True,
        fused_gate_up=True,
        square_attention=True,
        hf_overrides={"wqkv": "layers.{i}.self_attn.qkv_proj", "gate_up": "layers.{i}.mlp.gate_up_proj"},
    ),
    # Gemma 3 text models: https://huggingface.co/docs/transformers/model_doc/gemma3
    Family(
        name="gemma3",
        hf_architectures=("Gemma3ForCausalLM",),
        hf_model_types=("gemma3_text",),
        gguf_arch="gemma3",
        activation="gelu_tanh",
        norm_offset=1.0,
        qk_norm=True,
        post_norms=True,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        scaled_embedding=True,
        windowed_cache=True,
        hf_overrides={
            "post_attn_norm": "layers.{i}.post_attention_layernorm",
            "mlp_norm": "layers.{i}.pre_feedforward_layernorm",
            "post_mlp_norm": "layers.{i}.post_feedforward_layernorm",
        },
    ),
    # SmolLM3: https://huggingface.co/docs/transformers/model_doc/smollm3
    Family(
        name="smollm3",
        hf_architectures=("SmolLM3ForCausalLM",),
        hf_model_types=("smollm3",),
        gguf_arch="smollm3",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        gguf_rope="norm",
    ),
)


def family(name: str) -> Family:
    for row in FAMILIES:
        if row.name == name:
            return row
    raise UnsupportedError(f"unknown family {name!r}; known: {', '.join(r.name for r in FAMILIES)}")


def family_of_hf(architecture: str) -> Family:
    for row in FAMILIES:
        if architecture in row.hf_architectures:
            return row
    known = ", ".join(a for r in FAMILIES for a in r.hf_architectures)
    raise UnsupportedError(f"architecture {architecture!r} is not supported; supported: {known}")


def family_of_gguf(arch: str) -> Family:
    """The family whose tensors and row order a GGUF file of this architecture has. For a layered one, the first that is lowered to it."""
    for row in FAMILIES:
        if arch in (row.gguf_arch, row.gguf_layered):
            return row
    known = dict.fromkeys(a for r in FAMILIES for a in (r.gguf_arch, r.gguf_layered) if a is not None)
    raise UnsupportedError(f"GGUF architecture {arch!r} is not supported; supported: {', '.join(known)}")
