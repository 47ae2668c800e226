"""Squeezing: exact where nothing is asked for, as good as the best truncation where it is, and never above a budget."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.deltas.delta import Factors
from edgeq.errors import PlanError
from edgeq.low_rank import decompose
from edgeq.squeeze import cosine_transform, encode_factors, factor_bytes, ranks_for_budget, squeeze

SHAPES = {"q": (40, 24), "down": (24, 60), "up": (60, 24)}


def modules(rank: int = 8, *, seed: int = 0, decay: float = 0.7) -> dict[str, Factors]:
    rng = np.random.default_rng(seed)
    return {
        name: Factors(
            a=rng.standard_normal((rank, n_in)) * decay ** np.arange(rank)[:, None], b=rng.standard_normal((n_out, rank)) * (i + 1)
        )
        for i, (name, (n_out, n_in)) in enumerate(SHAPES.items())
    }


def relative(found: Factors, whole: Factors) -> float:
    return float(np.sum((found.product() - whole.product()) ** 2) / np.sum(whole.product() ** 2))


def test_the_whole_rank_is_exact_and_doing_it_twice_changes_nothing() -> None:
    whole = modules()
    once = squeeze(whole, rank=8)
    for name, module in once.items():
        assert module.factors is not None
        assert relative(module.factors, whole[name]) < 1e-13  # float32
        assert module.lost < 1e-13
        assert (module.before, module.rank) == (8, 8)
    three = squeeze(whole, rank=3)
    again = squeeze({name: module.factors for name, module in three.items() if module.factors is not None}, rank=3)
    for name, module in again.items():
        assert module.factors is not None and three[name].factors is not None
        np.testing.assert_allclose(module.factors.product(), three[name].factors.product(), atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 12), seed=st.integers(0, 3))
def test_what_is_lost_is_the_tail_of_singular_values(rank: int, seed: int) -> None:
    whole = modules(seed=seed)
    for name, module in squeeze(whole, rank=rank).items():
        values = np.linalg.svd(whole[name].product(), compute_uv=False) ** 2
        assert module.factors is not None
        assert module.rank == min(rank, 8)
        tail = values[module.rank :].sum() / values.sum()
        assert module.lost == pytest.approx(tail, rel=1e-4, abs=1e-12)
        assert relative(module.factors, whole[name]) == pytest.approx(tail, rel=1e-4, abs=1e-12)


def test_energy_gives_every_module_the_rank_that_peft_would() -> None:
    import torch
    from peft.tuners.lora.conversion import _find_cutoff_index

    whole = modules()
    for energy in (0.5, 0.9, 0.99):
        for name, module in squeeze(whole, energy=energy).items():
            values = torch.linalg.svdvals(torch.from_numpy(whole[name].product()))
            assert module.rank == _find_cutoff_index(values, energy)
            assert module.lost <= 1 - energy + 1e-9


@settings(max_examples=60, deadline=None)
@given(budget=st.integers(400, 12000), bits=st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_a_budget_is_kept_and_nothing_better_fits_into_it_for_equal_costs(budget: int, bits: int) -> None:
    spectra = {name: decompose(factors) for name, factors in modules(5).items()}
    try:
        ranks = ranks_for_budget(spectra, budget, bits)
    except PlanError as err:
        assert f"a budget of {budget:,} bytes keeps nothing" in str(err)
        assert budget < max(factor_bytes(shape, 1, bits) for shape in SHAPES.values())
        return
    used = sum(factor_bytes(SHAPES[name], rank, bits) for name, rank in ranks.items() if rank)
    assert used <= budget
    # One direction more would not fit in any module that has one left.
    for name, rank in ranks.items():
        if rank < 5:
            more = factor_bytes(SHAPES[name], rank + 1, bits) - (factor_bytes(SHAPES[name], rank, bits) if rank else 0)
            assert used + more > budget


def test_for_the_bytes_that_it_takes_no_other_choice_of_ranks_is_better() -> None:
    spectra = {name: decompose(factors) for name, factors in modules(4).items()}

    def kept(ranks: dict[str, int]) -> float:
        return sum(float(np.sum(spectra[name].values[:rank] ** 2)) for name, rank in ranks.items())

    def size(ranks: dict[str, int]) -> int:
        return sum(factor_bytes(SHAPES[name], rank, 32) for name, rank in ranks.items())

    every = [dict(zip(SHAPES, ranks, strict=True)) for ranks in itertools.product(range(5), repeat=3)]
    exact = 0
    for budget in range(300, 4000, 37):
        ours = ranks_for_budget(spectra, budget, 32)
        assert size(ours) <= budget
        best = max(kept(other) for other in every if size(other) <= size(ours))
        exact += kept(ours) == pytest.approx(best)
        # what greed can miss is one direction at the end
        smaller = budget - max(4 * sum(s) for s in SHAPES.values())
        assert kept(ours) >= max((kept(other) for other in every if size(other) <= smaller), default=0.0) - 1e-9
    assert exact >= 90


def test_a_module_may_be_left_with_nothing() -> None:
    whole = modules()
    whole["q"] = Factors(a=whole["q"].a * 1e-6, b=whole["q"].b)
    found = squeeze(whole, budget=2700)  # 8 directions of 336 bytes
    assert found["q"].factors is None
    assert (found["q"].rank, found["q"].lost, found["q"].nbytes) == (0, 1.0, 0)
    assert sum(module.nbytes for module in found.values()) == 2688


def test_moments_decide_what_counts() -> None:
    whole = modules(decay=1.0)
    second = {"q": np.where(np.arange(24) < 4, 100.0, 0.01)}
    plain, aware = squeeze(whole, rank=3), squeeze(whole, rank=3, moments=second)

    def error(found: Any) -> float:
        return float(np.sum((whole["q"].product() - found["q"].factors.product()) ** 2 * second["q"]))

    assert error(aware) < 0.5 * error(plain)
    assert aware["q"].lost == pytest.approx(error(aware) / np.sum(whole["q"].product() ** 2 * second["q"]), rel=1e-4)


def test_fewer_bits_lose_more_and_cost_less() -> None:
    """Directions of very different strength are spread over each other first: coded as they are, 4 bits would lose a fifth here."""
    whole = modules(16, decay=0.5)
    lost, sizes = [], []
    for bits in (32, 16, 8, 4, 2, 1):
        found = squeeze(whole, bits=bits)["down"]
        assert found.factors is not None
        assert relative(found.factors, whole["down"]) == pytest.approx(found.lost, rel=1e-4, abs=1e-12)
        lost.append(found.lost)
        sizes.append(found.nbytes)
        assert (found.coded is None) == (bits >= 16)
    assert lost == sorted(lost)
    assert lost[2] < 1e-3 and lost[3] < 0.03 and lost[5] < 0.7
    assert sizes == [4 * 16 * 84, 2 * 16 * 84, 16 * 84 + 16, 8 * 84 + 16, 4 * 84 + 16, 2 * 84 + 16]


def test_codes_are_those_of_the_factors_that_come_back() -> None:
    from edgeq.codec import decode

    found = squeeze(modules(), rank=4, bits=2)["q"]
    assert found.coded is not None and found.factors is not None
    np.testing.assert_array_equal(decode(found.coded[0]), found.factors.a)
    np.testing.assert_array_equal(decode(found.coded[1]), found.factors.b)
    high = Factors(a=np.random.default_rng(0).standard_normal((50, 6)), b=np.random.default_rng(1).standard_normal((7, 50)))
    assert [half.shape for half in encode_factors(high, 8)] == [(6, 6), (7, 6)]


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_the_cosine_transform_is_orthogonal(n: int) -> None:
    turn = cosine_transform(n)
    np.testing.assert_allclose(turn @ turn.T, np.eye(n), atol=1e-14)


def test_requests_that_make_no_sense_are_refused() -> None:
    whole = modules()
    with pytest.raises(PlanError, match=r"give one of rank, energy and budget"):
        squeeze(whole, rank=2, budget=100)
    with pytest.raises(PlanError, match=r"3 bits per value are not supported; choose one of 1, 2, 4, 8, 16, 32"):
        squeeze(whole, bits=3)
    with pytest.raises(PlanError, match=r"rank 0 keeps nothing"):
        squeeze(whole, rank=0)
    with pytest.raises(
        PlanError, match=r"a budget of 10 bytes keeps nothing: one direction of the smallest module takes 256\. Give more\."
    ):
        squeeze(whole, budget=10)
    huge = {"q": Factors(a=np.full((1, 4), 1e6), b=np.full((5, 1), 1e6))}
    with pytest.raises(PlanError, match=r"q: factors are beyond the largest 16-bit number\. Use 32 bits\."):
        squeeze(huge, bits=16)
