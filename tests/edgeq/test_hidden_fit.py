"""Fitting factor models to moments, and holding them back by the moments of other text."""

from __future__ import annotations

import numpy as np
import torch

from edgeq.compensation import HiddenModel, compensate
from edgeq.hidden_fit import held_back_noise, hidden_model
from edgeq.sensitivity import Moments


def test_factor_model_finds_the_covariance_it_was_made_from() -> None:
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((80, 3)) * rng.uniform(0.1, 10, (80, 1))  # channels of very different size
    noise = rng.uniform(0.5, 1, 80) * np.square(factors).sum(1)
    mean = rng.standard_normal(80)
    covariance = factors @ factors.T + np.diag(noise)
    found = hidden_model(torch.tensor(mean), torch.tensor(covariance + np.outer(mean, mean)), rank=3)
    scale = np.sqrt(np.diag(covariance))
    error = (found.factors @ found.factors.T - factors @ factors.T) / np.outer(scale, scale)
    assert np.abs(error).max() < 0.02
    np.testing.assert_allclose(found.noise, noise, rtol=0.1)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-6)


def test_channels_that_never_fire_have_no_factors() -> None:
    second = torch.diag(torch.tensor([1.0, 0.0, 2.0, 3.0]))
    found = hidden_model(torch.zeros(4), second, rank=2)
    assert np.isfinite(found.factors).all() and not found.factors[1].any() and found.noise[1] == 0


def test_a_rank_beyond_the_width_is_the_width() -> None:
    assert hidden_model(torch.zeros(4), torch.eye(4), rank=64).factors.shape == (4, 4)


def correlated(seed: int, *, n_ff: int = 60, n_tokens: int = 4000) -> Moments:
    """Of random activations with 3 factors in common and a mean; each seed has its own."""
    rng = np.random.default_rng(seed)
    x = (
        rng.standard_normal((n_tokens, 3)) @ rng.standard_normal((3, n_ff))
        + rng.standard_normal((n_tokens, n_ff))
        + rng.standard_normal(n_ff)
    )
    return Moments(torch.tensor(x.mean(0)), torch.tensor(x.T @ x / n_tokens))


def error(model: HiddenModel, down: torch.Tensor, seen: Moments, kept: int) -> float:
    """Mean squared error of down_proj's output after a cut."""
    columns, bias = compensate(down.numpy(), model, kept)
    change = down.numpy().copy()
    change[:, :kept] -= columns
    return float(np.trace(change @ seen.second.numpy() @ change.T) - 2 * bias @ change @ seen.mean.numpy() + bias @ bias)


def uncompensated(model: HiddenModel) -> HiddenModel:
    return HiddenModel(mean=0 * model.mean, factors=0 * model.factors, noise=model.noise)


def test_text_of_the_same_kind_leaves_the_model_as_it_is() -> None:
    seen, down = correlated(0), torch.tensor(np.random.default_rng(9).standard_normal((20, 60)))
    model = hidden_model(seen.mean, seen.second, rank=3)
    found = held_back_noise(model, down, seen)
    np.testing.assert_array_equal(found.factors, model.factors)
    assert error(found, down, seen, 30) < 0.5 * error(uncompensated(model), down, seen, 30)


def test_text_with_nothing_in_common_is_not_compensated() -> None:
    """Activations that have the same size, but other signs: what was learnt does harm."""
    seen, down = correlated(0), torch.tensor(np.random.default_rng(9).standard_normal((20, 60)))
    model = hidden_model(seen.mean, seen.second, rank=3)
    flip = torch.where(torch.arange(60) < 40, 1.0, -1.0).double()
    other = Moments(seen.mean * flip, seen.second * flip * flip[:, None])
    assert error(model, down, other, 40) > error(uncompensated(model), down, other, 40)
    found = held_back_noise(model, down, other)
    assert not found.factors.any() and not found.mean.any() and found.factors.shape == model.factors.shape
    columns = down.float().numpy()
    np.testing.assert_array_equal(compensate(columns, found, 40)[0], columns[:, :40])


def test_few_samples_ask_for_more_noise() -> None:
    """A model of 12 tokens sees factors where there is chance."""
    seen, down = correlated(1), torch.tensor(np.random.default_rng(9).standard_normal((100, 60)))  # more rows than are judged
    rng = np.random.default_rng(2)
    x = rng.multivariate_normal(seen.mean.numpy(), seen.second.numpy() - np.outer(seen.mean, seen.mean), 12)
    model = hidden_model(torch.tensor(x.mean(0)), torch.tensor(x.T @ x / 12), rank=10)
    found = held_back_noise(model, down, seen)
    assert (found.noise > 1.5 * model.noise).all()
    assert error(found, down, seen, 40) < error(model, down, seen, 40)
