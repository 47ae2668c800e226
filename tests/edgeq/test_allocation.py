"""The ladder that sensitivities lead to: what every step removes, in which order steps come, and that no order is better."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq import ports
from edgeq.allocation import Freedom, Move, build_ladder, in_order
from edgeq.elastic import MAX_RATE, Kept, Ladder, Port, steps_for_rate
from edgeq.errors import ShapeError, UnsupportedError
from edgeq.grids import F32
from edgeq.rope import RopeSpec
from edgeq.spec import Attention, Block, Mlp, ModelSpec
from edgeq.tensors import Bytes, Floats, LazyTensor

N_EMBD, HEAD_DIM, GQA = 24, 32, 2
PER_LAYER: Mapping[str, Freedom] = {"ffn": "per layer", "kv_group": "per layer", "layer": "per layer", "head": "all layers alike"}
ALIKE: Mapping[str, Freedom] = {"ffn": "all layers alike", "kv_group": "all layers alike", "layer": "no", "head": "no"}


def shapes(n_ff: Sequence[int], n_kv: Sequence[int], head_dims: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Tensors of layers of these sizes, with the biases that Qwen2 has and two that it has not."""
    found: dict[str, tuple[int, ...]] = {"embed.weight": (100, N_EMBD)}
    for i, (ff, kv, head_dim) in enumerate(zip(n_ff, n_kv, head_dims, strict=True)):
        kv_rows, q_rows = kv * head_dim, kv * head_dim * GQA
        parts: dict[str, tuple[int, ...]] = {}
        if kv:
            parts |= {"attn_norm.weight": (N_EMBD,), "wq.weight": (q_rows, N_EMBD), "wq.bias": (q_rows,), "wk.weight": (kv_rows, N_EMBD)}
            parts |= {"wk.bias": (kv_rows,), "wv.weight": (kv_rows, N_EMBD), "wv.bias": (kv_rows,), "wo.weight": (N_EMBD, q_rows)}
            parts |= {"wo.bias": (N_EMBD,)}
        if ff:
            parts |= {"mlp_norm.weight": (N_EMBD,), "gate.weight": (ff, N_EMBD), "up.weight": (ff, N_EMBD)}
            parts |= {"down.weight": (N_EMBD, ff), "down.bias": (N_EMBD,)}
        found |= {f"layers.{i}.{name}": shape for name, shape in parts.items()}
    return found


def model(n_ff: Sequence[int], n_kv: Sequence[int], head_dim: int = HEAD_DIM) -> tuple[ModelSpec, dict[str, LazyTensor]]:
    blocks: list[Block] = []
    for i, (ff, kv) in enumerate(zip(n_ff, n_kv, strict=True)):
        blocks += [Attention(layer=i, n_heads=GQA * kv, n_kv_heads=kv, head_dim=head_dim)] if kv else []
        blocks += [Mlp(layer=i, n_ff=ff)] if ff else []
    spec = ModelSpec(
        family="llama",
        n_embd=N_EMBD,
        n_vocab=100,
        n_ctx=64,
        blocks=tuple(blocks),
        rope=RopeSpec(dim=head_dim, base=10000.0),
        norm_eps=1e-5,
        tied=True,
        attn_scale=head_dim**-0.5,
    )
    tensors = {n: LazyTensor(shape=s, grid=F32, read=_never, origin=n) for n, s in shapes(n_ff, n_kv, (head_dim,) * len(n_ff)).items()}
    return spec, tensors


def _never(start: int, stop: int) -> Bytes:
    raise AssertionError("shapes are all that is needed")


def sensitivities(spec: ModelSpec, seed: int, *, layer: float | None = None, head: bool = False) -> dict[tuple[Port, int], Floats]:
    """Random ones. layer: what a layer costs, as a share of its parts' sum; None for layers that do not go."""
    rng = np.random.default_rng(seed)
    found: dict[tuple[Port, int], Floats] = {}
    for block in spec.blocks:
        port: Port = "ffn" if isinstance(block, Mlp) else "kv_group"
        n_parts, size = (block.n_ff, 1.0) if isinstance(block, Mlp) else (block.n_kv_heads, 50.0)
        found[port, block.layer] = (rng.exponential(size, n_parts) * rng.uniform(0.5, 4)).astype(np.float32)
        if isinstance(block, Attention) and head:
            pairs = rng.exponential(3.0, block.head_dim // 2)
            found["head", block.layer] = (np.sort(pairs)[::-1] if rng.random() < 0.5 else pairs).astype(np.float32)
    if layer is None:
        return found
    for i in range(spec.n_layers):
        parts = sum(float(found[port, i].sum()) for port in ("ffn", "kv_group") if (port, i) in found)
        found["layer", i] = np.array([parts * layer * rng.uniform(0.5, 1.5)], dtype=np.float32)
    return found


def block_params(kept: Kept, head_dim: int = HEAD_DIM) -> int:
    """Parameters of a model of these sizes, from its shapes."""
    left = shapes(kept.n_ff, kept.n_kv, kept.head_dims or (kept.head_dim or head_dim,) * len(kept.n_ff))
    return sum(int(np.prod(shape)) for name, shape in left.items() if name.startswith("layers."))


def check_counts(ladder: Ladder) -> None:
    removed = 0
    for n_steps, step in enumerate(ladder.steps, 1):
        removed += step.removed
        assert removed == ladder.block_params - block_params(ladder.kept(n_steps)), (n_steps, step)
    assert ladder.removed_fraction(len(ladder.steps)) >= MAX_RATE > ladder.removed_fraction(len(ladder.steps) - 1)
    assert steps_for_rate(ladder, MAX_RATE) == len(ladder.steps)


@pytest.mark.parametrize("channel_step", [1, 16, 32, 48])
def test_ladder_reaches_the_last_rate_and_no_further(channel_step: int) -> None:
    spec, tensors = model((160, 160), (2, 2))
    ladder = build_ladder(spec, tensors, sensitivities(spec, 0), freedom=PER_LAYER, channel_step=channel_step)
    check_counts(ladder)
    for step in ladder.steps:
        assert step.stop % (channel_step if step.port == "ffn" else 1) == 0
        assert step.damage > 0
    assert min(ladder.smallest.n_ff + ladder.smallest.n_kv) > 0
    assert ladder.head_dim is None


@st.composite
def model_sizes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    n_layers = draw(st.integers(2, 5))
    widths = draw(st.lists(st.integers(24, 40), min_size=n_layers, max_size=n_layers))
    return [8 * n for n in widths], draw(st.lists(st.integers(1, 3), min_size=n_layers, max_size=n_layers))


@settings(max_examples=60, deadline=None)
@given(
    model_sizes(),
    st.integers(0, 2**32),
    st.none() | st.floats(0, 1),
    st.sampled_from(["no", "per layer", "all layers alike"]),
    st.sampled_from(["per layer", "no"]),
)
def test_removed_parameters_are_counted_as_they_are(
    sizes: tuple[list[int], list[int]], seed: int, layer: float | None, head: Freedom, groups: Freedom
) -> None:
    """Steps of all ports take parameters from one another; what every prefix leaves is as large as a model of its sizes."""
    spec, tensors = model(*sizes)
    values = sensitivities(spec, seed, layer=layer, head=head != "no")
    freedom = {**PER_LAYER, "kv_group": groups, "head": head}
    ladder = build_ladder(spec, tensors, values, freedom=freedom, channel_step=8, head_sizes=(16, 24, 40))
    assert all((step.layer is None) == (head == "all layers alike") for step in ladder.steps if step.port == "head")
    check_counts(ladder)
    assert all(step.damage >= 0 for step in ladder.steps)
    taken = {step.port for step in ladder.steps}
    assert taken <= {"ffn"} | ({"kv_group"} if groups != "no" else set()) | ({"head"} if head != "no" else set()) | (
        {"layer"} if layer is not None else set()
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(24, 40), st.integers(1, 3), st.integers(0, 2**32))
def test_one_size_for_all_layers_stays_one_size(n_layers: int, blocks: int, n_kv: int, seed: int) -> None:
    spec, tensors = model((8 * blocks,) * n_layers, (n_kv,) * n_layers)
    values = sensitivities(spec, seed, layer=0.0, head=True)
    ladder = build_ladder(spec, tensors, values, freedom={**ALIKE, "layer": "per layer"}, channel_step=8)
    check_counts(ladder)
    for n_steps, step in enumerate(ladder.steps, 1):
        kept = ladder.kept(n_steps)
        assert step.layer is None and len(set(kept.n_ff)) == len(set(kept.n_kv)) == 1
    first = next(step for step in ladder.steps if step.port == "ffn")
    lowest = [np.sort(values["ffn", i])[: first.start - first.stop].sum(dtype=np.float64) for i in range(n_layers)]
    assert first.damage == pytest.approx(sum(lowest), rel=1e-6)


def test_all_ports_take_part() -> None:
    spec, tensors = model((320,) * 6, (4,) * 6)
    values = sensitivities(spec, 3, head=True)
    values["layer", 2] = values["layer", 0] = values["layer", 5] = np.array([1.0], dtype=np.float32)
    ladder = build_ladder(spec, tensors, values, freedom=PER_LAYER, channel_step=16, head_sizes=(24, 16, 64))
    check_counts(ladder)
    assert next((s.layer, s.start, s.stop) for s in ladder.steps if s.port == "head") == (None, 32, 24)
    assert ladder.head_dim == 32
    _, cut = ports.cut(spec, tensors, ladder.smallest)
    assert ports.block_params(cut) == block_params(ladder.smallest)
    assert {step.port for step in ladder.steps} == {"ffn", "kv_group", "head", "layer"}
    assert [step.layer for step in ladder.steps if step.port == "layer"] == [2]  # 0 and 5 are the first and the last


@pytest.mark.parametrize("port", ["ffn", "kv_group", "head", "layer"])
def test_a_port_that_is_not_free_is_left_alone(port: str) -> None:
    spec, tensors = model((320,) * 6, (4,) * 6)
    values = sensitivities(spec, 3, head=True, layer=0.1)
    ladder = build_ladder(spec, tensors, values, freedom={**PER_LAYER, port: "no"}, channel_step=16, head_sizes=(24, 16))
    assert {step.port for step in ladder.steps} <= {"ffn", "kv_group", "head", "layer"} - {port}
    if port != "ffn":  # channels give layers their scale
        unmeasured = {key: own for key, own in values.items() if key[0] != port}
        assert build_ladder(spec, tensors, unmeasured, freedom=PER_LAYER, channel_step=16, head_sizes=(24, 16)) == ladder
    missing: dict[str, Freedom] = {name: free for name, free in PER_LAYER.items() if name != port}
    assert build_ladder(spec, tensors, values, freedom=missing, channel_step=16, head_sizes=(24, 16)) == ladder


def test_heads_lose_less_where_groups_went_before() -> None:
    """Groups of layer 0 are worthless and go first, so the head step finds one of two there and costs half of its share."""
    spec, tensors = model((160, 160), (2, 2))
    values = sensitivities(spec, 0)
    values["kv_group", 0] = np.array([1e-6, 9.0], dtype=np.float32)
    values["kv_group", 1] = np.array([9.0, 9.0], dtype=np.float32)
    for layer in range(2):
        values["head", layer] = np.linspace(0.2, 0.1, 16).astype(np.float32) * 0.1
    ladder = build_ladder(spec, tensors, values, freedom=PER_LAYER, channel_step=16, head_sizes=(24,))
    order = [(step.port, step.layer) for step in ladder.steps]
    [step] = [step for step in ladder.steps if step.port == "head"]
    assert order.index(("kv_group", 0)) < order.index(("head", None))
    assert step.damage == pytest.approx(1.5 * values["head", 0][12:].sum(), rel=1e-6)


def test_heads_of_a_layer_go_where_they_matter_less() -> None:
    spec, tensors = model((160, 160), (2, 2))
    values = sensitivities(spec, 3)
    for layer, share in ((0, 1.0), (1, 1e-4)):
        values["head", layer] = np.linspace(2, 1, 16).astype(np.float32) * share
    freedom: dict[str, Freedom] = {"ffn": "per layer", "head": "per layer"}
    ladder = build_ladder(spec, tensors, values, freedom=freedom, channel_step=16, head_sizes=(24, 16))
    steps = [step for step in ladder.steps if step.port == "head"]
    assert [(step.layer, step.start, step.stop) for step in steps[:2]] == [(1, 32, 24), (1, 24, 16)]
    assert steps[0].damage == pytest.approx(values["head", 1][12:].sum(), rel=1e-6)
    assert ladder.head_dim == 32


def test_a_layer_that_matters_more_is_cut_less() -> None:
    spec, tensors = model((160, 160), (2, 2))
    values = sensitivities(spec, 2)
    values["ffn", 1] = values["ffn", 0] * 4
    kept = build_ladder(spec, tensors, values, freedom=PER_LAYER, channel_step=16).smallest
    assert kept.n_ff[1] > kept.n_ff[0]


def test_layers_that_matter_the_same_are_cut_side_by_side() -> None:
    spec, tensors = model((160,) * 4, (2,) * 4)
    values: dict[tuple[Port, int], Floats] = {("ffn", i): np.ones(160, dtype=np.float32) for i in range(4)}
    ladder = build_ladder(spec, tensors, values, freedom=PER_LAYER, channel_step=16)
    for n_steps in range(len(ladder.steps)):
        n_ff = ladder.kept(n_steps).n_ff
        assert max(n_ff) - min(n_ff) <= 16


def test_a_layer_goes_when_its_rest_is_not_worth_its_size() -> None:
    """Its damage, less what its earlier steps cost, is below the next step's by parameter; one that costs more than its parts stays."""
    spec, tensors = model((160,) * 6, (2,) * 6)
    values = sensitivities(spec, 1)
    parts = {i: float(values["ffn", i].sum() + values["kv_group", i].sum()) for i in range(6)}
    values["layer", 2] = np.array([parts[2] * 0.3], dtype=np.float32)
    values["layer", 3] = np.array([parts[3] * 1.5], dtype=np.float32)
    values["layer", 4] = np.array([-0.001], dtype=np.float32)  # better without: goes first, at no damage
    ladder = build_ladder(spec, tensors, values, freedom=PER_LAYER, channel_step=8)
    gone = {step.layer: i for i, step in enumerate(ladder.steps) if step.port == "layer"}
    assert set(gone) == {2, 4}
    assert gone[4] == 0 and ladder.steps[0].damage == 0
    own = [step for step in ladder.steps if step.layer == 2]
    assert len(own) > 1 and own[-1].port == "layer"
    assert sum(step.damage for step in own) == pytest.approx(parts[2] * 0.3, rel=1e-6)
    slopes = [step.damage / step.removed for step in own]
    assert slopes == sorted(slopes)


def test_layers_without_channels_are_compared_by_a_typical_scale() -> None:
    """Else their groups would be divided by one and come first or last, whatever the unit."""
    spec, tensors = model((320, 0, 320), (2, 2, 2))
    orders = []
    for unit in (1e-6, 1.0, 1e6):
        values = {key: own * np.float32(unit) for key, own in sensitivities(spec, 4).items()}
        values["ffn", 1] = np.zeros(0, dtype=np.float32)
        values["kv_group", 1] = np.array([60, 5], dtype=np.float32) * np.float32(unit)
        ladder = build_ladder(spec, tensors, values, freedom=PER_LAYER, channel_step=16)
        orders.append([(step.layer, step.port, step.stop) for step in ladder.steps])
    assert orders[0] == orders[1] == orders[2]
    assert (1, "kv_group", 1) in orders[0]


def test_steps_too_large_for_the_model() -> None:
    spec, tensors = model((160, 160), (2, 2))
    message = (
        r"cutting {} as far as it goes removes [\d,]+ of 42,176 block parameters, less than the 35% of an elastic package. Export this "
    )
    with pytest.raises(UnsupportedError, match=message.format("KV groups") + r"model with --fixed, or in a type with smaller blocks"):
        build_ladder(spec, tensors, sensitivities(spec, 0), freedom=PER_LAYER, channel_step=256)
    with pytest.raises(UnsupportedError, match=message.format("128 channels of MLPs at a time")):
        build_ladder(spec, tensors, sensitivities(spec, 0), freedom={"ffn": "per layer"}, channel_step=128)
    with pytest.raises(UnsupportedError, match=message.format("nothing")):
        build_ladder(spec, tensors, {}, freedom=PER_LAYER, channel_step=16)


@pytest.mark.parametrize(
    ("n_ff", "n_kv", "message"),
    [
        ((160, 96), (2, 2), r"ffn: layers have \[96, 160\] parts, which cannot be cut alike. Export this model with --fixed"),
        ((160, 160), (2, 0), r"kv_group: layers have \[0, 2\] parts"),
    ],
)
def test_layers_of_several_sizes_are_not_cut_alike(n_ff: tuple[int, ...], n_kv: tuple[int, ...], message: str) -> None:
    spec, tensors = model(n_ff, n_kv)
    with pytest.raises(UnsupportedError, match=message):
        build_ladder(spec, tensors, sensitivities(spec, 0), freedom=ALIKE, channel_step=16)


def test_heads_of_several_sizes_are_not_cut() -> None:
    spec, tensors = model((160, 160), (2, 2))
    [first, *others] = spec.blocks
    narrow = Attention(layer=0, n_heads=8, n_kv_heads=4, head_dim=16)
    values = sensitivities(spec, 0, head=True)
    values["kv_group", 0] = np.ones(4, dtype=np.float32)
    mixed = ModelSpec(**{**vars(spec), "blocks": (narrow, *others), "rope": RopeSpec(dim=16, base=1e4)})
    assert first != narrow
    with pytest.raises(UnsupportedError, match=r"head: layers have \[16, 32\] parts, which cannot be cut alike"):
        build_ladder(mixed, tensors, values, freedom=PER_LAYER, channel_step=16, head_sizes=(8,))


@pytest.mark.parametrize(("port", "n", "expected"), [("ffn", 159, 160), ("kv_group", 3, 2), ("head", 32, 16), ("layer", 2, 1)])
def test_sensitivities_of_another_length(port: Any, n: int, expected: int) -> None:
    spec, tensors = model((160,) * 3, (2,) * 3)
    values = {**sensitivities(spec, 0, layer=0.5, head=True), (port, 1): np.ones(n, dtype=np.float32)}
    with pytest.raises(ShapeError, match=rf"layer 1: sensitivities of port {port} have shape \({n},\), expected \({expected},\)"):
        build_ladder(spec, tensors, values, freedom=PER_LAYER, channel_step=16, head_sizes=(16,))


# The knapsack: chains of (cost, parameters removed), whole numbers, so that sums are exact.


def moves(layer: int, chain: Sequence[tuple[int, int]]) -> list[Move]:
    sizes = range(len(chain), -1, -1)
    return [
        Move(layer=layer, port="ffn", start=start, stop=start - 1, removed=removed, damage={layer: float(cost)}, cost=float(cost))
        for start, (cost, removed) in zip(sizes, chain, strict=False)
    ]


def on_hull(chain: Sequence[tuple[int, int]], n_moves: int) -> bool:
    """Whether no line between two other points of the curve passes below the point after n_moves."""
    points = [(0, 0), *itertools.accumulate(chain, lambda a, b: (a[0] + b[0], a[1] + b[1]))]
    cost, removed = points[n_moves]
    return not any(
        (c1 - c0) * (removed - r0) < (cost - c0) * (r1 - r0)
        for (c0, r0), (c1, r1) in itertools.product(points[:n_moves], points[n_moves + 1 :])
    )


def cheapest(chains: Sequence[Sequence[tuple[int, int]]], least: int) -> int:
    """The least cost of a prefix of every chain that together remove at least `least`, by trying all."""
    totals = []
    for lengths in itertools.product(*(range(len(chain) + 1) for chain in chains)):
        taken = [move for chain, n in zip(chains, lengths, strict=True) for move in chain[:n]]
        if sum(removed for _, removed in taken) >= least:
            totals.append(sum(cost for cost, _ in taken))
    return min(totals)


def check_against_all_choices(chains: Sequence[Sequence[tuple[int, int]]]) -> None:
    order = in_order([moves(layer, chain) for layer, chain in enumerate(chains)])
    assert sorted((m.layer, -m.start) for m in order) == [(i, -n) for i, c in enumerate(chains) for n in range(len(c), 0, -1)]
    cost, removed, edge = 0, 0, 0  # edge: cost of the moves since the last prefix that is on all hulls
    taken = [0] * len(chains)
    for move in order:
        assert move.layer is not None and move.start == len(chains[move.layer]) - taken[move.layer]
        asked = removed + 1  # the least for which this prefix is the answer
        taken[move.layer] += 1
        cost, removed, edge = cost + int(move.cost), removed + move.removed, edge + int(move.cost)
        assert cost <= cheapest(chains, asked) + edge
        if all(on_hull(chain, n) for chain, n in zip(chains, taken, strict=True)):
            assert cost == cheapest(chains, removed)
            edge = 0


chains_of_moves = st.lists(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=4), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None)
@given(chains_of_moves)
def test_no_choice_of_sizes_is_cheaper_by_more_than_one_step(chains: list[list[tuple[int, int]]]) -> None:
    check_against_all_choices(chains)


def test_moves_that_pay_off_later_are_seen_coming() -> None:
    """By their own slopes the first moves would come in the order 1, 0, 0: the two of chain 0 remove as much as 1 does for less."""
    chains = [[(6, 2), (0, 2)], [(5, 2), (5, 2)]]
    order = in_order([moves(layer, chain) for layer, chain in enumerate(chains)])
    assert [move.layer for move in order] == [0, 0, 1, 1]
    check_against_all_choices(chains)
