"""The rotary embedding that a GGUF file must state, so that the graph rotates as the model does.

They differ where a model rotates the first dimensions of a head only and the graph all of them (Phi-3 as deci). Dimensions that do not
rotate are then pairs with a divisor so large that their angle is nothing: 1e30, not infinity, which a loader that checks tensors refuses.
The other pairs keep their frequencies: pair j of n has theta_j = base^(-2j/n) / factor_j in the graph, base^(-2j/dim) in the model.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from edgeq.converters.gguf.architectures import Arch
from edgeq.rope import RopeSpec
from edgeq.spec import ModelSpec

NEVER = 1e30  # divisor of a pair that does not rotate: a billion tokens turn it by 1e-21


def graph_rope(spec: ModelSpec, arch: Arch) -> RopeSpec:
    """The model's own rotary embedding when the graph can do it; else one over the whole head with the same angles."""
    rope, head_dim = spec.rope, spec.attention[0].head_dim
    if rope.dim == head_dim or arch.rules.partial_rotary:
        return rope

    def factors(frequencies: npt.NDArray[np.float64]) -> tuple[float, ...]:
        plain = rope.base ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        divisors = np.full(head_dim // 2, NEVER)
        divisors[: rope.dim // 2] = plain[: rope.dim // 2] / frequencies
        return tuple(divisors.tolist())

    if rope.kind == "longrope":
        assert rope.original_n_ctx is not None
        short, long = (factors(rope.frequencies(n_ctx)) for n_ctx in (rope.original_n_ctx, rope.original_n_ctx + 1))
        return replace(rope, dim=head_dim, short_factors=short, long_factors=long)
    return RopeSpec(
        dim=head_dim, base=rope.base, kind="factors", factors=factors(rope.frequencies(spec.n_ctx)), attn_factor=rope.attn_factor
    )
