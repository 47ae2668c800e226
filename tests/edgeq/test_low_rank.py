"""Low-rank factors against plain singular value decompositions of the whole change, which the code itself never makes of factors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq import low_rank
from edgeq.deltas.delta import Array, Factors
from edgeq.errors import PlanError, ShapeError, SourceError
from edgeq.low_rank import approximate, decompose, decompose_matrix, distance, split, stacked


def factors(n_out: int, n_in: int, rank: int, seed: int = 0) -> Factors:
    rng = np.random.default_rng(seed)
    strengths = 2.0 ** -np.arange(rank)
    return Factors(a=rng.standard_normal((rank, n_in)) * strengths[:, None], b=rng.standard_normal((n_out, rank)))


def moments(n_in: int, kind: str) -> Array | None:
    rng = np.random.default_rng(9)
    if kind == "none":
        return None
    x = rng.standard_normal((3 * n_in, n_in)) * np.exp(rng.standard_normal(n_in))
    return np.mean(x**2, axis=0) if kind == "diagonal" else x.T @ x / len(x)


def energy(change: Array, second: Array | None) -> float:
    """E |D x|^2, spelled out."""
    if second is None:
        return float(np.sum(change**2))
    full = np.diag(second) if second.ndim == 1 else second
    return float(np.trace(change @ full @ change.T))


sizes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 15), st.integers(0, 5))
kinds = st.sampled_from(["none", "diagonal", "full"])


@settings(max_examples=80, deadline=None)
@given(size=sizes, kind=kinds)
def test_all_directions_are_the_change_itself(size: tuple[int, int, int, int], kind: str) -> None:
    change = factors(*size)
    spectrum = decompose(change, moments(size[1], kind))
    whole = spectrum.truncated(len(spectrum.values))
    assert whole.rank == min(size[:3])
    np.testing.assert_allclose(whole.product(), change.product(), atol=1e-9 * (1 + np.abs(change.product()).max()))
    assert distance(change, whole, moments(size[1], kind)) <= 1e-16 * spectrum.total
    assert spectrum.lost(len(spectrum.values)) == 0


@settings(max_examples=80, deadline=None)
@given(size=sizes, kind=kinds, data=st.data())
def test_the_error_is_the_tail_of_singular_values(size: tuple[int, int, int, int], kind: str, data: Any) -> None:
    change, second = factors(*size), moments(size[1], kind)
    spectrum = decompose(change, second)
    rank = data.draw(st.integers(1, len(spectrum.values)))
    left = spectrum.truncated(rank)
    tail = float(np.sum(spectrum.values[rank:] ** 2))
    assert energy(change.product() - left.product(), second) == pytest.approx(tail, rel=1e-6, abs=1e-10 * spectrum.total)
    assert spectrum.lost(rank) * spectrum.total == pytest.approx(tail)
    assert distance(change, left, second) == pytest.approx(tail, rel=1e-6, abs=1e-10 * spectrum.total)


@pytest.mark.parametrize("kind", ["none", "diagonal", "full"])
def test_no_change_of_that_rank_is_nearer(kind: str) -> None:
    """Against the textbook solution, and against the plain one where the metric matters."""
    change, second = factors(20, 14, 9), moments(14, kind)
    whole = change.product()
    root = np.eye(14) if second is None else np.linalg.cholesky(np.diag(second) if second.ndim == 1 else second)
    u, s, v = np.linalg.svd(whole @ root, full_matrices=False)
    best = (u[:, :3] * s[:3]) @ v[:3] @ np.linalg.inv(root)
    np.testing.assert_allclose(approximate(change, rank=3, moments=second).factors.product(), best, atol=1e-9)
    np.testing.assert_allclose(approximate(whole, rank=3, moments=second).factors.product(), best, atol=1e-9)
    plain = approximate(change, rank=3).factors.product()
    ours = approximate(change, rank=3, moments=second).factors.product()
    if kind != "none":
        assert energy(whole - ours, second) < 0.99 * energy(whole - plain, second)


def test_energy_takes_the_fewest_directions_that_keep_it() -> None:
    change = factors(30, 20, 8)
    values = np.linalg.svd(change.product(), compute_uv=False)[:8]
    kept = np.cumsum(values**2) / np.sum(values**2)
    for wanted in (0.5, 0.9, 0.99, 1 - 1e-9, 1.0):
        found = approximate(change, energy=wanted)
        expected = 8 if wanted == 1 else int(np.argmax(kept >= wanted)) + 1
        assert found.factors.rank == expected
        assert found.lost == pytest.approx(1 - kept[expected - 1], abs=1e-12)


def test_a_large_dense_change_is_looked_at_through_a_sketch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slowly falling singular values, as full-rank adapters have: within a thousandth of the best, and the loss stated is the true one."""
    rng = np.random.default_rng(2)
    u, v = np.linalg.qr(rng.standard_normal((200, 150)))[0], np.linalg.qr(rng.standard_normal((150, 150)))[0]
    values = 0.97 ** np.arange(150)
    whole = (u * values) @ v
    monkeypatch.setattr(low_rank, "EXACT_SIZE", 16)
    monkeypatch.setattr(low_rank, "_FIRST_WIDTH", 8)
    for wanted in ({"rank": 20}, {"energy": 0.9}):
        found = approximate(whole, **wanted)
        tail = float(np.sum(values[found.factors.rank :] ** 2) / np.sum(values**2))
        true = float(np.sum((whole - found.factors.product()) ** 2) / np.sum(values**2))
        assert found.lost == pytest.approx(true, rel=1e-6)
        assert tail <= found.lost < 1.001 * tail + 1e-9
        again = approximate(whole, **wanted)
        assert again.factors.a.tobytes() == found.factors.a.tobytes()
    assert approximate(whole, energy=0.9).factors.rank == int(np.argmax(np.cumsum(values**2) / np.sum(values**2) >= 0.9)) + 1
    assert decompose_matrix(whole).rest == 0


def test_nothing_to_keep_is_kept_as_nothing() -> None:
    none = Factors(a=np.zeros((3, 5)), b=np.zeros((4, 3)))
    assert approximate(none, energy=0.9).factors.rank == 1
    assert approximate(np.zeros((4, 5)), rank=2).lost == 0


def test_inputs_that_were_never_seen_still_count_a_little() -> None:
    change, second = factors(6, 5, 5), np.array([1.0, 2.0, 0.0, 1.0, 0.5])
    found = decompose(change, second)
    np.testing.assert_allclose(found.truncated(5).product(), change.product(), atol=1e-9)
    assert decompose(change, np.zeros(5)).total == pytest.approx(decompose(change).total)


def test_requests_that_make_no_sense_are_refused() -> None:
    change = factors(6, 5, 3)
    with pytest.raises(PlanError, match=r"give either a rank or an energy"):
        approximate(change)
    with pytest.raises(PlanError, match=r"rank 0 keeps nothing\. Give 1 or more\."):
        approximate(change, rank=0)
    for wrong in (0.0, 1.5, -1.0, float("nan")):
        with pytest.raises(PlanError, match=r"energy .* is no fraction to keep"):
            approximate(change, energy=wrong)
    with pytest.raises(ShapeError, match=r"second moments have shape \[4\], expected \[5\] or \[5, 5\] for 5 inputs"):
        approximate(change, rank=1, moments=np.ones(4))
    for bad in (np.array([1.0, np.nan, 1, 1, 1]), np.array([1.0, -1, 1, 1, 1]), np.full((5, 5), np.inf)):
        with pytest.raises(SourceError, match=r"second moments of inputs must be finite and not negative"):
            approximate(change, rank=1, moments=bad)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.integers(1, 6), min_size=1, max_size=4), data=st.data())
def test_stacked_factors_are_the_stacked_changes(rows: list[int], data: Any) -> None:
    shared = factors(sum(rows), 7, 2, seed=1)
    parts: list[tuple[int, Factors | None]] = []
    for i, (n, part) in enumerate(zip(rows, split(shared, rows), strict=True)):
        parts.append((n, data.draw(st.sampled_from([part, factors(n, 7, 3, seed=i), None]))))
    if all(part is None for _, part in parts):
        return
    expected = np.concatenate([np.zeros((n, 7)) if part is None else part.product() for n, part in parts])
    found = stacked(parts)
    np.testing.assert_allclose(found.product(), expected, atol=1e-12)
    assert found.rank == sum({id(part.a): part.rank for _, part in parts if part is not None}.values())


def test_parts_of_different_matrices_do_not_stack() -> None:
    with pytest.raises(ShapeError, match=r"factors with \[5, 7\] inputs cannot be those of one matrix"):
        stacked([(4, factors(4, 5, 1)), (4, factors(4, 7, 1))])
    with pytest.raises(ShapeError, match=r"factors with 4 outputs cannot be those of a matrix of 3 rows"):
        stacked([(3, factors(4, 5, 1))])
