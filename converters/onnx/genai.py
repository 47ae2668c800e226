"""genai_config.json: what onnxruntime-genai has to know of a decoder beside its graph.

The type "decoder" is its generic one: input_ids, attention_mask, keys and values, logits, and no position_ids. Sizes that differ between
layers it reads from the graph, whose keys and values have numbers for heads and head size; num_key_value_heads and head_size here are
those of the first layer. It makes room for `search.max_length` tokens of keys and values before the first one, so that is the context that
the package was planned for; context_length is what the graph has rotary tables for. Past and present share that room where every layer's
attention writes in place (GroupQueryAttention).
"""

from __future__ import annotations

import json
from typing import Any, Literal

import onnx_ir as ir

from edgeq.converters.onnx.builder import MS
from edgeq.converters.tokenizers.llamacpp import ENDS_GENERATION, TokenType, effective_type
from edgeq.model import Vocabulary
from edgeq.spec import ModelSpec

GENAI_FILE = "genai_config.json"
_QUIET = 3  # ONNX Runtime's log severity: errors alone

Provider = Literal["cpu", "cuda"]


def genai_config(
    spec: ModelSpec, vocabulary: Vocabulary, *, filename: str, n_ctx: int, max_length: int, share_buffer: bool, provider: Provider = "cpu"
) -> dict[str, Any]:
    """The document for a graph of this spec. filename: of the graph. n_ctx: tokens that it can take. share_buffer: see `shares_buffer`.

    provider: where it is to run.
    """
    special, first = vocabulary.special_ids, spec.attention[0]
    ends = ends_of_generation(vocabulary)
    ids = {"bos_token_id": special.get("bos"), "eos_token_id": ends or None, "pad_token_id": special.get("padding", next(iter(ends), None))}
    return {
        "model": {
            **{key: value for key, value in ids.items() if value is not None},
            "context_length": n_ctx,
            "decoder": {
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "log_severity_level": _QUIET,
                    "provider_options": [] if provider == "cpu" else [{provider: {}}],
                },
                "filename": filename,
                "head_size": first.head_dim,
                "hidden_size": spec.n_embd,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
                "num_attention_heads": first.n_heads,
                "num_hidden_layers": spec.n_layers,
                "num_key_value_heads": first.n_kv_heads,
            },
            "type": "decoder",
            "vocab_size": spec.n_vocab,
        },
        "search": {
            "do_sample": False,
            "max_length": min(max_length, n_ctx),
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": share_buffer,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        },
    }


def to_bytes(config: dict[str, Any]) -> bytes:
    return (json.dumps(config, indent=4) + "\n").encode()


def ends_of_generation(vocabulary: Vocabulary) -> list[int]:
    """Tokens that end a generation, EOS first, then those that llama.cpp finds by their spelling: both runtimes stop at the same ones."""
    named = [vocabulary.special_ids[role] for role in ("eos", "eot", "eom") if role in vocabulary.special_ids]
    spelled = [
        id
        for id, (token, type) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if token in ENDS_GENERATION and effective_type(token, type) == TokenType.CONTROL
    ]
    return list(dict.fromkeys([*named, *spelled]))


def shares_buffer(model: ir.Model) -> bool:
    """Whether every layer of a graph writes its new keys and values where the old ones lie."""
    readers = [
        (node.domain, node.op_type)
        for node in model.graph
        if any(value is not None and (value.name or "").startswith("past_key_values.") for value in node.inputs)
    ]
    return set(readers) == {(MS, "GroupQueryAttention")}
