"""Sorting a tiny model: the order it finds, the factor model, and what compensation gains."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from tiny import hf_folder

from edgeq import ports, sorting
from edgeq.allocation import Freedom
from edgeq.compensation import Floats
from edgeq.converters.sources.resolve import open_model
from edgeq.elastic import Kept
from edgeq.model import Model
from edgeq.reference import Reference
from edgeq.tensors import LazyTensor, map_values

FREEDOM: dict[str, Freedom] = {"ffn": "per layer", "kv_group": "per layer"}
WINDOWS = np.random.default_rng(5).integers(0, 320, (4, 32)).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    torch.set_num_threads(1)
    return open_model(str(hf_folder(tmp_path_factory.mktemp("sorting") / "m", "llama")))


def logits(model: Model, tensors: Mapping[str, LazyTensor]) -> torch.Tensor:
    reference = Reference(model.spec, tensors, dtype=torch.float64)
    return reference.logits(reference.hidden([WINDOWS[0]])[0])


def test_sorted_model_is_the_same_function(model: Model) -> None:
    found = sorting.sort(Reference(model.spec, model.tensors), WINDOWS, channel_step=32, rank=4, freedom=FREEDOM)
    moved = ports.apply(model.spec, model.tensors, found.orders)[1]
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
    found = sorting.sort(Reference(model.spec, tensors), WINDOWS, channel_step=1, rank=0, freedom=FREEDOM)
    attention, mlp = found.orders[2], found.orders[3]
    assert sorted(mlp[-3:]) == [5, 6, 7]
    assert attention.tolist() == [1, 0]
    first = found.ladder.steps[:4]
    assert sorted((s.layer, s.port, s.damage) for s in first) == [(1, "ffn", 0.0)] * 3 + [(1, "kv_group", 0.0)]


def test_orders_are_those_of_the_hidden_model(model: Model) -> None:
    """The means that go with the sorted channels are the means of those channels."""
    found = sorting.sort(Reference(model.spec, model.tensors), WINDOWS, channel_step=32, rank=2, freedom=FREEDOM)
    means = dict.fromkeys(range(2), torch.zeros(160))

    def observe(layer: int | None, point: str, x: torch.Tensor) -> None:
        if point == "mlp_hidden" and layer is not None:
            means[layer] = means[layer] + x.flatten(0, 1).mean(0)  # all windows fit one batch

    Reference(model.spec, model.tensors).hidden(WINDOWS, observe=observe)
    for layer, order in ((0, found.orders[1]), (1, found.orders[3])):
        np.testing.assert_allclose(found.hidden[layer].mean, means[layer].numpy()[order], atol=1e-5)


def test_heads_are_sorted_when_they_may_be_cut(model: Model) -> None:
    """Pairs and value directions move, the function stays, and what is cut first matters less than what stays."""
    reference = Reference(model.spec, model.tensors)
    freedom: dict[str, Freedom] = {**FREEDOM, "head": "all layers alike"}
    found = sorting.sort(reference, WINDOWS, channel_step=32, rank=0, freedom=freedom, head_sizes=(16, 8))
    pair_order, turns = found.pair_order, found.rotations
    assert pair_order is not None and turns is not None
    assert sorted(pair_order) == list(range(12)) and pair_order.tolist() != list(range(12))
    spec, tensors = ports.apply(model.spec, model.tensors, found.orders, pair_order=pair_order, rotations=turns)
    moved = Reference(spec, tensors, dtype=torch.float64)
    torch.testing.assert_close(moved.logits(moved.hidden([WINDOWS[0]])[0]), logits(model, model.tensors), atol=1e-5, rtol=0)

    def change(keep_last: bool) -> float:
        """Of the logits of all windows, by heads of 16 dimensions out of 24."""
        backwards = np.arange(12)[::-1] if keep_last else np.arange(12)
        rotations = {layer: matrix[:, ::-1] if keep_last else matrix for layer, matrix in turns.items()}
        ordered = ports.apply(model.spec, model.tensors, found.orders, pair_order=pair_order[backwards], rotations=rotations)
        cut = Reference(*ports.cut(*ordered, Kept(n_ff=(160, 160), n_kv=(2, 2), head_dim=16)), dtype=torch.float64)
        whole = Reference(model.spec, model.tensors, dtype=torch.float64)
        both = zip(cut.hidden(WINDOWS), whole.hidden(WINDOWS), strict=True)
        return sum(float((cut.logits(a) - whole.logits(b)).square().mean()) for a, b in both)

    assert change(keep_last=False) < 0.7 * change(keep_last=True)


def test_heads_of_each_layer_are_sorted_for_themselves(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each KV head has pairs of its own, and what is cut first matters less than what stays."""
    monkeypatch.setattr(sorting, "_HEAD_COST", 0.5)  # so that heads of a model of noise go before its channels
    freedom: dict[str, Freedom] = {**FREEDOM, "head": "per layer"}
    found = sorting.sort(
        Reference(model.spec, model.tensors), WINDOWS, channel_step=32, rank=0, freedom=freedom, head_sizes=(16, 8), held_back=[]
    )
    pair_orders, turns = found.pair_orders, found.rotations
    assert found.pair_order is None and pair_orders is not None and turns is not None
    assert {layer: np.sort(order).tolist() for layer, order in pair_orders.items()} == dict.fromkeys(range(2), [list(range(12))] * 2)
    assert (pair_orders[0][0] != pair_orders[0][1]).any()
    assert any(step.port == "head" and step.layer is not None for step in found.ladder.steps)

    def change(keep_last: bool) -> float:
        """Of the logits of all windows, by heads of 16 dimensions out of 24 in layer 1."""
        orders = {layer: order[:, ::-1] if keep_last else order for layer, order in pair_orders.items()}
        rotations = {layer: matrix[:, ::-1] if keep_last else matrix for layer, matrix in turns.items()}
        ordered = ports.apply(model.spec, model.tensors, found.orders, pair_orders=orders, rotations=rotations)
        cut = Reference(*ports.cut(*ordered, Kept(n_ff=(160, 160), n_kv=(2, 2), head_dims=(24, 16))), dtype=torch.float64)
        whole = Reference(model.spec, model.tensors, dtype=torch.float64)
        both = zip(cut.hidden(WINDOWS), whole.hidden(WINDOWS), strict=True)
        return sum(float((cut.logits(a) - whole.logits(b)).square().mean()) for a, b in both)

    assert change(keep_last=False) < 0.7 * change(keep_last=True)


def test_heads_stay_when_nobody_asks(model: Model) -> None:
    found = sorting.sort(Reference(model.spec, model.tensors), WINDOWS, channel_step=32, rank=0, freedom=FREEDOM, head_sizes=(16,))
    assert found.pair_order is None and found.rotations is None


def test_the_same_input_gives_the_same_result(model: Model) -> None:
    def run() -> sorting.Sorting:
        reference = Reference(model.spec, model.tensors)
        return sorting.sort(reference, WINDOWS[:3], channel_step=32, rank=4, freedom=FREEDOM, held_back=WINDOWS[3:])

    first, second = run(), run()
    assert first.ladder == second.ladder
    for one, other in zip(first.orders, second.orders, strict=True):
        np.testing.assert_array_equal(one, other)
    for layer, hidden in first.hidden.items():
        for name in ("mean", "factors", "noise"):
            np.testing.assert_array_equal(getattr(hidden, name), getattr(second.hidden[layer], name))


def test_windows_held_back_judge_compensation(model: Model) -> None:
    """Random tokens have nothing to tell a tiny random model of others: with less than all its noise, it would be worse."""
    reference = Reference(model.spec, model.tensors)
    unchecked = sorting.sort(reference, WINDOWS[:1], channel_step=32, rank=16, freedom=FREEDOM)
    checked = sorting.sort(reference, WINDOWS[:1], channel_step=32, rank=16, freedom=FREEDOM, held_back=WINDOWS[1:])
    for layer, hidden in checked.hidden.items():
        before = unchecked.hidden[layer]
        assert not hidden.factors.any() or hidden.noise.sum() > before.noise.sum()
