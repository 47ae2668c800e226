"""Statistics of repeats, against what they must be by definition and against a simulation of their coverage."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.runtime.bench_stats import interval, median, overlap, paired_ratio, percentile_interval, pooled_percentile, spread

FIGURES = st.lists(st.floats(0.01, 1e6), min_size=3, max_size=9)


def test_small_samples_have_no_interval() -> None:
    assert median([]) is None and spread([1.0]) is None
    assert interval([1.0, 2.0]) is None and percentile_interval([[1.0], [2.0]], 50) is None
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == 2.0


@given(FIGURES)
def test_an_interval_holds_the_median_and_lies_within_the_samples(samples: list[float]) -> None:
    found = interval(samples)
    assert found is not None
    middle = median(samples)
    assert middle is not None
    assert min(samples) <= found[0] <= middle <= found[1] <= max(samples)
    assert interval(samples) == found, "the same samples give the same interval"


def test_the_interval_is_the_bootstrap_of_the_median() -> None:
    """All 3^3 resamples of three values: medians are 1 in 7, 2 in 13 and 10 in 7 of 27, so that the middle 95 % is the whole range."""
    samples = [1.0, 2.0, 10.0]
    exact = [float(np.median(drawn)) for drawn in itertools.product(samples, repeat=3)]
    assert [exact.count(value) for value in samples] == [7, 13, 7]
    assert interval(samples) == (1.0, 10.0)
    many = [float(value) for value in range(1, 41)]
    low, high = interval(many) or (0.0, 0.0)
    assert 12 < low < 18 and 23 < high < 29, "ranks around the middle: 20.5 +- 1.96 sqrt(40) / 2"


def test_intervals_of_the_same_thing_overlap_and_cover_it() -> None:
    """Nine repeats of a skewed time, 300 runs: coverage of the true median, and of one run's interval by another's."""
    generator = np.random.default_rng(0)
    runs = [interval((1 + generator.exponential(0.1, 9)).tolist()) for _ in range(300)]
    known = [run for run in runs if run is not None]
    truth = 1 + 0.1 * np.log(2)
    covered = np.mean([low <= truth <= high for low, high in known])
    assert covered > 0.90
    together = np.mean([overlap(a, b) for a, b in zip(known[::2], known[1::2], strict=True)])
    assert together > 0.98
    assert not overlap((1.0, 2.0), (2.1, 3.0)) and overlap((1.0, 2.0), (2.0, 3.0))


def test_percentiles_pool_all_steps_and_draw_whole_repeats() -> None:
    calm, stalled = [1.0] * 99, [1.0] * 98 + [50.0]  # 99 steps each
    groups = [calm, calm, stalled]
    assert pooled_percentile(groups, 50) == 1.0
    assert pooled_percentile([stalled], 100) == 50.0
    low, high = percentile_interval(groups, 100) or (0.0, 0.0)
    assert (low, high) == (1.0, 50.0), "a stall in one repeat is there in some resamples and not in others"


def test_ratios_are_those_of_pairs() -> None:
    """Every second round is three times as slow for both: medians of each side move, the ratio of pairs does not."""
    base = [1.0, 3.0, 1.1, 3.3, 0.9]
    mine = [value * 1.2 for value in base]
    found = paired_ratio(mine, base)
    assert found is not None and found.low is not None and found.high is not None
    assert found.ratio == pytest.approx(1.2) and found.low == pytest.approx(1.2) and found.high == pytest.approx(1.2)
    assert found.to_json() == {"ratio": found.ratio, "low": found.low, "high": found.high}


def test_pairs_without_a_value_do_not_count() -> None:
    assert paired_ratio([None, 2.0], [1.0, None]) is None
    found = paired_ratio([None, 2.0, 4.0], [1.0, 1.0, 0.0])
    assert found is not None and (found.ratio, found.low, found.high) == (2.0, None, None)
