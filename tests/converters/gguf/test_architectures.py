"""Models that llama.cpp cannot run are refused with the value and the remedy."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from made_models import made_spec

from edgeq.converters.gguf.architectures import Arch, arch_for
from edgeq.converters.sources.gguf_spec import RULES
from edgeq.errors import PlanError, UnsupportedError
from edgeq.families import FAMILIES
from edgeq.rope import RopeSpec
from edgeq.spec import ModelSpec

SQUARE = {"n_embd": 96}


def with_block(spec: ModelSpec, index: int, **changes: Any) -> ModelSpec:
    blocks = list(spec.blocks)
    blocks[index] = dataclasses.replace(blocks[index], **changes)
    return dataclasses.replace(spec, blocks=tuple(blocks))


@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.name)
def test_every_family_has_an_architecture(row: Any) -> None:
    arch = arch_for(made_spec(row.name, n_layers=4, **SQUARE))
    assert arch == Arch(row.gguf_arch, RULES[row.gguf_arch], row)


def test_layer_count_is_limited() -> None:
    assert arch_for(made_spec(n_layers=512))
    with pytest.raises(PlanError, match=r"513 layers: llama\.cpp stops at 512\. Drop layers\."):
        arch_for(made_spec(n_layers=513))


def test_a_layer_needs_attention_and_mlp_in_this_order() -> None:
    spec = made_spec("qwen3")
    for blocks, found in (
        (spec.blocks[:1] + spec.blocks[2:], "layer 0 has Attention:"),
        ((spec.blocks[1], spec.blocks[0], *spec.blocks[2:]), "layer 0 has Mlp and Attention:"),
    ):
        with pytest.raises(PlanError, match=found + " llama.cpp's qwen3 architecture wants one Attention and one Mlp, in this order"):
            arch_for(dataclasses.replace(spec, blocks=blocks))
    skipped = tuple(dataclasses.replace(b, layer=b.layer * 2) for b in spec.blocks)
    with pytest.raises(PlanError, match="layer 1 has nothing:"):
        arch_for(dataclasses.replace(spec, blocks=skipped))


@pytest.mark.parametrize(
    ("index", "changes", "message"),
    [
        (3, {"n_ff": 128}, "layer 1 has n_ff 128, layer 0 has 160: llama.cpp's qwen3 architecture has one n_ff for all layers. Cut every"),
        (2, {"n_heads": 2}, "layer 1 has n_heads 2, layer 0 has 4"),
        (2, {"n_kv_heads": 4}, "layer 1 has n_kv_heads 4, layer 0 has 2"),
        (2, {"head_dim": 32}, "layer 1 has head_dim 32, layer 0 has 24"),
    ],
)
def test_sizes_must_be_the_same_in_every_layer(index: int, changes: dict[str, int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        arch_for(with_block(made_spec("qwen3"), index, **changes))


LAYERED = ("llama", "qwen2", "phi3")


@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.name)
def test_an_elastic_model_goes_where_layers_may_differ_if_there_is_such_a_place(row: Any) -> None:
    spec = made_spec(row.name, n_layers=4, **SQUARE)
    layered = row.name in LAYERED
    assert arch_for(spec, elastic=True).name == ("deci" if layered else row.gguf_arch)
    for index, changes in ((3, {"n_ff": 128}), (2, {"n_heads": 2, "n_kv_heads": 1})):
        unequal = with_block(spec, index, **changes)
        if layered:
            assert arch_for(unequal) == Arch("deci", RULES["deci"], FAMILIES[0])
        else:
            with pytest.raises(PlanError, match="Cut every layer to the same size"):
                arch_for(unequal, elastic=True)


def test_layers_may_lack_what_a_layered_graph_can_do_without() -> None:
    spec = made_spec(n_layers=4)

    def without(*gone: int) -> ModelSpec:
        return dataclasses.replace(spec, blocks=tuple(b for i, b in enumerate(spec.blocks) if i not in gone))

    for gone in ((2,), (2, 3), (6,)):
        assert arch_for(without(*gone)).name == "deci"
    for gone in ((3,), (7,)):
        with pytest.raises(
            PlanError, match=rf"layer {gone[0] // 2} has an Attention alone, whose result llama\.cpp's deci architecture drops"
        ):
            arch_for(without(*gone))
    for gone, found in (((0,), "Mlp"), ((0, 1), "nothing")):
        with pytest.raises(PlanError, match=f"layer 0 has {found}: llama.cpp's deci architecture reads the head size there. Keep at least"):
            arch_for(without(*gone))
    swapped = dataclasses.replace(spec, blocks=(*spec.blocks[:2], spec.blocks[3], spec.blocks[2], *spec.blocks[4:]))
    with pytest.raises(PlanError, match=r"layer 1 has Mlp and Attention: llama\.cpp's deci architecture wants one Attention and one Mlp"):
        arch_for(swapped)
    with pytest.raises(
        PlanError, match=r"layer 2 has head_dim 36, layer 0 has 24: llama\.cpp's deci architecture has one head_dim for all"
    ):
        arch_for(with_block(made_spec(n_layers=4), 4, head_dim=36))


@pytest.mark.parametrize("name", ["qwen2", "phi3"])
def test_some_architectures_want_heads_as_wide_as_the_model(name: str) -> None:
    with pytest.raises(
        PlanError, match=rf"4 heads of 24 make 96, the model is 64 wide: llama.cpp's {name} architecture wants both equal\. Keep"
    ):
        arch_for(made_spec(name))


def test_an_attention_scale_of_its_own_needs_a_q_norm_or_a_rotary_magnitude_to_take_it() -> None:
    message = r"attention scale 0\.5: llama\.cpp's smollm3 architecture uses 0\.204124 and has no key for another\. It cannot be exported"
    with pytest.raises(UnsupportedError, match=message):
        arch_for(made_spec("smollm3", attn_scale=0.5))
    for name in ("gemma3", "llama"):
        assert arch_for(made_spec(name, attn_scale=0.5))


def test_an_embedding_scale_of_its_own_is_refused() -> None:
    assert arch_for(made_spec("gemma3", embed_scale=8.03125))
    with pytest.raises(UnsupportedError, match=r"embedding scale 9: llama\.cpp's gemma3 architecture uses 8 and has no key"):
        arch_for(made_spec("gemma3", embed_scale=9.0))
    with pytest.raises(UnsupportedError, match=r"embedding scale 8: llama\.cpp's llama architecture uses 1 and has no key"):
        arch_for(made_spec(embed_scale=8.0))


def test_partial_rotary_is_for_those_that_have_it() -> None:
    rope = RopeSpec(dim=12, base=10000.0)
    with pytest.raises(PlanError, match=r"12 of 24 dimensions of a head rotate: llama\.cpp's qwen3 architecture rotates all of them"):
        arch_for(made_spec("qwen3", rope=rope))
    assert arch_for(made_spec("phi3", rope=rope, **SQUARE))


def test_rope_scaling_that_the_graph_ignores_is_refused() -> None:
    factors = RopeSpec(dim=24, base=10000.0, kind="factors", factors=(1.0,) * 12)
    with pytest.raises(
        UnsupportedError, match=r"rope scaling 'factors' is ignored by llama\.cpp's qwen3 architecture, which knows plain, linear, yarn"
    ):
        arch_for(made_spec("qwen3", rope=factors))
    ramp = RopeSpec(dim=24, base=10000.0, kind="yarn", factor=4.0, original_n_ctx=64, beta_fast=8.0)
    with pytest.raises(UnsupportedError, match="rope scaling yarn with beta_fast 8 and beta_slow 1 is ignored by"):
        arch_for(made_spec("qwen3", rope=ramp))
    assert arch_for(made_spec("llama", rope=ramp))


def test_local_rope_has_a_base_and_nothing_else() -> None:
    local = RopeSpec(dim=24, base=10000.0, kind="linear", factor=2.0)
    with pytest.raises(
        UnsupportedError, match=r"rope of sliding-window layers \(linear, 24 dimensions\): llama\.cpp gives them only a base"
    ):
        arch_for(made_spec("gemma3", rope_local=local))


def test_layers_that_do_not_rotate_stand_where_the_graph_has_them() -> None:
    with pytest.raises(UnsupportedError, match=r"layer 1 does not rotate: llama\.cpp's llama architecture rotates in every layer"):
        arch_for(with_block(made_spec(), 2, rope="none"))
    with pytest.raises(UnsupportedError, match=r"layer 3 rotates: llama\.cpp's smollm3 architecture rotates except in every 4th layer"):
        arch_for(with_block(made_spec("smollm3", n_layers=4), 6, rope="main"))


def test_windows_have_one_length_and_go_with_the_local_rope() -> None:
    spec = made_spec("gemma3", n_layers=3)
    with pytest.raises(UnsupportedError, match=r"sliding windows of \[8, 16\] tokens: llama\.cpp has one length for all layers"):
        arch_for(with_block(spec, 2, window=16))
    message = "layer 1 has window None and local rope: llama.cpp's gemma3 architecture uses the local rope exactly where there is a window"
    with pytest.raises(UnsupportedError, match=message):
        arch_for(with_block(spec, 2, window=None))


def test_biases_that_the_loader_does_not_read_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"biases of wo: llama\.cpp's qwen3 architecture reads those of wq, wk, wv only\. It cannot"):
        arch_for(made_spec("qwen3", biases=frozenset({"wq", "wk", "wv", "wo"})))
    assert arch_for(made_spec("llama", biases=frozenset({"wq", "wk", "wv", "wo", "gate", "up", "down"})))
