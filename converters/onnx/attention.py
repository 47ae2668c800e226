"""Attention layers as nodes: rotation, keys and values that were cached, windows. `lowering` chooses the operators.

Texts of a batch may be padded. GroupQueryAttention puts new keys and values behind a text's own, padding not counted, and so wants padding
behind the tokens; Attention puts them behind the padding, and takes it on either side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgeq.converters.onnx.builder import MS, Builder, Dim, shape_of
from edgeq.converters.onnx.lowering import Lowering
from edgeq.converters.onnx.rope_tables import RopeTables
from edgeq.converters.onnx.tokens import NEW, Tokens
from edgeq.spec import Attention

Cached = tuple[ir.Value, ir.Value]  # keys and values, (batch_size, n_kv_heads, n_tokens, head_dim)


class Attending:
    """What attention layers share: tokens, and rotary tables of n_ctx rows."""

    def __init__(self, g: Builder, tokens: Tokens, *, n_ctx: int) -> None:
        self._g, self._tokens = g, tokens
        self._tables = RopeTables(g, n_ctx=n_ctx)

    def attend(
        self, block: Attention, choice: Lowering, qkv: Sequence[ir.Value], past: Cached, *, scale: float, path: str
    ) -> tuple[ir.Value, Cached]:
        """What every query gathers, (batch_size, sequence_length, n_heads * value_dim), and all keys and values. scale: of q.k.

        qkv: queries, keys and values, (batch_size, sequence_length, heads * dimensions), not rotated yet; or one value with all side by
        side, for a choice that takes it.
        """
        if choice.rotation in ("before", "by_head"):
            q, k, v = qkv
            q = self._rotated(q, block, choice, path=f"{path}/q_rotary", group=block.n_heads // block.n_kv_heads)
            qkv = q, self._rotated(k, block, choice, path=f"{path}/k_rotary", group=1), v
        run = self._group_query_attention if choice.operator == "GroupQueryAttention" else self._attention
        return run(block, choice, qkv, past, scale, path)

    def _group_query_attention(
        self, block: Attention, choice: Lowering, qkv: Sequence[ir.Value], past: Cached, scale: float, path: str
    ) -> tuple[ir.Value, Cached]:
        inputs = [*qkv, *[None] * (3 - len(qkv)), *past, self._tokens.last(), self._tokens.total()]
        rotates = choice.rotation == "inside"
        if rotates:
            assert choice.turning is not None
            inputs += self._tables.columns(choice.turning.rope, choice.turning.pairs[0], path=f"{path}/rotary")
        attributes = {
            "num_heads": block.n_heads,
            "kv_num_heads": block.n_kv_heads,
            "scale": scale,
            "do_rotary": int(rotates),
            "rotary_interleaved": 0,
            "local_window_size": -1 if block.window is None else block.window,
        }
        mixed, keys, values = self._g.nodes(
            "GroupQueryAttention",
            inputs,
            path=f"{path}/GroupQueryAttention",
            outputs=self._outputs(block, choice),
            domain=MS,
            attributes=attributes,
        )
        return mixed, (keys, values)

    def _attention(
        self, block: Attention, choice: Lowering, qkv: Sequence[ir.Value], past: Cached, scale: float, path: str
    ) -> tuple[ir.Value, Cached]:
        mixed, keys, values = self._g.nodes(
            "Attention",
            [*qkv, self._tokens.visible(block.window), *past],
            path=f"{path}/Attention",
            outputs=self._outputs(block, choice),
            attributes={"q_num_heads": block.n_heads, "kv_num_heads": block.n_kv_heads, "scale": scale, "is_causal": 1},
        )
        return mixed, (keys, values)

    def _outputs(self, block: Attention, choice: Lowering) -> list[tuple[ir.DataType, list[Dim] | None] | None]:
        dtype = self._g.float_type
        cached = [cache_shape(block, n, "total_sequence_length") for n in (block.head_dim, choice.value_dim)]
        return [(dtype, [*NEW, block.n_heads * choice.value_dim]), (dtype, cached[0]), (dtype, cached[1])]

    def _rotated(self, x: ir.Value, block: Attention, choice: Lowering, *, path: str, group: int) -> ir.Value:
        """Queries or keys, turned by their positions. group: heads of x for each KV head."""
        turning, g = choice.turning, self._g
        assert turning is not None
        partial = {} if 2 * turning.n_pairs == block.head_dim else {"rotary_embedding_dim": 2 * turning.n_pairs}
        attributes = {"interleaved": 0, **partial}
        if choice.rotation == "before":
            tables = self._tables.columns(turning.rope, turning.pairs[0], path=f"{path.rsplit('/', 1)[0]}/rotary")
            return g.node(
                "RotaryEmbedding",
                [x, *tables, self._tokens.positions()],
                path=f"{path}/RotaryEmbedding",
                shape=shape_of(x),
                attributes={**attributes, "num_heads": block.n_kv_heads * group},
            )
        # every head as a token of its own, whose cosines and sines stand in its place
        pairs = tuple(own for own in turning.pairs for _ in range(group))
        tables = self._tables.by_head(turning.rope, pairs, self._tokens.positions(), path=path)
        single = g.constant(f"/model/constants/single_heads_of_{block.head_dim}", np.array([0, -1, block.head_dim], dtype=np.int64))
        joined = g.constant(f"/model/constants/{len(pairs)}_heads_of_{block.head_dim}", np.array([0, -1, int(shape_of(x)[-1])]))
        shape: list[Dim] = ["batch_size", f"sequence_length*{len(pairs)}", block.head_dim]
        heads = g.node("Reshape", [x, single], path=f"{path}/Heads/Reshape", shape=shape)
        turned = g.node(
            "RotaryEmbedding", [heads, *tables], path=f"{path}/RotaryEmbedding", shape=shape, attributes={**attributes, "num_heads": 1}
        )
        return g.node("Reshape", [turned, joined], path=f"{path}/Reshape", shape=shape_of(x))


def cache_shape(block: Attention, length: int, tokens: str) -> list[Dim]:
    """Of keys or values of `length` dimensions. Heads and dimensions are numbers: runtimes make each layer's cache by them."""
    return ["batch_size", block.n_kv_heads, tokens, length]
