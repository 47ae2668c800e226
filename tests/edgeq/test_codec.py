"""The codec of few bits: Max's published levels, what it must give back, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgeq import codec
from edgeq.codec import BITS, coded_bytes, decode, encode, levels, transposed
from edgeq.errors import PlanError, SourceError

# Mean squared error on a standard normal distribution: Max 1960, "Quantizing for minimum distortion", table I (1, 2 and 4 bits).
DISTORTION = {1: 0.3634, 2: 0.1175, 4: 0.009497}
values = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=2, max_side=40), elements=st.floats(-1000, 1000, width=32))


def test_levels_are_maxs() -> None:
    assert levels(1).tolist() == pytest.approx([-math.sqrt(2 / math.pi), math.sqrt(2 / math.pi)], abs=1e-15)
    assert levels(2)[2:].tolist() == pytest.approx([0.4528, 1.510], abs=5e-4)
    assert levels(4)[8:].tolist() == pytest.approx([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], abs=6e-4)


@pytest.mark.parametrize("bits", BITS)
def test_every_level_is_the_mean_of_what_is_nearest_to_it(bits: int) -> None:
    """Lloyd's condition, with the density summed on a fine grid; and the error of a normal tensor is the published one."""
    table = levels(bits)
    assert len(table) == 2**bits
    np.testing.assert_allclose(table, -table[::-1], atol=1e-12)
    x = np.linspace(-9, 9, 1_800_001)
    density = np.exp(-(x**2) / 2)
    nearest = np.searchsorted((table[1:] + table[:-1]) / 2, x)
    mass, moment = (np.bincount(nearest, weights=weights) for weights in (density, density * x))
    np.testing.assert_allclose(moment / mass, table, atol=2e-4)
    if bits in DISTORTION:
        error = float(np.sum(density * (x - table[nearest]) ** 2) / density.sum())
        assert error == pytest.approx(DISTORTION[bits], rel=2e-3)


def test_one_bit_is_mean_and_sqrt_two_over_pi_deviations() -> None:
    x = np.random.default_rng(0).standard_normal((64, 30)).astype(np.float32) * 0.02 + 0.5
    coded = encode(x, 1)
    step = math.sqrt(2 / math.pi) * x.std()
    assert np.unique(decode(coded)).tolist() == pytest.approx([x.mean() - step, x.mean() + step], rel=1e-6)
    assert coded.codes.nbytes == 64 * 30 // 8


@settings(max_examples=60, deadline=None)
@given(x=values, bits=st.sampled_from(BITS))
def test_decoding_and_coding_again_changes_nothing(x: npt.NDArray[np.float32], bits: int) -> None:
    coded = encode(x, bits)
    once = decode(coded)
    again = encode(once, bits, mean=coded.mean, deviation=coded.deviation)
    # A deviation below the spacing of floats at the mean leaves levels that are one number.
    if coded.deviation > 1e-5 * abs(coded.mean) or bits < 8:
        np.testing.assert_array_equal(decode(again), once)
    assert once.shape == x.shape
    assert coded.codes.nbytes == coded_bytes(x.size, bits)
    if x.ndim == 2:
        np.testing.assert_array_equal(decode(transposed(coded)), once.T)


@settings(max_examples=40, deadline=None)
@given(x=values, bits=st.sampled_from(BITS))
def test_every_value_goes_to_the_nearest_level(x: npt.NDArray[np.float32], bits: int) -> None:
    coded = encode(x, bits)
    table = coded.mean + coded.deviation * levels(bits)
    best = np.abs(x.astype(np.float64)[..., None] - table).min(axis=-1)
    assert (np.abs(decode(coded).astype(np.float64) - x) <= best + 1e-6 * (1 + np.abs(x).max())).all()


@settings(max_examples=40)
@given(codes=st.lists(st.integers(0, 255), min_size=1, max_size=70), bits=st.sampled_from(BITS))
def test_packing_is_undone(codes: list[int], bits: int) -> None:
    array = (np.array(codes) % (1 << bits)).astype(np.uint8)
    packed = codec._pack(array, bits)
    assert len(packed) == coded_bytes(len(array), bits)
    np.testing.assert_array_equal(codec._unpack(packed, bits, len(array)), array)


def test_a_constant_tensor_stays_itself() -> None:
    assert (decode(encode(np.full((3, 5), 0.25, np.float32), 2)) == 0.25).all()


def test_what_cannot_be_coded_is_refused() -> None:
    x = np.ones((2, 3), np.float32)
    with pytest.raises(PlanError, match=r"3 bits per value are not supported; choose one of 1, 2, 4, 8"):
        encode(x, 3)
    x[0, 0] = np.nan
    with pytest.raises(SourceError, match=r"values that are not finite cannot be coded"):
        encode(x, 4)
    good = encode(np.ones((2, 3), np.float32), 4)
    changes: list[dict[str, Any]] = [{"codes": good.codes[:1]}, {"deviation": -1.0}, {"mean": math.nan}, {"shape": (7, 3)}]
    for change in changes:
        with pytest.raises(SourceError, match=r"bytes of 4-bit codes, mean .* cannot be those of a tensor of shape"):
            dataclasses.replace(good, **change)
