"""Causal attention as the reference computes it: rotation of queries and keys, and the masked softmax.

Everything here is a pure function of torch tensors whose last two axes are (tokens, head_dim). Only export-side code imports it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from edgeq.rope import RopeSpec

Angles = tuple[torch.Tensor, torch.Tensor]


def rope_angles(rope: RopeSpec, n_tokens: int, *, n_ctx: int, device: torch.device, dtype: torch.dtype) -> Angles:
    """cos and sin, (n_tokens, rope.dim / 2) each, of positions 0 .. n_tokens - 1 in a context of n_ctx tokens.

    Computed in float64 and rounded once: position times frequency in float32 is off by 0.004 rad at position 65,536.
    """
    frequencies = torch.from_numpy(rope.frequencies(n_ctx))
    angle = torch.outer(torch.arange(n_tokens, dtype=torch.float64), frequencies)
    cos, sin = angle.cos() * rope.attn_factor, angle.sin() * rope.attn_factor
    return cos.to(device=device, dtype=dtype), sin.to(device=device, dtype=dtype)


def by_head(angles: Angles, pairs: Sequence[Sequence[int]] | None, n_heads: int) -> Angles:
    """Angles for heads (.., n_heads, n_tokens, head_dim) of which each turns pairs of its own, (n_heads, n_tokens, pairs) each.

    pairs: as in `edgeq.spec.Attention`; None leaves angles as they are, one for all heads.
    """
    if pairs is None:
        return angles
    index = torch.tensor([own for own in pairs for _ in range(n_heads // len(pairs))], device=angles[0].device)
    cos, sin = (part[:, index].transpose(0, 1) for part in angles)
    return cos, sin


def rotate(x: torch.Tensor, angles: Angles) -> torch.Tensor:
    """Rotate pairs (j, j + dim/2) of x (..., n_tokens, head_dim); dimensions beyond the rotary ones pass through."""
    cos, sin = angles
    half = cos.shape[-1]
    left, right, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((left * cos - right * sin, right * cos + left * sin, rest), dim=-1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, window: int | None) -> torch.Tensor:
    """Each query's mean of v, weighted by softmax(scale * q.k) over the keys it may see.

    q (batch, n_heads, n, head_dim); k and v (batch, n_kv_heads, n, head_dim), one for n_heads / n_kv_heads queries in a row;
    returns q's shape. A query sees its own position and those before it, the last `window` of them if that is given.
    """
    n = q.shape[-2]
    mask = None
    if window is not None and window < n:
        mask = torch.ones(n, n, dtype=torch.bool, device=q.device).tril().triu(1 - window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
