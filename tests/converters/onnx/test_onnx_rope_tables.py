"""Tables of cosines and sines against the reference's angles."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from edgeq.attention import rope_angles
from edgeq.converters.onnx.builder import Array, Builder
from edgeq.converters.onnx.rope_tables import RopeTables, table_rows
from edgeq.rope import NEVER, RopeSpec

N_CTX = 70_000  # several pieces of a table with 24 pairs
PLAIN = RopeSpec(dim=48, base=10000.0)
ROPES = [
    PLAIN,
    RopeSpec(dim=48, base=1e6, kind="linear", factor=8.0),
    RopeSpec(dim=8, base=500.0, kind="factors", factors=(1.0, 2.0, 3.0, NEVER)),
    RopeSpec(dim=48, base=10000.0, kind="yarn", factor=4.0, original_n_ctx=4096, attn_factor=1.14),
    RopeSpec(dim=4, base=10.0, kind="longrope", original_n_ctx=64, attn_factor=1.2, short_factors=(1.0, 1.0), long_factors=(2.0, 9.0)),
]


def table(rope: RopeSpec, kind: str, n_ctx: int, dtype: ir.DataType) -> Array:
    return np.concatenate(list(table_rows(rope, kind, n_ctx, dtype)))  # type: ignore[arg-type]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.kind)
@pytest.mark.parametrize("n_ctx", [64, N_CTX])
def test_tables_are_the_references_angles_rounded_once(rope: RopeSpec, n_ctx: int) -> None:
    expected = rope_angles(rope, n_ctx, n_ctx=n_ctx, device=torch.device("cpu"), dtype=torch.float64)
    for kind, angles in zip(("cos", "sin"), expected, strict=True):
        for dtype, numbers in ((ir.DataType.FLOAT, np.float32), (ir.DataType.FLOAT16, np.float16)):
            found = table(rope, kind, n_ctx, dtype)
            assert found.dtype == numbers and found.shape == (n_ctx, rope.dim // 2)
            # libraries differ in the last bit of float64, which may tip the rounding
            np.testing.assert_allclose(found, angles.numpy().astype(numbers), rtol=0, atol=float(np.finfo(numbers).eps))


def test_pairs_that_never_turn_have_cosine_one() -> None:
    assert (table(ROPES[2], "cos", N_CTX, ir.DataType.FLOAT)[:, 3] == 1).all()
    assert np.abs(table(ROPES[2], "sin", N_CTX, ir.DataType.FLOAT)[:, 3]).max() < 1e-20


def test_tables_come_in_pieces() -> None:
    assert len(list(table_rows(PLAIN, "cos", N_CTX, ir.DataType.FLOAT))) == 2


def test_equal_embeddings_share_a_table_and_equal_pairs_their_columns() -> None:
    g = Builder("test", float_type=ir.DataType.FLOAT)
    tables = RopeTables(g, n_ctx=32)
    main, local = tables.whole(PLAIN), tables.whole(ROPES[1])
    assert tables.whole(RopeSpec(dim=48, base=10000.0)) == main
    assert [value.name for value in (*main, *local)] == ["cos_cache", "sin_cache", "cos_cache_1", "sin_cache_1"]
    assert tables.columns(PLAIN, tuple(range(24)), path="/0") == main
    some = tables.columns(PLAIN, (0, 5, 7), path="/1")
    assert tables.columns(PLAIN, (0, 5, 7), path="/2") == some != tables.columns(PLAIN, (0, 5, 8), path="/3")
