"""Attention of all sizes in one graph, with each way of computing it, against the reference; padding, windows, pairs of a head's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from onnx_decoders import (
    CLOSE,
    FLOAT,
    FLOAT16,
    float_grids,
    nodes,
    random_decoder,
    reference_logits,
    run,
    run_shared,
    run_texts,
    session,
    with_tensors,
)

from edgeq.converters.onnx.builder import Builder
from edgeq.converters.onnx.decoder import decoder
from edgeq.converters.onnx.lowering import Turning, lowerings, value_dims
from edgeq.model import Model
from edgeq.rope import NEVER, RopeSpec
from edgeq.spec import Attention, Block, Mlp, ModelSpec
from edgeq.tensors import LazyTensor, from_values

N_VOCAB = 101
# Every layer has sizes of its own, and no other is like it; attention is gone in layer 2, the MLP in layers 3, 5 and 6.
BLOCKS: tuple[Block, ...] = (
    Attention(layer=0, n_heads=4, n_kv_heads=2, head_dim=32, window=3),
    Mlp(layer=0, n_ff=96),
    Attention(layer=1, n_heads=6, n_kv_heads=2, head_dim=24, window=6),
    Mlp(layer=1, n_ff=72),
    Mlp(layer=2, n_ff=33),
    Attention(layer=3, n_heads=3, n_kv_heads=3, head_dim=20, window=4),
    Attention(layer=4, n_heads=4, n_kv_heads=1, head_dim=16, rope="none"),
    Mlp(layer=4, n_ff=100),
    Attention(layer=5, n_heads=4, n_kv_heads=1, head_dim=19, rope="local"),
    Attention(layer=6, n_heads=2, n_kv_heads=2, head_dim=8, rope="none", window=2),
)
ROPES = {
    "plain": RopeSpec(dim=16, base=10000.0),
    "linear": RopeSpec(dim=16, base=10000.0, kind="linear", factor=4.0),
    "factors": RopeSpec(dim=16, base=10000.0, kind="factors", factors=(1.0, 1.5, 2.0, NEVER, 1.0, 8.0, NEVER, NEVER)),
    "yarn": RopeSpec(dim=16, base=10000.0, kind="yarn", factor=4.0, original_n_ctx=16, attn_factor=1.14),
    "longrope": RopeSpec(
        dim=16,
        base=10000.0,
        kind="longrope",
        original_n_ctx=32,
        attn_factor=1.2,
        short_factors=(1.0,) * 8,
        long_factors=tuple(1.0 + i for i in range(8)),
    ),
}
BIASES = frozenset({"wq", "wk", "wv", "wo", "gate", "up", "down"})


def unequal(family: str = "llama", rope: str = "plain") -> ModelSpec:
    return ModelSpec(
        family=family,
        n_embd=64,
        n_vocab=N_VOCAB,
        n_ctx=64,
        blocks=BLOCKS,
        rope=ROPES[rope],
        rope_local=RopeSpec(dim=8, base=100.0, kind="linear", factor=2.0),
        norm_eps=1e-5,
        tied=False,
        attn_scale=0.3,
        embed_scale=1.7,
        biases=BIASES if family in ("llama", "qwen2", "smollm3") else frozenset(),
    )


def ids(n: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, N_VOCAB, n).tolist()


def graph(model: Model, **options: object) -> Builder:
    return decoder(model, float_grids(model), **{"float_type": FLOAT, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "gemma3", "smollm3"])
def test_layers_of_unequal_sizes_equal_the_reference(family: str) -> None:
    model, tokens = random_decoder(unequal(family)), ids(24)
    expected = reference_logits(model, tokens)
    assert np.ptp(expected) > 4
    for join in (False, True):
        running = session(graph(model, join=join))
        assert np.abs(run(running, tokens, [24]) - expected).max() < CLOSE
        assert np.abs(run(running, tokens, [7, 5, *[1] * 12]) - expected).max() < CLOSE
    half = run(session(graph(model, float_type=FLOAT16)), tokens, [7, 5, *[1] * 12])
    assert np.abs(half.astype(np.float32) - expected).max() < 3e-2  # 9e-3 was measured


def test_each_layer_has_the_operators_that_were_chosen() -> None:
    model = random_decoder(unequal())
    g = graph(model)
    kinds = {choice.layer: choice.kind for choice in lowerings(model.spec)}
    assert kinds == {0: "A", 1: "B", 3: "C", 4: "A", 5: "C", 6: "A"}
    made = {op: {int(name.split("/")[2].removeprefix("layers.")) for name in nodes(g, op)} for op in ("GroupQueryAttention", "Attention")}
    assert made == {"GroupQueryAttention": {0, 1, 4, 6}, "Attention": {3, 5}}
    assert nodes(g, "RotaryEmbedding").keys() == {
        f"/model/layers.{i}/attn/{part}_rotary/RotaryEmbedding" for i in (1, 3, 5) for part in "qk"
    }
    rotating = {name: node.attributes["do_rotary"].as_int() for name, node in nodes(g, "GroupQueryAttention").items()}
    assert [rotating[f"/model/layers.{i}/attn/GroupQueryAttention"] for i in (0, 1, 4, 6)] == [1, 0, 0, 0]
    everywhere = [*nodes(g, "GroupQueryAttention").values(), *nodes(g, "Attention").values()]
    assert [node.attributes["scale"].as_float() for node in everywhere] == pytest.approx([0.3] * 6)
    past = {value.name: value.shape[1:4:2] for value in session(g).get_inputs() if value.name.startswith("past")}
    assert past["past_key_values.1.key"] == [2, 24] and past["past_key_values.5.value"] == [1, 19]
    assert "past_key_values.2.key" not in past


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_embeddings_of_all_kinds(rope: str) -> None:
    model, tokens = random_decoder(unequal(rope=rope)), ids(20)
    # LongRoPE's factors go by the context that the graph is made for
    for n_ctx in (24, 64):
        expected = reference_logits(model, tokens, n_ctx=n_ctx)
        running = session(graph(model, n_ctx=n_ctx))
        assert np.abs(run(running, tokens, [12, *[1] * 8]) - expected).max() < CLOSE


def test_a_buffer_is_shared_where_every_layer_writes_in_place() -> None:
    blocks = tuple(block for block in BLOCKS if block.layer not in (3, 5))
    model, tokens = random_decoder(replace(unequal(), blocks=blocks)), ids(24)
    running = session(graph(model, join=True, in_place=True))
    assert np.abs(run_shared(running, tokens, [5, 1, 1, 3, 13, 1], room=30) - reference_logits(model, tokens)).max() < CLOSE


def test_texts_of_a_batch_may_be_padded_behind_their_tokens() -> None:
    model = random_decoder(unequal())
    long, short, more = ids(9, seed=2), ids(5, seed=3), [ids(3, seed=4), ids(3, seed=5)]
    batch = np.array([[*long, *more[0]], [*short, 0, 0, 0, 0, *more[1]]])
    mask = np.ones_like(batch)
    mask[1, 5:9] = 0
    logits = run_texts(session(graph(model)), batch, mask, [9, 1, 1, 1])
    assert np.abs(logits[0] - reference_logits(model, [*long, *more[0]])).max() < CLOSE
    expected = reference_logits(model, [*short, *more[1]])
    assert np.abs(logits[1, :5] - expected[:5]).max() < CLOSE
    assert np.abs(logits[1, 9:] - expected[5:]).max() < CLOSE


def test_layers_with_attention_of_ai_onnx_take_padding_before_tokens() -> None:
    blocks = tuple(block for block in BLOCKS if block.layer in (2, 3, 5))
    model, tokens = random_decoder(replace(unequal(), blocks=blocks)), ids(10)
    batch = np.array([[0, 0, 0, *tokens], ids(13, seed=6)])
    mask = np.ones_like(batch)
    mask[0, :3] = 0
    logits = run_texts(session(graph(model)), batch, mask, [8, 3, 1, 1])
    assert np.isfinite(logits).all()
    assert np.abs(logits[0, 3:] - reference_logits(model, tokens)).max() < CLOSE
    assert np.abs(logits[1] - reference_logits(model, batch[1].tolist())).max() < CLOSE


# Pairs that each KV head keeps, and dimensions of its values, by layer.
PAIRS: Mapping[int, Sequence[Sequence[int]]] = {
    0: [[0, 2, 3, 5, 6, 8, 9, 11]] * 2,
    1: [[0, 1, 2, 3, 4, 5, 6, 11], [11, 2, 3, 4, 5, 7, 8, 9]],
    2: [[1, 3, 5, 7, 9], [0, 2, 4, 6, 8]],
    3: [[0, 1, 2, 3, 4, 5, 6, 7]] * 2,
    4: [[0, 2, 3, 5, 6, 8, 9, 11]] * 2,
}
VALUES: Mapping[int, Sequence[Sequence[int]]] = {
    0: [range(16)] * 2,
    1: [range(16), range(8, 24)],
    2: [range(10), range(3, 13)],
    3: [range(7), range(4, 11)],
    4: [range(2, 18)] * 2,
}


def taken(full: Model, rope: RopeSpec) -> tuple[Model, Model]:
    """The model with nothing but those pairs and values, and the model of the old sizes with zeros in place of the others."""
    small, zeroed = dict(full.tensors), dict(full.tensors)
    blocks: list[Block] = []

    def keep(name: str, rows: Sequence[int]) -> None:
        values = full.tensors[name].decode()
        alone = np.zeros_like(values)
        alone[list(rows)] = values[list(rows)]
        small[name], zeroed[name] = from_values(values[list(rows)], origin=name), from_values(alone, origin=name)

    for block in full.spec.blocks:
        if isinstance(block, Mlp):
            blocks.append(block)
            continue
        size, group = block.head_dim, block.n_heads // block.n_kv_heads
        turned = [[*pairs, *(pair + size // 2 for pair in pairs)] for pairs in PAIRS[block.layer]]
        prefix = f"layers.{block.layer}"
        queries = [(g * group + h) * size + i for g, own in enumerate(turned) for h in range(group) for i in own]
        keys = [g * size + i for g, own in enumerate(turned) for i in own]
        values = [g * size + i for g, own in enumerate(VALUES[block.layer]) for i in own]
        mixed = [(g * group + h) * size + i for g, own in enumerate(VALUES[block.layer]) for h in range(group) for i in own]
        for role, rows in (("wq", queries), ("wk", keys), ("wv", values)):
            for kind in ("weight", "bias"):
                keep(f"{prefix}.{role}.{kind}", rows)
        wo: LazyTensor = full.tensors[f"{prefix}.wo.weight"]
        small[f"{prefix}.wo.weight"] = from_values(wo.decode()[:, mixed], origin="wo")
        blocks.append(replace(block, head_dim=len(turned[0])))
    spec = replace(full.spec, blocks=tuple(blocks), rope=RopeSpec(dim=2, base=rope.base))
    return with_tensors(spec, small), with_tensors(full.spec, zeroed)


@pytest.mark.parametrize("kind", ["plain", "yarn"])
def test_pairs_and_values_of_each_kv_head_equal_zeros_in_the_whole_model(kind: str) -> None:
    rope = replace(ROPES[kind], dim=24)
    blocks: list[Block] = []
    for i in PAIRS:
        blocks += [Attention(layer=i, n_heads=6, n_kv_heads=2, head_dim=24, window=7 if i > 1 else None), Mlp(layer=i, n_ff=40 + i)]
    full = random_decoder(replace(unequal(), blocks=tuple(blocks), rope=rope))
    small, zeroed = taken(full, rope)
    turnings = {i: Turning(rope, tuple(tuple(own) for own in pairs)) for i, pairs in PAIRS.items()}
    choices = lowerings(small.spec, value_dims=value_dims(small.spec, small.tensors), turnings=turnings)
    assert [(choice.kind, choice.rotation) for choice in choices] == [
        ("A", "inside"),
        ("B", "by_head"),
        ("C", "by_head"),
        ("C", "before"),
        ("A", "inside"),
    ]
    tokens = ids(24)
    expected = reference_logits(zeroed, tokens)
    assert np.abs(expected - reference_logits(full, tokens)).max() > 100 * CLOSE
    g = graph(small, turnings=turnings)
    running = session(g)
    assert np.abs(run(running, tokens, [24]) - expected).max() < CLOSE
    assert np.abs(run(running, tokens, [7, 5, *[1] * 12]) - expected).max() < CLOSE
    # all from one table: columns are taken when the graph is loaded, once for layers 0 and 4
    tables = [name for name in g.model().graph.initializers if "_cache" in name]
    assert sorted(tables) == ["cos_cache", "sin_cache"]
    assert {name for name in nodes(g, "Gather") if name.endswith("rotary/cos/Gather")} == {
        "/model/layers.0/attn/rotary/cos/Gather",
        "/model/layers.1/attn/q_rotary/cos/Gather",
        "/model/layers.1/attn/k_rotary/cos/Gather",
        "/model/layers.2/attn/q_rotary/cos/Gather",
        "/model/layers.2/attn/k_rotary/cos/Gather",
        "/model/layers.3/attn/rotary/cos/Gather",
    }
