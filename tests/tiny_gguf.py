"""Tiny GGUF models, random and seeded, written with gguf-py: what the runtime's tests load.

Sizes differ from each other (n_embd 64, heads of 24, n_ff 160), the vocabulary is tests/tiny.py's 320 tokens laid out as SmolLM2's.
`fields` replaces metadata (None leaves a field out), `extra` adds tensors: files that llama.cpp must refuse are made that way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from tiny import CHAT_TEMPLATE, N_VOCAB, SPECIAL_TOKENS, tiny_tokenizer

N_CTX, N_EMBD, N_FF, HEAD_DIM = 1024, 64, 160, 24


@cache
def _vocabulary() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(tokens by id, merges in rank order)."""
    model = json.loads(tiny_tokenizer().to_str())["model"]
    tokens = tuple(sorted(model["vocab"], key=model["vocab"].__getitem__))
    return tokens, tuple(" ".join(pair) for pair in model["merges"])


def write_tiny_gguf(
    path: Path,
    *,
    arch: str = "llama",
    n_layers: int = 2,
    n_heads: int | Sequence[int] = 4,
    n_kv_heads: int | Sequence[int] = 2,
    head_dim: int = HEAD_DIM,
    seed: int = 0,
    gain: float = 3.0,
    tied: bool = False,
    fields: Mapping[str, Any] | None = None,
    extra: Mapping[str, npt.NDArray[np.float32]] | None = None,
) -> Path:
    """Write a model and return its path. n_heads and n_kv_heads may differ per layer (arch "deci"); gain spreads the logits; a tied model
    has no output matrix."""
    heads, kv_heads = ([n] * n_layers if isinstance(n, int) else list(n) for n in (n_heads, n_kv_heads))
    tokens, merges = _vocabulary()
    values: dict[str, Any] = {
        "general.name": "Tiny",
        "block_count": n_layers,
        "context_length": N_CTX,
        "embedding_length": N_EMBD,
        "feed_forward_length": N_FF,
        "attention.head_count": n_heads if isinstance(n_heads, int) else heads,
        "attention.head_count_kv": n_kv_heads if isinstance(n_kv_heads, int) else kv_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": head_dim,
        "rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": [3 if token in SPECIAL_TOKENS else 1 for token in tokens],
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": CHAT_TEMPLATE,
        **(fields or {}),
    }
    writer = gguf.GGUFWriter(path, arch)
    for key, value in values.items():
        if value is not None:
            _add(writer, key if key.startswith(("general.", "tokenizer.")) else f"{arch}.{key}", value)
    rng = np.random.default_rng(seed)

    def matrix(name: str, n_out: int, n_in: int, scale: float = 1.0) -> None:
        writer.add_tensor(name, (rng.standard_normal((n_out, n_in)) * scale / np.sqrt(n_in)).astype(np.float32))

    def norm(name: str, size: int) -> None:
        writer.add_tensor(name, (1 + 0.2 * rng.standard_normal(size)).astype(np.float32))

    matrix("token_embd.weight", N_VOCAB, N_EMBD)
    norm("output_norm.weight", N_EMBD)
    if not tied:
        matrix("output.weight", N_VOCAB, N_EMBD, gain)
    for i in range(n_layers):
        norm(f"blk.{i}.attn_norm.weight", N_EMBD)
        matrix(f"blk.{i}.attn_q.weight", heads[i] * head_dim, N_EMBD)
        matrix(f"blk.{i}.attn_k.weight", kv_heads[i] * head_dim, N_EMBD)
        matrix(f"blk.{i}.attn_v.weight", kv_heads[i] * head_dim, N_EMBD)
        matrix(f"blk.{i}.attn_output.weight", N_EMBD, heads[i] * head_dim)
        if arch == "gemma3":
            for name in ("post_attention_norm", "post_ffw_norm"):
                norm(f"blk.{i}.{name}.weight", N_EMBD)
            for name in ("attn_q_norm", "attn_k_norm"):
                norm(f"blk.{i}.{name}.weight", head_dim)
        norm(f"blk.{i}.ffn_norm.weight", N_EMBD)
        matrix(f"blk.{i}.ffn_gate.weight", N_FF, N_EMBD)
        matrix(f"blk.{i}.ffn_up.weight", N_FF, N_EMBD)
        matrix(f"blk.{i}.ffn_down.weight", N_EMBD, N_FF)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    add[type(value)](key, value)
