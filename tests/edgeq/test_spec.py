from __future__ import annotations

from typing import Any

import pytest

from edgeq.errors import ShapeError
from edgeq.rope import RopeSpec
from edgeq.spec import Attention, Mlp, ModelSpec


def spec(**values: Any) -> ModelSpec:
    blocks = (
        Attention(layer=0, n_heads=4, n_kv_heads=2, head_dim=24),
        Mlp(layer=0, n_ff=160),
        Attention(layer=1, n_heads=2, n_kv_heads=1, head_dim=24, rope="none"),
        Mlp(layer=1, n_ff=96),
        Mlp(layer=3, n_ff=32),
    )
    rope = RopeSpec(dim=24, base=10000.0)
    known = {"n_embd": 64, "n_vocab": 320, "n_ctx": 256, "norm_eps": 1e-5, "tied": True, "attn_scale": 24**-0.5}
    return ModelSpec(**{"family": "llama", "blocks": blocks, "rope": rope, **known, **values})


def test_blocks_by_kind_and_layer() -> None:
    model = spec()
    assert [b.n_heads for b in model.attention] == [4, 2]
    assert [b.n_ff for b in model.mlps] == [160, 96, 32]
    assert model.n_layers == 4
    assert [(layer, len(blocks)) for layer, blocks in model.layers()] == [(0, 2), (1, 2), (2, 0), (3, 1)]
    assert tuple(b for _, blocks in model.layers() for b in blocks) == model.blocks


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_heads": 0}, "layer 5: heads 0, kv heads 2, head_dim 24 must all be positive"),
        ({"n_heads": 5}, "layer 5: 5 heads do not divide into 2 kv heads"),
        (
            {"pairs": ((0, 1), (2,))},
            "layer 5: RoPE pairs [2, 1] of its KV heads; expected one number of them, from 1 to 12, for each of 2",
        ),
        ({"pairs": ((0, 1),)}, "layer 5: RoPE pairs [2] of its KV heads; expected one number of them, from 1 to 12, for each of 2"),
        (
            {"pairs": (tuple(range(13)),) * 2},
            "layer 5: RoPE pairs [13, 13] of its KV heads; expected one number of them, from 1 to 12, for each of 2",
        ),
    ],
)
def test_attention_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError) as caught:
        Attention(**{"layer": 5, "n_heads": 4, "n_kv_heads": 2, "head_dim": 24, **values})
    assert str(caught.value) == message


def test_mlp_that_cannot_be() -> None:
    with pytest.raises(ShapeError, match=r"^layer 5: n_ff 0 must be positive$"):
        Mlp(layer=5, n_ff=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"blocks": ()}, "the model has no blocks"),
        ({"n_vocab": 0}, "n_embd 64, n_vocab 0 and n_ctx 256 must all be positive"),
        (
            {"blocks": (Attention(layer=2, n_heads=1, n_kv_heads=1, head_dim=24, rope="local"),)},
            "layer 2 uses local rope, but the spec has none",
        ),
        ({"rope": RopeSpec(dim=26, base=10000.0)}, "layer 0: rope dimension 26 exceeds head_dim 24"),
        (
            {"blocks": (Attention(layer=3, n_heads=1, n_kv_heads=1, head_dim=8, pairs=((0, 12),)),)},
            "layer 3: a RoPE pair is not one of 0 to 11",
        ),
    ],
)
def test_spec_that_contradicts_itself(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError) as caught:
        spec(**values)
    assert str(caught.value) == message


def test_rope_of_unused_kind_is_not_checked() -> None:
    """A block without rotation may have a head smaller than the model's rotary dimension."""
    block = Attention(layer=0, n_heads=1, n_kv_heads=1, head_dim=8, rope="none")
    assert spec(blocks=(block,)).blocks == (block,)
