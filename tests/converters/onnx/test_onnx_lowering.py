"""Which operators attention layers become, and what is said about it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from edgeq.converters.onnx.lowering import Lowering, Turning, describe, lowerings, value_dims
from edgeq.errors import PlanError, ShapeError
from edgeq.rope import RopeSpec
from edgeq.spec import Attention, ModelSpec, RopeUse
from edgeq.tensors import from_values

ROPE = RopeSpec(dim=64, base=10000.0)


def one(head_dim: int, turns: int | None = None, *, rope: RopeUse = "main") -> ModelSpec:
    """A layer of 4 heads and 2 KV heads, of whose dimensions `turns` turn, all if None."""
    turning = RopeSpec(dim=(turns or head_dim // 2 * 2), base=10000.0)
    return ModelSpec(
        family="llama",
        n_embd=64,
        n_vocab=96,
        n_ctx=64,
        blocks=(Attention(layer=0, n_heads=4, n_kv_heads=2, head_dim=head_dim, rope=rope),),
        rope=turning,
        rope_local=turning,
        norm_eps=1e-5,
        tied=True,
        attn_scale=0.1,
    )


def choose(spec: ModelSpec, **options: object) -> Lowering:
    (found,) = lowerings(spec, **options)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(
    ("spec", "kind", "rotation", "reason"),
    [
        (one(64), "A", "inside", "64 of 64 dimensions turn, in all KV heads alike"),
        (one(48), "A", "inside", "48 of 48"),
        (one(128, 96), "A", "inside", "96 of 128"),
        (one(64, rope="local"), "A", "inside", "64 of 64"),
        (one(24, rope="none"), "A", "none", "nothing turns, and heads of 24 are a multiple of 8"),
        (one(56), "B", "before", "heads have 56 dimensions, and GroupQueryAttention rotates multiples of 16"),
        (one(32, 24), "B", "before", "24 of 32 dimensions turn, and GroupQueryAttention turns multiples of 16"),
        (one(32, 8), "B", "before", "8 of 32 dimensions turn"),
        (one(20), "C", "before", "heads have 20 dimensions, and GroupQueryAttention takes multiples of 8; Attention takes any"),
        (one(33), "C", "before", "heads have 33 dimensions"),
        (one(4, rope="none"), "C", "none", "heads have 4 dimensions"),
    ],
)
def test_sizes_choose(spec: ModelSpec, kind: str, rotation: str, reason: str) -> None:
    found = choose(spec)
    assert (found.kind, found.rotation, found.in_place) == (kind, rotation, kind != "C")
    assert found.reason.startswith(reason)


def test_pairs_of_kv_heads_and_sizes_of_values_choose() -> None:
    spec = one(16, 2)
    alike = Turning(ROPE, ((0, 3, 5, 7, 9, 11, 13, 31),) * 2)
    own = Turning(ROPE, ((0, 1, 2, 3, 4, 5, 6, 7), (1, 2, 3, 4, 5, 6, 7, 30)))
    assert choose(spec, turnings={0: alike}).rotation == "inside"
    found = choose(spec, turnings={0: own})
    assert (found.kind, found.rotation) == ("B", "by_head") and found.reason.startswith("KV heads turn pairs of their own")
    found = choose(spec, turnings={0: own}, value_dims={0: 24})
    assert (found.kind, found.rotation, found.value_dim) == ("C", "by_head", 24)
    assert found.reason.startswith("keys have 16 dimensions and values 24, and GroupQueryAttention wants both alike")


def test_what_is_told_of_layers() -> None:
    spec = one(64, 16)
    layers = [64, 64, 24, 64, 20]
    blocks = tuple(replace(spec.attention[0], layer=i, head_dim=size) for i, size in enumerate(layers))
    choices = lowerings(replace(spec, blocks=blocks))
    assert describe(choices) == [
        "layers 0-1, 3: GroupQueryAttention that rotates (A): 16 of 64 dimensions turn, in all KV heads alike",
        "layer 2: RotaryEmbedding, then GroupQueryAttention (B): heads have 24 dimensions, and GroupQueryAttention rotates multiples of 16",
        "layer 4: RotaryEmbedding, then Attention (C): heads have 20 dimensions, and GroupQueryAttention takes multiples of 8; "
        "Attention takes any",
    ]
    assert choices[2].to_json() == {
        "layer": 2,
        "kind": "B",
        "operator": "GroupQueryAttention",
        "rotation": "before",
        "value_dim": 24,
        "in_place": True,
        "reason": choices[2].reason,
    }


@pytest.mark.parametrize(
    ("head_dim", "values", "message"),
    [
        (
            20,
            20,
            "layer 0: heads have 20 dimensions, and GroupQueryAttention takes multiples of 8, so its keys and values cannot be written in "
            "place, which was asked for. Keep 16 or 24 dimensions, or let the runtime copy its cache at every step.",
        ),
        (6, 6, r"Keep 8 dimensions, or"),
        (32, 24, r"keys have 32 dimensions and values 24, .* Keep as many dimensions of values as of keys, or let"),
    ],
)
def test_sizes_that_no_in_place_attention_takes_are_refused_where_it_is_asked_for(head_dim: int, values: int, message: str) -> None:
    assert choose(one(head_dim), value_dims={0: values}).kind == "C"
    with pytest.raises(PlanError, match=message):
        lowerings(one(head_dim), value_dims={0: values}, in_place=True)
    assert choose(one(24), in_place=True).kind == "B"


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (((0, 1),), "layer 0: RoPE pairs of 1 KV heads are given, and it has 2"),
        (((0, 1), (0,)), r"layer 0: its KV heads have \[1, 2\] RoPE pairs; expected one number of them, from 1 to 8"),
        (((), ()), r"its KV heads have \[0\] RoPE pairs"),
        ((tuple(range(9)),) * 2, r"its KV heads have \[9\] RoPE pairs; expected one number of them, from 1 to 8"),
        (((0, 1), (0, 32)), "layer 0: a RoPE pair is not one of 0 to 31"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(pairs: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        lowerings(one(16, 2), turnings={0: Turning(ROPE, pairs)})


def test_values_are_as_long_as_wv_says() -> None:
    spec = one(16)
    assert value_dims(spec, {"layers.0.wv.weight": from_values(np.ones((24, 64)), origin="m: wv")}) == {0: 12}
    assert value_dims(spec, {}) == {}
    with pytest.raises(ShapeError, match="m: wv: 25 rows of values do not divide into 2 KV heads"):
        value_dims(spec, {"layers.0.wv.weight": from_values(np.ones((25, 64)), origin="m: wv")})


def test_choosing_needs_no_onnx() -> None:
    heavy = ("onnx", "onnx_ir", "onnxruntime", "torch")
    code = f"import sys, edgeq.converters.onnx.lowering; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
