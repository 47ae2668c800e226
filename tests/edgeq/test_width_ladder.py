"""Ladders of MLP widths: pace, limits, and what cannot be cut."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from edgeq.elastic import MAX_RATE, kept_for_rate
from edgeq.errors import UnsupportedError
from edgeq.rope import RopeSpec
from edgeq.spec import Attention, Block, Mlp, ModelSpec
from edgeq.tensors import LazyTensor, from_values
from edgeq.width_ladder import width_ladder


def model(*widths: int) -> tuple[ModelSpec, Mapping[str, LazyTensor]]:
    """Layers of these widths, nothing but MLPs behind a small attention."""
    blocks: list[Block] = []
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (10, 8)}
    for layer, n_ff in enumerate(widths):
        blocks += [Attention(layer=layer, n_heads=1, n_kv_heads=1, head_dim=8), Mlp(layer=layer, n_ff=n_ff)]
        shapes |= {f"layers.{layer}.{role}.weight": (8, 8) for role in ("wq", "wk", "wv", "wo")}
        shapes |= {f"layers.{layer}.{role}.weight": (n_ff, 8) for role in ("gate", "up")} | {f"layers.{layer}.down.weight": (8, n_ff)}
    rope = RopeSpec(dim=8, base=10000.0)
    spec = ModelSpec(
        family="llama", n_embd=8, n_vocab=10, n_ctx=64, blocks=tuple(blocks), rope=rope, norm_eps=1e-5, tied=True, attn_scale=8**-0.5
    )
    return spec, {name: from_values(np.zeros(shape, dtype=np.float32), origin=name) for name, shape in shapes.items()}


def test_layers_lose_alike_and_the_ladder_ends_where_a_package_may() -> None:
    spec, tensors = model(320, 320, 320)
    ladder = width_ladder(spec, tensors, channel_step=32)
    assert [(step.layer, step.start, step.stop) for step in ladder.steps[:4]] == [
        (0, 320, 288),
        (1, 320, 288),
        (2, 320, 288),
        (0, 288, 256),
    ]
    assert ladder.steps[0].removed == 32 * 3 * 8
    assert ladder.removed_fraction(len(ladder.steps)) >= MAX_RATE > ladder.removed_fraction(len(ladder.steps) - 1)
    assert set(kept_for_rate(ladder, 0.2).n_ff) <= {224, 256}
    assert kept_for_rate(ladder, 0.2).n_kv == (1, 1, 1)


def test_shares_set_the_pace_and_no_layer_loses_more_than_most() -> None:
    spec, tensors = model(320, 320)
    ladder = width_ladder(spec, tensors, channel_step=32, shares=(0.5, 1.5), most=0.4)
    assert [step.layer for step in ladder.steps] == [1, 1, 1, 0, 1, 0, 0, 0]
    assert kept_for_rate(ladder, MAX_RATE).n_ff == (192, 192), "layer 1 has lost all that it may, layer 0 goes on"


def test_one_size_for_all_layers() -> None:
    spec, tensors = model(320, 320)
    ladder = width_ladder(spec, tensors, channel_step=64, alike=True, shares=(0.5, 1.5))
    assert [(step.layer, step.start, step.stop) for step in ladder.steps[:2]] == [(None, 320, 256), (None, 256, 192)]
    assert ladder.steps[0].removed == 2 * 64 * 3 * 8


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"cutting 256 MLP channels at a time removes 0 of 12,800 block parameters.*--fixed"):
        width_ladder(*model(256, 256), channel_step=256)
    with pytest.raises(
        UnsupportedError, match=r"2 of 2 layers have MLPs, of widths \[160, 320\], which cannot be cut alike\. Use --fixed\."
    ):
        width_ladder(*model(160, 320), channel_step=32, alike=True)
