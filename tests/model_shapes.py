"""Specs of well-known sizes without weights, layouts of them under a quant, and GGUF files that are nothing but a header.

spec = shape_spec("llama-1b")
lay_out = layouts(spec, source="F16")            # what a carrier gives to planning
path = header_only(tmp_path / "m.gguf", spec)    # llama.cpp takes it with no_alloc; the data is a hole in the file
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgeq.device_memory import TensorPlan
from edgeq.families import GGUF_NAMES, family
from edgeq.grids import F16, F32, GRIDS, Grid, grid
from edgeq.planning import Layout
from edgeq.profile_keys import QUANT_NAMES, base_grid
from edgeq.rope import RopeSpec
from edgeq.spec import Attention, Block, Mlp, ModelSpec

# family, n_embd, n_layers, n_heads, n_kv_heads, head_dim, n_ff, n_vocab, tied, window
_ROWS = {
    "tiny": ("llama", 64, 4, 4, 2, 24, 160, 320, True, None),
    "smollm2-135m": ("llama", 576, 30, 9, 3, 64, 1536, 49152, True, None),
    "tinyllama-mha": ("llama", 2048, 22, 32, 32, 64, 5632, 32000, False, None),
    "llama-1b": ("llama", 2048, 16, 32, 8, 64, 8192, 128256, True, None),
    "llama-8b": ("llama", 4096, 32, 32, 8, 128, 14336, 128256, False, None),
    "qwen2-0.5b": ("qwen2", 896, 24, 14, 2, 64, 4864, 151936, True, None),
    "qwen3-0.6b": ("qwen3", 1024, 28, 16, 8, 128, 3072, 151936, True, None),
    "phi3-mini": ("phi3", 3072, 32, 32, 32, 96, 8192, 32064, False, None),
    "gemma3-1b": ("gemma3", 1152, 26, 4, 1, 256, 6912, 262144, True, 512),
}
SHAPES = tuple(_ROWS)
N_CTX = 1 << 17
_FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}


def shape_spec(name: str, *, n_ctx: int = N_CTX) -> ModelSpec:
    row, n_embd, n_layers, n_heads, n_kv_heads, head_dim, n_ff, n_vocab, tied, window = _ROWS[name]
    rope = RopeSpec(dim=head_dim, base=10000.0)
    blocks: list[Block] = []
    for i in range(n_layers):
        local = window is not None and i % 6 < 5
        sizes = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim}
        blocks.append(Attention(layer=i, window=window if local else None, rope="local" if local else "main", **sizes))
        blocks.append(Mlp(layer=i, n_ff=n_ff))
    return ModelSpec(
        family=row,
        n_embd=n_embd,
        n_vocab=n_vocab,
        n_ctx=n_ctx,
        blocks=tuple(blocks),
        rope=rope,
        rope_local=None if window is None else rope,
        norm_eps=1e-5,
        tied=tied,
        attn_scale=1 / math.sqrt(head_dim),
        biases=frozenset({"wq", "wk", "wv"}) if row == "qwen2" else frozenset(),
    )


def tensor_shapes(spec: ModelSpec) -> list[tuple[str, int | None, tuple[int, ...]]]:
    """(role, layer, shape) of every tensor of a GGUF file; fused ones as llama.cpp has them."""
    shapes: list[tuple[str, int | None, tuple[int, ...]]] = [("embed", None, (spec.n_vocab, spec.n_embd))]
    row = family(spec.family)
    for layer, (a, m) in ((i, b) for i, b in spec.layers()):
        assert isinstance(a, Attention) and isinstance(m, Mlp)
        q, kv = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
        own: dict[str, tuple[int, ...]] = {"attn_norm": (spec.n_embd,), "mlp_norm": (spec.n_embd,)}
        if row.fused_qkv:
            own |= {"wqkv": (q + 2 * kv, spec.n_embd), "up": (2 * m.n_ff, spec.n_embd)}
        else:
            own |= {"wq": (q, spec.n_embd), "wk": (kv, spec.n_embd), "wv": (kv, spec.n_embd)}
            own |= {"gate": (m.n_ff, spec.n_embd), "up": (m.n_ff, spec.n_embd)}
        own |= {"wo": (spec.n_embd, q), "down": (spec.n_embd, m.n_ff)}
        if row.qk_norm:
            own |= {"q_norm": (a.head_dim,), "k_norm": (a.head_dim,)}
        if row.post_norms:
            own |= {"post_attn_norm": (spec.n_embd,), "post_mlp_norm": (spec.n_embd,)}
        own |= {f"{role}.bias": own[role][:1] for role in sorted(spec.biases)}
        shapes += [(role, layer, shape) for role, shape in own.items()]
    shapes.append(("final_norm", None, (spec.n_embd,)))
    return shapes if spec.tied else [*shapes, ("head", None, (spec.n_vocab, spec.n_embd))]


def gguf_name(role: str, layer: int | None) -> str:
    base, _, kind = role.partition(".")
    return f"{GGUF_NAMES[base].format(i=layer)}.{kind or 'weight'}"


def fitting(want: Grid, n_cols: int) -> Grid:
    if want.fits(n_cols):
        return want
    instead = GRIDS[_FALLBACKS.get(want.name, want.name)]
    return instead if instead.fits(n_cols) else F16


def layouts(spec: ModelSpec, *, source: str) -> Callable[[str], Layout]:
    """A carrier of one grid per quant: every matrix in the base grid, or what replaces it where rows do not divide."""

    def lay_out(quant: str) -> Layout:
        if quant not in QUANT_NAMES:
            from edgeq.errors import UnsupportedError

            raise UnsupportedError(f"unknown quantization {quant!r}")
        tensors = []
        for role, layer, shape in tensor_shapes(spec):
            is_matrix = len(shape) == 2
            was = fitting(grid(source), shape[-1]) if is_matrix else F32
            now = fitting(base_grid(quant), shape[-1]) if is_matrix else F32
            tensors.append(
                TensorPlan(
                    name=gguf_name(role, layer),
                    role=role,
                    layer=layer,
                    shape=shape,
                    source_grid=was,
                    grid=now,
                    nbytes=(shape[0] if is_matrix else 1) * now.row_bytes(shape[-1]),
                    action="copy" if was == now else "encode",
                )
            )
        return Layout(tensors=tuple(tensors), file_bytes=4096 + sum(t.nbytes for t in tensors))

    return lay_out


def header_only(path: Path, spec: ModelSpec, *, quant: str = "Q4_0") -> Path:
    """A GGUF file of this shape without a tokenizer, whose data is a hole: it takes no room on disk."""
    import gguf

    arch, a = family(spec.family).gguf_arch, spec.attention[0]
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(spec.n_layers)
    writer.add_context_length(spec.n_ctx)
    writer.add_embedding_length(spec.n_embd)
    writer.add_feed_forward_length(spec.mlps[0].n_ff)
    writer.add_head_count(a.n_heads)
    writer.add_head_count_kv(a.n_kv_heads)
    writer.add_key_length(a.head_dim)
    writer.add_value_length(a.head_dim)
    writer.add_rope_dimension_count(a.head_dim)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_rope_freq_base(spec.rope.base)
    writer.add_vocab_size(spec.n_vocab)
    writer.add_tokenizer_model("no_vocab")
    if (window := next((b.window for b in spec.attention if b.window is not None), None)) is not None:
        writer.add_sliding_window(window)
    data = 0
    for tensor in layouts(spec, source=quant)(quant).tensors:
        raw = gguf.GGMLQuantizationType(tensor.grid.id)
        packed = (*tensor.shape[:-1], tensor.grid.row_bytes(tensor.shape[-1]))
        dtype = {"F32": np.float32, "F16": np.float16}.get(tensor.grid.name, np.uint8)
        is_float = tensor.grid.is_float
        writer.add_tensor_info(
            tensor.name, tensor.shape if is_float else packed, np.dtype(dtype), tensor.nbytes, raw_dtype=None if is_float else raw
        )
        data += -(-tensor.nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, -(-path.stat().st_size // 32) * 32 + data)
    return path
