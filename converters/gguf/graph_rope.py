"""The rotary embedding that a GGUF file must state, so that the graph computes the scores that the model does.

They differ in two cases. A model may rotate the first dimensions of a head only and the graph all of them (Phi-3 as deci): dimensions
that do not rotate are then pairs with a divisor so large that their angle is nothing (`RopeSpec.widened`). And a model's attention scale
may not be that of the graph, 1/sqrt(head size): heads that were cut keep the scale of whole ones. The graph has no key for a scale, but
one for the magnitude of cos and sin, which queries and keys are both multiplied with: it takes the square root of the ratio.
"""

from __future__ import annotations

import math
from dataclasses import replace

from edgeq.converters.gguf.architectures import Arch
from edgeq.rope import RopeSpec
from edgeq.spec import ModelSpec


def graph_rope(spec: ModelSpec, arch: Arch) -> RopeSpec:
    """The model's own rotary embedding when the graph can do it; else one over the whole head with the same angles and scores."""
    rope = spec.rope if arch.rules.partial_rotary else spec.rope.widened(spec.attention[0].head_dim)
    ratio = spec.attn_scale / arch.attention_scale(spec)
    if arch.scales_rope and not math.isclose(ratio, 1, rel_tol=1e-6):
        return replace(rope, attn_factor=rope.attn_factor * math.sqrt(ratio))
    return rope
