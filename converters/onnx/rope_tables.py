"""Cosines and sines by position, one pair of tables per rotary embedding, and what attention layers read of them.

A table is (n_ctx, n_pairs), computed in float64 and rounded once, scaling and magnitude included; pairs that never turn have cosine 1.
Layers that keep some of the pairs take their columns, which ONNX Runtime does when it loads the graph. LongRoPE's factors are those of a
context of n_ctx tokens at every position, as in llama.cpp: keys in the cache never have to change.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

import numpy as np
import onnx_ir as ir

from edgeq.converters.onnx.builder import Array, Builder, shape_of
from edgeq.converters.onnx.packed import FLOAT_TYPES
from edgeq.rope import RopeSpec

Tables = tuple[ir.Value, ir.Value]  # cosines and sines
_CHUNK_VALUES = 1 << 20
_FUNCTIONS = {"cos": np.cos, "sin": np.sin}


class RopeTables:
    """Tables of n_ctx positions. The same rotary embedding asked for again is the same table."""

    def __init__(self, g: Builder, *, n_ctx: int) -> None:
        self._g, self._n_ctx = g, n_ctx
        self._names: dict[RopeSpec, str] = {}

    def whole(self, rope: RopeSpec) -> Tables:
        """(n_ctx, rope.dim / 2) each."""
        suffix = self._names.setdefault(rope, f"_{len(self._names)}" if self._names else "")
        return self._table(rope, "cos", suffix), self._table(rope, "sin", suffix)

    def columns(self, rope: RopeSpec, pairs: tuple[int, ...], *, path: str) -> Tables:
        """Columns `pairs` of the tables, (n_ctx, len(pairs)) each; layers with the same ones share them."""
        tables = self.whole(rope)
        if pairs == tuple(range(rope.dim // 2)):
            return tables
        made = self._g.once_all(("columns", rope, pairs), lambda: self._columns(tables, pairs, path))
        return made[0], made[1]

    def by_head(self, rope: RopeSpec, pairs: tuple[tuple[int, ...], ...], positions: ir.Value, *, path: str) -> Tables:
        """Rows at `positions` (batch_size, sequence_length), for heads that each have pairs of their own, `pairs` (n_heads, n_pairs):
        (batch_size, sequence_length * n_heads, n_pairs) each, heads of a token side by side."""
        g, n_pairs = self._g, len(pairs[0])
        tokens = shape_of(positions)
        index = g.constant(f"{path}/pairs", np.array(pairs, dtype=np.int64).reshape(-1))
        heads = g.constant(f"/model/constants/heads_of_{n_pairs}_in_a_row", np.array([0, -1, n_pairs], dtype=np.int64))
        found = []
        for kind, table in zip(_FUNCTIONS, self.whole(rope), strict=True):
            rows = g.once(("rows", table.name, positions.name), partial(self._rows, table, positions))
            flat = g.node(
                "Gather", [rows, index], path=f"{path}/{kind}/Gather", shape=[*tokens, len(pairs) * n_pairs], attributes={"axis": 2}
            )
            shape = [tokens[0], f"{tokens[1]}*{len(pairs)}", n_pairs]
            found.append(g.node("Reshape", [flat, heads], path=f"{path}/{kind}/Reshape", shape=shape))
        return found[0], found[1]

    def _columns(self, tables: Tables, pairs: tuple[int, ...], path: str) -> Tables:
        index = self._g.constant(f"{path}/pairs", np.array(pairs, dtype=np.int64))
        shape = [self._n_ctx, len(pairs)]
        cos, sin = (
            self._g.node("Gather", [table, index], path=f"{path}/{kind}/Gather", shape=shape, attributes={"axis": 1})
            for kind, table in zip(_FUNCTIONS, tables, strict=True)
        )
        return cos, sin

    def _rows(self, table: ir.Value, positions: ir.Value) -> ir.Value:
        shape = [*shape_of(positions), shape_of(table)[1]]
        return self._g.node("Gather", [table, positions], path=f"/model/rotary/{table.name}/Gather", shape=shape, attributes={"axis": 0})

    def _table(self, rope: RopeSpec, kind: Literal["cos", "sin"], suffix: str) -> ir.Value:
        shape = (self._n_ctx, rope.dim // 2)
        chunks = partial(table_rows, rope, kind, self._n_ctx, self._g.float_type)
        return self._g.stream(f"{kind}_cache{suffix}", self._g.float_type, shape, chunks)


def table_rows(rope: RopeSpec, kind: Literal["cos", "sin"], n_ctx: int, dtype: ir.DataType) -> Iterator[Array]:
    """A table in order of positions, some rows at a time."""
    frequencies = rope.frequencies(n_ctx)
    step = max(1, _CHUNK_VALUES // len(frequencies))
    for start in range(0, n_ctx, step):
        angles = np.outer(np.arange(start, min(start + step, n_ctx), dtype=np.float64), frequencies)
        yield (_FUNCTIONS[kind](angles) * rope.attn_factor).astype(FLOAT_TYPES[dtype])
