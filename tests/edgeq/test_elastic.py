"""The ladder: any rate and any budget takes a prefix of it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.elastic import MAX_RATE, CutSize, Kept, Ladder, Point, Step, kept_for_bytes, kept_for_rate, steps_for_bytes, steps_for_rate
from edgeq.errors import PackageError, PlanError


def step(layer: int | None, port: Any, start: int, stop: int, removed: int, damage: float = 0.1) -> Step:
    return Step(layer=layer, port=port, start=start, stop=stop, removed=removed, damage=damage)


def ladder(*steps: Step) -> Ladder:
    return Ladder(n_ff=(96, 64), n_kv=(2, 3), block_params=1000, steps=steps)


SOUND = ladder(
    step(1, "ffn", 64, 32, 100),
    step(0, "ffn", 96, 64, 90),
    step(1, "kv_group", 3, 2, 50, 0.2),
    step(0, "ffn", 64, 32, 90),
    step(1, "kv_group", 2, 0, 30),
)


# Every port: layer 1 goes whole, heads and widths shrink in all layers.
MIXED = Ladder(
    n_ff=(96, 96, 96),
    n_kv=(2, 3, 2),
    head_dim=128,
    block_params=1000,
    steps=(
        step(None, "ffn", 96, 64, 120, 0.5),
        step(2, "kv_group", 2, 1, 30, 0.25),
        step(None, "head", 128, 96, 40, 0.125),
        step(1, "kv_group", 3, 2, 20, 0.5),
        step(1, "layer", 1, 0, 90, 1.0),
        step(0, "ffn", 64, 32, 25, 0.75),
        step(None, "head", 96, 64, 30, 2.0),
    ),
)


@st.composite
def ladders(draw: st.DrawFn) -> Ladder:
    """Random steps of every port that may come next, up to two thirds of the parameters."""
    n_layers = draw(st.integers(1, 4))
    alike = draw(st.booleans())
    n_ff = [draw(st.integers(2, 5))] * n_layers if alike else draw(st.lists(st.integers(2, 5), min_size=n_layers, max_size=n_layers))
    n_kv = [draw(st.integers(1, 4))] * n_layers if alike else draw(st.lists(st.integers(0, 4), min_size=n_layers, max_size=n_layers))
    head_dim = draw(st.none() | st.sampled_from([64, 128]))
    start = (tuple(n_ff), tuple(n_kv))
    now, steps = head_dim, []
    for _ in range(draw(st.integers(0, 12))):
        layer = draw(st.integers(0, n_layers - 1))
        moves: list[Step] = []
        damage, removed = draw(st.integers(0, 1000)) / 4, draw(st.integers(1, 40))
        for port, sizes in (("ffn", n_ff), ("kv_group", n_kv)):
            at = None if alike else layer
            if sizes[layer] > 1:
                moves.append(step(at, port, sizes[layer], draw(st.integers(1, sizes[layer] - 1)), removed, damage))
        if now is not None and now > 2:
            moves.append(step(None, "head", now, now // 2, removed, damage))
        if 0 < layer < n_layers - 1 and n_ff[layer] and not alike:
            moves.append(step(layer, "layer", 1, 0, removed, damage))
        if not moves:
            continue
        taken = draw(st.sampled_from(moves))
        steps.append(taken)
        for i in range(n_layers) if taken.layer is None else (taken.layer,):
            n_ff[i] = taken.stop if taken.port in ("ffn", "layer") else n_ff[i]
            n_kv[i] = taken.stop if taken.port in ("kv_group", "layer") else n_kv[i]
        now = taken.stop if taken.port == "head" else now
    total = sum(s.removed for s in steps) * 3 // 2 + 1
    return Ladder(n_ff=start[0], n_kv=start[1], head_dim=head_dim, block_params=total, steps=tuple(steps))


def bytes_of(kept: Kept) -> int:
    return 10 * sum(kept.n_ff) + 100 * sum(kept.n_kv)


@pytest.mark.parametrize(
    ("rate", "n_ff", "n_kv"),
    [
        (0, (96, 64), (2, 3)),
        (0.0001, (96, 32), (2, 3)),
        (0.1, (96, 32), (2, 3)),
        (0.1001, (64, 32), (2, 3)),
        (0.24, (64, 32), (2, 2)),
        (0.35, (32, 32), (2, 0)),
    ],
)
def test_a_rate_takes_the_fewest_steps_that_reach_it(rate: float, n_ff: tuple[int, ...], n_kv: tuple[int, ...]) -> None:
    assert kept_for_rate(SOUND, rate) == Kept(n_ff=n_ff, n_kv=n_kv)


@pytest.mark.parametrize(
    ("rate", "kept"),
    [
        (0, Kept(n_ff=(96, 96, 96), n_kv=(2, 3, 2))),
        (0.12, Kept(n_ff=(64, 64, 64), n_kv=(2, 3, 2))),
        (0.15, Kept(n_ff=(64, 64, 64), n_kv=(2, 3, 1))),
        (0.16, Kept(n_ff=(64, 64, 64), n_kv=(2, 3, 1), head_dim=96)),
        (0.25, Kept(n_ff=(64, 0, 64), n_kv=(2, 0, 1), head_dim=96)),
        (0.35, Kept(n_ff=(32, 0, 64), n_kv=(2, 0, 1), head_dim=64)),
    ],
)
def test_steps_of_every_port(rate: float, kept: Kept) -> None:
    assert kept_for_rate(MIXED, rate) == kept


def parts(ladder: Ladder, kept: Kept) -> tuple[int, ...]:
    """All that a cut keeps, as numbers that may not grow."""
    return (*kept.n_ff, *kept.n_kv, (kept.head_dim or ladder.head_dim or 0))


rates = st.floats(0, MAX_RATE) | st.sampled_from([0.0, 0.05, 0.15, 0.25, MAX_RATE])


@given(ladders(), rates, rates)
def test_never_below_the_rate_within_one_step_and_nested(ladder: Ladder, one: float, other: float) -> None:
    found = []
    for rate in sorted((one, other)):
        if rate > ladder.removed_fraction(len(ladder.steps)):
            with pytest.raises(PlanError, match="is more than this package can be cut"):
                steps_for_rate(ladder, rate)
            return
        found.append(steps_for_rate(ladder, rate))
        assert ladder.removed_fraction(found[-1]) >= rate
        assert found[-1] == 0 or ladder.removed_fraction(found[-1] - 1) < rate
    low, high = found
    assert low <= high
    more, less = (parts(ladder, ladder.kept(n)) for n in found)
    assert all(a >= b for a, b in zip(more, less, strict=True))
    assert (more == less) == (low == high)
    assert ladder.damage(low) <= ladder.damage(high)


@given(ladders(), st.integers(1, 9), st.integers(0, 5), st.data())
def test_any_budget_takes_the_fewest_steps_that_fit(ladder: Ladder, weight: int, added: int, data: st.DataObject) -> None:
    """Sizes fall with every step, but for what the first may add."""

    def size(kept: Kept) -> int:
        ff, kv = weight * sum(kept.n_ff), sum(kept.n_kv) * (kept.head_dim or ladder.head_dim or 64) // 2
        return 100 + ff + kv + added * (kept != ladder.kept(0))

    every = [size(ladder.kept(n)) for n in range(len(ladder.steps) + 1)]
    budget = data.draw(st.integers(min(every) - 5, max(every) + 5))
    if budget < every[-1] and budget < every[0]:
        with pytest.raises(
            PlanError, match=rf"below the smallest cut of this package: {every[-1]:,} bytes, at rate 0\.\d\d\. Give at least"
        ):
            steps_for_bytes(ladder, size, budget)
    else:
        assert steps_for_bytes(ladder, size, budget) == next(n for n, nbytes in enumerate(every) if nbytes <= budget)
        assert size(kept_for_bytes(ladder, size, budget)) <= budget


@given(ladders())
def test_curves_are_the_steps_by_port_and_layer(ladder: Ladder) -> None:
    curve = ladder.curve()
    assert sum(line[-1].removed for line in curve.values()) == round(ladder.removed_fraction(len(ladder.steps)) * ladder.block_params)
    assert sum(line[-1].damage for line in curve.values()) == pytest.approx(ladder.damage(len(ladder.steps)))
    for (port, layer), line in curve.items():
        kept = [point.kept for point in line]
        assert kept == sorted(set(kept), reverse=True)
        assert [point.damage for point in line] == sorted(point.damage for point in line)
        if layer is None and port != "head":
            assert {"ffn": ladder.n_ff, "kv_group": ladder.n_kv}[port][0] == kept[0]


@given(ladders())
def test_any_ladder_there_and_back(ladder: Ladder) -> None:
    assert Ladder.from_json(json.loads(json.dumps(ladder.to_json()))) == ladder


def test_a_curve() -> None:
    assert MIXED.curve()["head", None] == (
        Point(kept=128, removed=0, damage=0.0),
        Point(kept=96, removed=40, damage=0.125),
        Point(kept=64, removed=70, damage=2.125),
    )
    assert MIXED.curve()["layer", 1] == (Point(kept=1, removed=0, damage=0.0), Point(kept=0, removed=90, damage=1.0))
    assert MIXED.damage(3) == 0.875


def test_sizes_of_rates() -> None:
    assert SOUND.sizes(bytes_of, (0.0, 0.15)) == (
        CutSize(rate=0.0, bytes=2100, removed_fraction=0.0),
        CutSize(rate=0.15, bytes=1460, removed_fraction=0.19),
    )
    with pytest.raises(PlanError, match=r"rate 0\.4 is outside"):
        SOUND.sizes(bytes_of, (0.0, 0.4))


@pytest.mark.parametrize("rate", [-0.01, 0.3501, 1.0, float("nan")])
def test_rates_out_of_range(rate: float) -> None:
    with pytest.raises(PlanError, match=r"rate \S+ is outside 0 to 0.35: a rate is the fraction of block parameters to remove"):
        steps_for_rate(SOUND, rate)


def test_a_ladder_that_ends_early_says_how_far_it_goes() -> None:
    with pytest.raises(PlanError, match=r"rate 0\.2 is more than this package can be cut: at most 0\.1900"):
        steps_for_rate(ladder(*SOUND.steps[:2]), 0.2)


def test_a_budget_below_the_smallest_cut_names_it() -> None:
    with pytest.raises(PlanError, match=r"budget of 839 bytes is below the smallest cut of this package: 840 bytes, at rate 0\.36"):
        kept_for_bytes(SOUND, bytes_of, 839)


def test_json_there_and_back() -> None:
    assert Ladder.from_json(json.loads(json.dumps(SOUND.to_json()))) == SOUND
    assert ladder().smallest == Kept(n_ff=(96, 64), n_kv=(2, 3))


@pytest.mark.parametrize(
    "bad",
    [
        step(0, "ffn", 64, 32, 10),
        step(0, "ffn", 96, 96, 10),
        step(0, "ffn", 96, -1, 10),
        step(0, "ffn", 96, 64, 0),
        step(0, "ffn", 96, 64, 10, float("nan")),
        step(0, "ffn", 96, 64, 10, -0.1),
    ],
)
def test_steps_must_follow_from_one_another(bad: Step) -> None:
    with pytest.raises(PackageError, match=r"ladder step 0: ffn of layer 0 goes from .*, but 96 are left"):
        ladder(bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((step(None, "ffn", 96, 64, 10),), r"step 0: ffn of all layers goes from 96 to 64, .*, but 64, 96 are left"),
        ((step(None, "kv_group", 2, 1, 10),), r"step 0: kv_group of all layers .* but 2, 3 are left"),
        ((step(None, "head", 128, 64, 10),), r"step 0: head of all layers .* but no dimensions are left"),
        ((step(0, "head", 128, 64, 10),), r"step 0: head of layer 0 .* but no dimensions are left"),
        ((step(None, "layer", 1, 0, 10),), r"step 0: port 'layer' cannot be cut in all layers"),
        ((step(0, "layer", 1, 0, 10),), r"step 0: layer 0 would lose the attention, but llama.cpp reads the head size in layer 0"),
        ((step(0, "kv_group", 2, 0, 10),), r"step 0: layer 0 would lose the attention"),
        ((step(1, "layer", 1, 0, 10),), r"step 0: layer 1 would lose the MLP, but llama.cpp picks its outputs in that of the last layer"),
        ((step(1, "kv_group", 3, 0, 9), step(1, "ffn", 64, 0, 10)), r"step 1: layer 1 would lose the MLP"),
        ((step(0, "ffn", 96, 0, 10),), r"step 0: layer 0 would keep attention without an MLP, but llama.cpp passes by a layer without one"),
    ],
)
def test_steps_that_lead_nowhere(bad: tuple[Step, ...], message: str) -> None:
    with pytest.raises(PackageError, match=f"ladder {message}.*Export the package again"):
        ladder(*bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (step(1, "layer", 1, 0, 10), r"step 7: layer of layer 1 goes from 1 to 0, .* but 0 are left"),
        (step(1, "ffn", 96, 64, 10), r"step 7: ffn of layer 1 .* but 0 are left"),
        (step(None, "ffn", 64, 32, 10), r"step 7: ffn of all layers .* but 0, 32, 64 are left"),
        (step(None, "head", 64, 0, 10), r"step 7: heads of 0 dimensions do not consist of rotated pairs"),
        (step(None, "head", 64, 33, 10), r"step 7: heads of 33 dimensions do not"),
        (step(None, "head", 128, 64, 10), r"step 7: head of all layers goes from 128 .* but 64 are left"),
        (step(1, "head", 128, 64, 10), r"step 7: head of layer 1 goes from 128 .* but 64 are left"),
    ],
)
def test_steps_after_others(bad: Step, message: str) -> None:
    with pytest.raises(PackageError, match=message):
        replace(MIXED, steps=(*MIXED.steps, bad))


def test_heads_of_one_layer() -> None:
    own = Ladder(
        n_ff=(8, 8, 8),
        n_kv=(1, 1, 1),
        head_dim=64,
        block_params=9,
        steps=(step(1, "head", 64, 56, 1), step(2, "head", 64, 48, 1), step(1, "head", 56, 32, 1)),
    )
    assert [own.kept(n).head_dims for n in range(4)] == [None, (64, 56, 64), (64, 56, 48), (64, 32, 48)]
    assert all(own.kept(n).head_dim is None for n in range(4))
    assert Ladder.from_json(own.to_json()) == own
    with pytest.raises(PackageError, match=r"step 1: head of all layers goes from 64 to 32, .* but 56, 64 are left"):
        replace(own, steps=(own.steps[0], step(None, "head", 64, 32, 1)))


def test_a_layer_without_attention_may_lose_its_mlp() -> None:
    whole = Ladder(n_ff=(8, 8, 8), n_kv=(1, 1, 1), block_params=9, steps=(step(1, "kv_group", 1, 0, 1), step(1, "ffn", 8, 0, 1)))
    assert whole.smallest == Kept(n_ff=(8, 0, 8), n_kv=(1, 0, 1))
    alike = Ladder(n_ff=(8, 8), n_kv=(1, 1), block_params=9, steps=())
    with pytest.raises(PackageError, match="step 0: all layers would lose the MLP"):
        replace(alike, steps=(step(None, "ffn", 8, 0, 1),))


@pytest.mark.parametrize("bad", [step(2, "ffn", 96, 64, 10), step(-1, "ffn", 96, 64, 10), step(0, "vo", 96, 64, 10)])
def test_a_step_names_a_layer_and_a_port_that_are_there(bad: Step) -> None:
    with pytest.raises(PackageError, match=r"ladder step 0: no port .* in layer"):
        ladder(bad)


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(PackageError, match=r"ladder: 1 MLP widths but 2 KV group counts"):
        Ladder(n_ff=(1,), n_kv=(1, 2), block_params=1, steps=())
    with pytest.raises(PackageError, match=r"the steps remove 1,001 of 1,000 parameters"):
        ladder(step(0, "ffn", 96, 64, 1001))
    sizes: dict[str, Any] = {"n_ff": (1, 1), "n_kv": (1, 1), "block_params": 1, "steps": (), "head_dim": 64}
    for bad in ({"n_ff": (1, -1)}, {"block_params": 0}, {"head_dim": 0}, {"n_ff": (), "n_kv": ()}):
        with pytest.raises(PackageError, match=r"ladder: MLP widths .*cannot be those of a model. Export the package again"):
            Ladder(**{**sizes, **bad})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"ladder version 2, expected 1"),
        ({"steps": [[0, "ffn", 96]]}, r"the ladder lacks or misspells"),
        ({"steps": [["x", "ffn", 96, 64, 1, 0.1]]}, r"the ladder lacks or misspells"),
        ({"steps": [[0.5, "ffn", 96, 64, 1, 0.1]]}, r"the ladder lacks or misspells"),
        ({"steps": [[0, ["ffn"], 96, 64, 1, 0.1]]}, r"no port \['ffn'\] in layer 0"),
        ({"n_ff": None}, r"the ladder lacks or misspells"),
        ({"head_dim": "64"}, r"the ladder lacks or misspells"),
    ],
)
def test_damaged_json(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PackageError, match=message):
        Ladder.from_json({**SOUND.to_json(), **change})
    missing = {key: value for key, value in SOUND.to_json().items() if key != "block_params"}
    with pytest.raises(PackageError, match="'block_params'"):
        Ladder.from_json(missing)
    with pytest.raises(PackageError, match=r"the ladder is \[\], expected an object"):
        Ladder.from_json([])  # type: ignore[arg-type]
