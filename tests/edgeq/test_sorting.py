"""Sorting a tiny model: the order it finds, the ladder, the factor model, and what compensation gains."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from tiny import hf_folder

from edgeq import ports, sorting
from edgeq.compensation import Floats
from edgeq.converters.sources.resolve import open_model
from edgeq.elastic import MAX_RATE, Port, kept_for_rate, steps_for_rate
from edgeq.errors import UnsupportedError
from edgeq.model import Model
from edgeq.reference import Reference
from edgeq.tensors import LazyTensor, map_values

WINDOWS = np.random.default_rng(5).integers(0, 320, (4, 32)).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    torch.set_num_threads(1)
    return open_model(str(hf_folder(tmp_path_factory.mktemp("sorting") / "m", "llama")))


def logits(model: Model, tensors: Mapping[str, LazyTensor]) -> torch.Tensor:
    reference = Reference(model.spec, tensors, dtype=torch.float64)
    return reference.logits(reference.hidden([WINDOWS[0]])[0])


def test_sorted_model_is_the_same_function(model: Model) -> None:
    found = sorting.sort(Reference(model.spec, model.tensors), WINDOWS, channel_step=32, rank=4)
    moved = sorting.apply(model.spec, model.tensors, found.orders)
    torch.testing.assert_close(logits(model, moved), logits(model, model.tensors), atol=1e-11, rtol=0)
    assert any((order != np.arange(len(order))).any() for order in found.orders)
    assert {i: h.factors.shape for i, h in found.hidden.items()} == {0: (160, 4), 1: (160, 4)}


def test_useless_parts_come_last_and_go_first(model: Model) -> None:
    """Channels 5, 6, 7 and group 0 of layer 1 add nothing, as their columns are zero."""

    def without(first: int, last: int) -> Callable[[Floats], Floats]:
        def zero(values: Floats) -> Floats:
            values = values.copy()
            values[:, first:last] = 0
            return values

        return zero

    tensors = dict(model.tensors)
    tensors["layers.1.down.weight"] = map_values(tensors["layers.1.down.weight"], without(5, 8))
    tensors["layers.1.wo.weight"] = map_values(tensors["layers.1.wo.weight"], without(0, 48))
    found = sorting.sort(Reference(model.spec, tensors), WINDOWS, channel_step=1, rank=0)
    attention, mlp = found.orders[2], found.orders[3]
    assert sorted(mlp[-3:]) == [5, 6, 7]
    assert attention.tolist() == [1, 0]
    first = found.ladder.steps[:4]
    assert sorted((s.layer, s.port, s.damage) for s in first) == [(1, "ffn", 0.0)] * 3 + [(1, "kv_group", 0.0)]


def test_orders_are_those_of_the_hidden_model(model: Model) -> None:
    """The means that go with the sorted channels are the means of those channels."""
    found = sorting.sort(Reference(model.spec, model.tensors), WINDOWS, channel_step=32, rank=2)
    means = dict.fromkeys(range(2), torch.zeros(160))

    def observe(layer: int | None, point: str, x: torch.Tensor) -> None:
        if point == "mlp_hidden" and layer is not None:
            means[layer] = means[layer] + x.flatten(0, 1).mean(0)  # all windows fit one batch

    Reference(model.spec, model.tensors).hidden(WINDOWS, observe=observe)
    for layer, order in ((0, found.orders[1]), (1, found.orders[3])):
        np.testing.assert_allclose(found.hidden[layer].mean, means[layer].numpy()[order], atol=1e-5)


def sensitivities(rng: np.random.Generator) -> dict[tuple[Port, int], Floats]:
    values: dict[tuple[Port, int], Floats] = {}
    for layer in range(2):
        values["ffn", layer] = rng.exponential(size=160).astype(np.float32) * (1 + 3 * layer)
        values["kv_group", layer] = rng.exponential(size=2).astype(np.float32) * 20
    return values


@pytest.mark.parametrize("channel_step", [1, 16, 32, 48])
def test_ladder_reaches_the_last_rate_and_no_further(model: Model, channel_step: int) -> None:
    rungs = sorting.ladder(model.spec, model.tensors, sensitivities(np.random.default_rng(0)), channel_step=channel_step)
    assert rungs.removed_fraction(len(rungs.steps)) >= MAX_RATE > rungs.removed_fraction(len(rungs.steps) - 1)
    for step in rungs.steps:
        assert step.stop % (channel_step if step.port == "ffn" else 1) == 0
        assert step.damage > 0
    assert min(rungs.smallest.n_ff + rungs.smallest.n_kv) > 0


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.35])
def test_removed_parameters_are_counted_as_they_are(model: Model, rate: float) -> None:
    rungs = sorting.ladder(model.spec, model.tensors, sensitivities(np.random.default_rng(1)), channel_step=16)
    kept = kept_for_rate(rungs, rate)
    _, cut = ports.cut(model.spec, model.tensors, kept)
    assert kept.n_kv != (2, 2)  # groups go too
    removed = 1 - ports.block_params(cut) / rungs.block_params
    assert removed == pytest.approx(rungs.removed_fraction(steps_for_rate(rungs, rate)), abs=1e-12)
    assert removed >= rate


def test_a_layer_that_matters_more_is_cut_less(model: Model) -> None:
    values = sensitivities(np.random.default_rng(2))
    values["ffn", 1] = values["ffn", 0] * 4
    kept = sorting.ladder(model.spec, model.tensors, values, channel_step=16).smallest
    assert kept.n_ff[1] > kept.n_ff[0]


def test_steps_too_large_for_the_model(model: Model) -> None:
    with pytest.raises(
        UnsupportedError, match=r"cutting 256 MLP channels at a time, down to one step of each layer, removes [\d,]+ of 98,5"
    ):
        sorting.ladder(model.spec, model.tensors, sensitivities(np.random.default_rng(0)), channel_step=256)


def test_factor_model_finds_the_covariance_it_was_made_from() -> None:
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((80, 3)) * rng.uniform(0.1, 10, (80, 1))  # channels of very different size
    noise = rng.uniform(0.5, 1, 80) * np.square(factors).sum(1)
    mean = rng.standard_normal(80)
    covariance = factors @ factors.T + np.diag(noise)
    found = sorting.hidden_model(torch.tensor(mean), torch.tensor(covariance + np.outer(mean, mean)), rank=3)
    scale = np.sqrt(np.diag(covariance))
    error = (found.factors @ found.factors.T - factors @ factors.T) / np.outer(scale, scale)
    assert np.abs(error).max() < 0.02
    np.testing.assert_allclose(found.noise, noise, rtol=0.1)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-6)


def test_channels_that_never_fire_have_no_factors() -> None:
    second = torch.diag(torch.tensor([1.0, 0.0, 2.0, 3.0]))
    found = sorting.hidden_model(torch.zeros(4), second, rank=2)
    assert np.isfinite(found.factors).all() and not found.factors[1].any() and found.noise[1] == 0


def test_a_rank_beyond_the_width_is_the_width() -> None:
    assert sorting.hidden_model(torch.zeros(4), torch.eye(4), rank=64).factors.shape == (4, 4)
