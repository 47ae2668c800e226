"""Codes moved within their blocks, against ggml's own packing and decoding."""

from __future__ import annotations

import numpy as np
import pytest

from edgeq import ggml
from edgeq.code_steps import decoded, gains, movable, moved, row_steps
from edgeq.errors import UnsupportedError
from edgeq.grids import GRIDS

NAMES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")


def rows(n_cols: int = 96, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((7, n_cols), dtype=np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_ggml(name: str) -> None:
    grid = GRIDS[name]
    packed = ggml.encode(rows(), grid)
    np.testing.assert_array_equal(decoded(packed, grid, row_steps(packed, grid)), grid.decode(packed, 96))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_added_changes_nothing(name: str) -> None:
    grid = GRIDS[name]
    packed = ggml.encode(rows(), grid)
    np.testing.assert_array_equal(moved(packed, grid, row_steps(packed, grid), np.zeros((7, 96), dtype=np.float32)), packed)


@pytest.mark.parametrize("name", NAMES)
def test_values_come_within_half_a_step_unless_their_range_ends(name: str) -> None:
    grid = GRIDS[name]
    packed = ggml.encode(rows(), grid)
    before, steps = grid.decode(packed, 96), row_steps(packed, grid)
    step = np.repeat(np.abs(steps), 32, axis=1)
    added = rows(seed=1) * step
    after = grid.decode(moved(packed, grid, steps, added.copy()), 96)
    off = np.abs(after - before - added) / step
    assert (off <= 0.5 + 1e-3).mean() > 0.9
    outside = off > 0.5 + 1e-3
    low, high = (edge(before.reshape(7, 3, 32), axis=2, keepdims=True).repeat(32, 2).reshape(7, 96) for edge in (np.min, np.max))
    assert ((after[outside] <= low[outside] + step[outside]) | (after[outside] >= high[outside] - step[outside])).all()
    huge = grid.decode(moved(packed, grid, steps, 1e6 * added), 96)
    assert np.isfinite(huge).all() and np.abs(huge).max() <= 2.2 * np.abs(before).max()


def test_blocks_of_zeros_stay() -> None:
    grid = GRIDS["Q4_0"]
    packed = ggml.encode(np.zeros((2, 64), dtype=np.float32), grid)
    np.testing.assert_array_equal(grid.decode(moved(packed, grid, row_steps(packed, grid), rows(64)[:2].copy()), 64), 0)


@pytest.mark.parametrize("size", [0.2, 0.3, 0.5, 0.8, 1.5])
def test_rounding_passes_on_what_gains_overstate(size: float) -> None:
    moves = np.random.default_rng(2).standard_normal(200_000) * size
    gain = float(gains(np.array([size], dtype=np.float32))[0])
    passed = (moves * np.rint(gain * moves)).sum() / (moves**2).sum()
    assert passed == pytest.approx(1, abs=0.05)
    assert abs(passed - 1) <= abs((moves * np.rint(moves)).sum() / (moves**2).sum() - 1) + 0.02


def test_gains_are_one_for_large_moves_and_limited_for_small_ones() -> None:
    np.testing.assert_allclose(gains(np.array([1e-9, 0.01, 1.0, 50.0], dtype=np.float32)), [2, 2, 1, 1], atol=0.05)


def test_other_grids_are_refused() -> None:
    assert not movable(GRIDS["Q8_0"])
    with pytest.raises(UnsupportedError, match=r"codes of Q4_K cannot be moved in place; known: Q4_0, Q4_1"):
        row_steps(np.zeros((1, 144), dtype=np.uint8), GRIDS["Q4_K"])
