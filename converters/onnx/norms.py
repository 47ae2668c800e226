"""Root mean square norms, y = x / sqrt(mean(x^2) + eps) * weight, as nodes.

Blocks read the norm of what the residual stream holds, so that adding the last block's result to the stream and the norm of the sum are one
operator, SkipSimplifiedLayerNormalization. That is as true of families that norm a block's result before it is added.
Zhang and Sennrich 2019, arXiv:1910.07467.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.converters.onnx.builder import MS, Builder, shape_of


def norm(g: Builder, x: ir.Value, weight: ir.Value, *, eps: float, path: str) -> ir.Value:
    """Of x (.., n) along its last axis; weight (n,)."""
    return g.node(
        "SimplifiedLayerNormalization",
        [x, weight],
        path=f"{path}/SimplifiedLayerNormalization",
        shape=shape_of(x),
        attributes={"axis": -1, "epsilon": eps, "stash_type": 1},
    )


def head_norm(g: Builder, x: ir.Value, weight: ir.Value, *, head_dim: int, eps: float, path: str) -> ir.Value:
    """Of every head of x (batch_size, sequence_length, n_heads * head_dim) by itself; weight (head_dim,)."""
    *outer, width = shape_of(x)
    split = g.constant(f"/model/constants/heads_of_{head_dim}", np.array([0, 0, -1, head_dim], dtype=np.int64))
    joined = g.constant("/model/constants/heads_joined", np.array([0, 0, -1], dtype=np.int64))
    heads = g.node("Reshape", [x, split], path=f"{path}/Heads/Reshape", shape=[*outer, int(width) // head_dim, head_dim])
    return g.node("Reshape", [norm(g, heads, weight, eps=eps, path=path), joined], path=f"{path}/Reshape", shape=[*outer, width])


class Stream:
    """The residual stream: what it holds, and the last block's result, which the next norm adds."""

    def __init__(self, g: Builder, x: ir.Value) -> None:
        self._g, self._x = g, x
        self._result: ir.Value | None = None

    def add(self, result: ir.Value) -> None:
        assert self._result is None, "a block reads the stream before the next one adds to it"
        self._result = result

    def normed(self, weight: ir.Value, *, eps: float, path: str, last: bool = False) -> ir.Value:
        """The norm of the stream. last: nobody reads the stream itself behind this."""
        if self._result is None:
            return norm(self._g, self._x, weight, eps=eps, path=path)
        out = (self._g.float_type, shape_of(self._x))
        made = self._g.nodes(
            "SkipSimplifiedLayerNormalization",
            [self._x, self._result, weight],
            path=f"{path}/SkipLayerNorm",
            outputs=[out] if last else [out, None, None, out],
            domain=MS,
            attributes={"epsilon": eps},
        )
        self._x, self._result = made[-1], None
        return made[0]
