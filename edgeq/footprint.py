"""Memory that llama.cpp takes beside the weights, predicted from a model's sizes: cache, compute buffer, process.

Facts are read from llama.cpp as in llama-cpp-python 0.3.36 (src/llama-kv-cache.cpp, llama-kv-cache-iswa.cpp, llama-context.cpp, ggml's
repack.cpp, fattn.cu and ggml-metal-device.m). `kv_bytes` is exact. `compute_bytes` is a formula for the peak of ggml's graph allocator,
within 10 % of what llama.cpp reserves on CPUs for models of 135M to 8B parameters; a test compares both.
"""

from __future__ import annotations

from collections.abc import Collection

from edgeq.errors import PlanError
from edgeq.families import family
from edgeq.grids import Grid, grid
from edgeq.profiles import Device, Isa
from edgeq.spec import Attention, ModelSpec

MIB = 1 << 20
N_UBATCH = 512  # tokens computed at once: llama.cpp's default
N_OUTPUTS = 64  # tokens of those whose logits a session of edgeq may ask for at once
_CELL_PADDING = 256  # contexts and windowed caches are rounded up to this many tokens

# Measured on x86-64 Linux with Python 3.11: Python, numpy and the llama library take 42 MiB; a vocabulary of 49,152 tokens with its
# merges 20 MiB, which is 427 bytes a token. The sums for SmolLM2-135M in Q4_1 are then within 1 % of its resident size at contexts of
# 512 and 4096.
PROCESS_BYTES = 44 * MIB
VOCABULARY_BYTES_PER_TOKEN = 448
# A CUDA context with cuBLAS and its workspace. An allowance: it differs between driver versions and was not measured here.
CUDA_BYTES = 512 * MIB

_CUDA_HEAD_DIMS = frozenset({40, 64, 72, 80, 96, 112, 128, 256})
_METAL_HEAD_DIMS = frozenset({32, 40, 48, 64, 72, 80, 96, 112, 128, 192, 256})


def kv_bytes(
    spec: ModelSpec,
    n_ctx: int,
    kv_type: str,
    *,
    n_ubatch: int = N_UBATCH,
    swa_full: bool = False,
    flash_attention: bool = True,
    layers: Collection[int] | None = None,
) -> int:
    """Bytes of the key-value cache for one sequence of n_ctx tokens.

    Layers with a sliding window keep window + n_ubatch tokens, not n_ctx, unless swa_full. Without flash attention values are padded to
    the widest layer. layers: count these only. Raises PlanError when a head does not divide into the type's blocks.
    """
    kind = grid(kv_type.upper())
    widest = max(b.n_kv_heads * b.head_dim for b in spec.attention)
    total = 0
    for block in spec.attention:
        if layers is not None and block.layer not in layers:
            continue
        if not kind.fits(block.head_dim):
            raise PlanError(
                f"layer {block.layer}: heads of {block.head_dim} do not divide into {kv_type} blocks of {kind.block_size}. Use kv_type f16."
            )
        width = block.n_kv_heads * block.head_dim
        cells = _cells(spec, block, n_ctx, n_ubatch, swa_full)
        total += cells * (kind.row_bytes(width) + kind.row_bytes(width if flash_attention else widest))
    return total


def compute_bytes(
    spec: ModelSpec, n_ctx: int, *, n_ubatch: int = N_UBATCH, n_outputs: int = N_OUTPUTS, flash_attention: bool = True
) -> int:
    """Estimate of llama.cpp's compute buffer, for n_ubatch tokens of which n_outputs want logits.

    The buffer holds the largest set of values that are alive at once, in float32, so it is the largest of three:
    MLP: gate, up and their product (3 n_ff) and four copies of the residual (4 n_embd; three where gate and up are one), for every token;
    attention: residuals (3 n_embd), queries and result (2 n_heads head_dim), keys and values, for every token, and without flash
    attention the scores (n_heads times the cells of the cache); both with the attention masks, which are half precision with flash
    attention and single without;
    head: logits and two residuals (n_vocab + 2 n_embd), for every output.
    llama.cpp's server reserves one output for each slot; llama-cpp-python's own class reserves n_ubatch.
    """
    tokens = min(n_ubatch, _padded(n_ctx))
    full = _padded(n_ctx)
    # A model with windows has a mask for each kind of layer.
    windowed = next((_cells(spec, b, n_ctx, n_ubatch, False) for b in spec.attention if _is_windowed(spec, b)), 0)
    mask_bytes = tokens * (full + windowed) * (2 if flash_attention else 4)
    residuals = 3 if family(spec.family).fused_gate_up else 4
    mlp = 3 * max((b.n_ff for b in spec.mlps), default=0) + residuals * spec.n_embd
    attention = max(
        3 * spec.n_embd + 2 * (b.n_heads + b.n_kv_heads) * b.head_dim + (0 if flash_attention else b.n_heads * full) for b in spec.attention
    )
    head = min(n_outputs, tokens) * (spec.n_vocab + 2 * spec.n_embd)
    return max(mask_bytes + 4 * tokens * max(mlp, attention), 4 * head)


def process_bytes(spec: ModelSpec) -> int:
    """The process without weights, cache and compute buffer: interpreter, libraries and vocabulary."""
    return PROCESS_BYTES + VOCABULARY_BYTES_PER_TOKEN * spec.n_vocab


def is_repacked(kind: Grid, n_rows: int, isa: Collection[Isa]) -> bool:
    """Whether llama.cpp rearranges a matrix of this grid for faster products on a CPU with these instruction sets."""
    wide, narrow = n_rows % 8 == 0, n_rows % 4 == 0
    if "avx2" in isa:
        return wide and (kind.name in ("Q4_0", "Q4_K", "IQ4_NL", "MXFP4") or (kind.name == "Q2_K" and "avx512" in isa))
    if "dotprod" in isa or "i8mm" in isa:
        fours = kind.name in ("Q4_0", "Q8_0") or (kind.name in ("IQ4_NL", "MXFP4") and "dotprod" in isa)
        return (narrow and fours) or (wide and kind.name in ("Q4_K", "Q5_K", "Q6_K"))
    return False


def has_flash_attention(spec: ModelSpec, device: Device) -> bool:
    """Whether llama.cpp has a flash attention kernel for every head size of the model on this device; without one it is left off."""
    known = {"cpu": None, "cuda": _CUDA_HEAD_DIMS, "metal": _METAL_HEAD_DIMS}[device]
    return known is None or all(b.head_dim in known for b in spec.attention)


def _is_windowed(spec: ModelSpec, block: Attention) -> bool:
    return block.window is not None and family(spec.family).windowed_cache


def _cells(spec: ModelSpec, block: Attention, n_ctx: int, n_ubatch: int, swa_full: bool) -> int:
    """Tokens that the cache of one layer has room for."""
    full = _padded(n_ctx)
    if swa_full or block.window is None or not _is_windowed(spec, block):
        return full
    return _padded(min(full, block.window + n_ubatch))


def _padded(n: int) -> int:
    return -(-n // _CELL_PADDING) * _CELL_PADDING
