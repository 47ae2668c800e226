"""Compensation from a factor model against ordinary least squares on the covariance that the model describes."""

from __future__ import annotations

import numpy as np
import pytest

from edgeq.compensation import Floats, HiddenModel, compensate, regression
from edgeq.errors import ShapeError

N_FF, N_EMBD = 24, 7


def random_model(rank: int, seed: int = 0) -> HiddenModel:
    rng = np.random.default_rng(seed)
    return HiddenModel(
        mean=rng.standard_normal(N_FF, dtype=np.float32),
        factors=rng.standard_normal((N_FF, rank), dtype=np.float32),
        noise=rng.uniform(0.2, 1.5, N_FF).astype(np.float32),
    )


def down(seed: int = 1) -> Floats:
    return np.random.default_rng(seed).standard_normal((N_EMBD, N_FF), dtype=np.float32)


@pytest.mark.parametrize("kept", [1, 5, 20, 23])
def test_equals_least_squares_with_an_intercept(kept: int) -> None:
    model, weight = random_model(rank=4), down()
    covariance = model.factors @ model.factors.T + np.diag(model.noise)
    covariance = covariance.astype(np.float64)
    slope = covariance[kept:, :kept] @ np.linalg.inv(covariance[:kept, :kept])
    columns, bias = compensate(weight, model, kept)
    np.testing.assert_allclose(columns, weight[:, :kept] + weight[:, kept:] @ slope, atol=2e-5)
    np.testing.assert_allclose(bias, weight[:, kept:] @ (model.mean[kept:] - slope @ model.mean[:kept]), atol=2e-5)
    assert np.abs(columns - weight[:, :kept]).max() > 0.1  # the slope matters here
    assert columns.dtype == bias.dtype == np.float32


def test_without_factors_it_is_the_mean_alone() -> None:
    model, weight = random_model(rank=0), down()
    columns, bias = compensate(weight, model, 10)
    np.testing.assert_array_equal(columns, weight[:, :10])
    np.testing.assert_allclose(bias, weight[:, 10:] @ model.mean[10:], rtol=1e-6)


def test_the_ends() -> None:
    model, weight = random_model(rank=3), down()
    columns, bias = compensate(weight, model, N_FF)
    np.testing.assert_array_equal(columns, weight)
    np.testing.assert_array_equal(bias, np.zeros(N_EMBD))
    columns, bias = compensate(weight, model, 0)
    assert columns.shape == (N_EMBD, 0)
    np.testing.assert_allclose(bias, weight @ model.mean, rtol=1e-5, atol=1e-5)


def test_a_channel_that_never_fires_says_nothing() -> None:
    model = random_model(rank=3)
    model.mean[2], model.factors[2], model.noise[2] = 0, 0, 0
    columns, bias = compensate(down(), model, 10)
    np.testing.assert_array_equal(columns[:, 2], down()[:, 2])
    assert np.isfinite(columns).all() and np.isfinite(bias).all()


@pytest.mark.parametrize(("width", "kept"), [(N_FF - 1, 3), (N_FF, -1), (N_FF, N_FF + 1)])
def test_sizes_that_do_not_fit(width: int, kept: int) -> None:
    with pytest.raises(ShapeError, match=rf"down_proj of {width} columns, cut to {kept}: the hidden model describes {N_FF}"):
        compensate(down()[:, :width], random_model(rank=2), kept)


def test_parts_of_a_model_that_do_not_fit() -> None:
    with pytest.raises(ShapeError, match=r"mean \[3\], factors \[4, 2\] and noise \[3\] do not describe the same channels"):
        HiddenModel(mean=np.zeros(3, np.float32), factors=np.zeros((4, 2), np.float32), noise=np.zeros(3, np.float32))


@pytest.mark.parametrize("kept", [1, 10, 23])
def test_without_a_bias_it_is_least_squares_through_the_origin(kept: int) -> None:
    model, weight = random_model(rank=4), down()
    moments = model.factors @ model.factors.T + np.diag(model.noise) + np.outer(model.mean, model.mean)
    slope = moments[kept:, :kept].astype(np.float64) @ np.linalg.inv(moments[:kept, :kept].astype(np.float64))
    found = regression(model, kept, intercept=False)
    np.testing.assert_allclose(found.columns(weight), weight[:, :kept] + weight[:, kept:] @ slope, atol=5e-5)
    assert not found.intercept.any()
    assert not found.bias(weight[:, kept:]).any()
    assert np.abs(found.columns(weight) - compensate(weight, model, kept)[0]).max() > 0.05  # the mean matters here


@pytest.mark.parametrize("kept", [-1, N_FF + 1])
def test_a_regression_stays_within_its_model(kept: int) -> None:
    with pytest.raises(ShapeError, match=rf"a cut to {kept} channels: the hidden model describes {N_FF}"):
        regression(random_model(rank=2), kept)
