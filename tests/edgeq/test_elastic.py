"""The ladder: any rate and any budget takes a prefix of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.elastic import MAX_RATE, Kept, Ladder, Step, kept_for_bytes, kept_for_rate, steps_for_bytes, steps_for_rate
from edgeq.errors import PackageError, PlanError


def step(layer: int, port: Any, start: int, stop: int, removed: int, damage: float = 0.1) -> Step:
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


@given(st.floats(0, MAX_RATE), st.floats(0, MAX_RATE))
def test_never_below_the_rate_within_one_step_and_nested(one: float, other: float) -> None:
    low, high = sorted((one, other))
    n_steps = steps_for_rate(SOUND, low)
    assert SOUND.removed_fraction(n_steps) >= low
    assert n_steps == 0 or SOUND.removed_fraction(n_steps - 1) < low
    more, less = kept_for_rate(SOUND, low), kept_for_rate(SOUND, high)
    assert all(a >= b for a, b in zip(more.n_ff + more.n_kv, less.n_ff + less.n_kv, strict=True))


@given(st.integers(bytes_of(SOUND.smallest), 3000))
def test_a_budget_takes_the_fewest_steps_that_fit(budget: int) -> None:
    n_steps = steps_for_bytes(SOUND, bytes_of, budget)
    assert bytes_of(kept_for_bytes(SOUND, bytes_of, budget)) <= budget
    assert n_steps == 0 or bytes_of(SOUND.kept(n_steps - 1)) > budget


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
    ],
)
def test_steps_must_follow_from_one_another(bad: Step) -> None:
    with pytest.raises(PackageError, match=r"ladder step 0: ffn of layer 0 goes from .*, but 96 are left"):
        ladder(bad)


@pytest.mark.parametrize("bad", [step(2, "ffn", 96, 64, 10), step(-1, "ffn", 96, 64, 10), step(0, "vo", 96, 64, 10)])
def test_a_step_names_a_layer_and_a_port_that_are_there(bad: Step) -> None:
    with pytest.raises(PackageError, match=r"ladder step 0: no port .* in layer"):
        ladder(bad)


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(PackageError, match=r"ladder: 1 MLP widths but 2 KV group counts"):
        Ladder(n_ff=(1,), n_kv=(1, 2), block_params=1, steps=())
    with pytest.raises(PackageError, match=r"the steps remove 1,001 of 1,000 parameters"):
        ladder(step(0, "ffn", 96, 64, 1001))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"ladder version 2, expected 1"),
        ({"steps": [[0, "ffn", 96]]}, r"the ladder lacks or misspells"),
        ({"steps": [["x", "ffn", 96, 64, 1, 0.1]]}, r"the ladder lacks or misspells"),
        ({"n_ff": None}, r"the ladder lacks or misspells"),
    ],
)
def test_damaged_json(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PackageError, match=message):
        Ladder.from_json({**SOUND.to_json(), **change})
    missing = {key: value for key, value in SOUND.to_json().items() if key != "block_params"}
    with pytest.raises(PackageError, match="'block_params'"):
        Ladder.from_json(missing)
