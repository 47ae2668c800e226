"""The published way of cutting: what it zeroes, and that zeroing it is all it does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import hf_folder

from edgeq.converters.sources.resolve import open_model
from edgeq.errors import PlanError, UnsupportedError
from edgeq.reference import Reference
from edgeq.tensors import LazyTensor
from edgeq.uniql import channels_lost, layer_rates, masked, measure, sort

WINDOWS = np.random.default_rng(5).integers(0, 320, (3, 40)).tolist()


def opened(folder: Path, name: str) -> Reference:
    torch.set_num_threads(1)
    model = open_model(str(hf_folder(folder, name)))
    return Reference(model.spec, model.tensors, dtype=torch.float64)


def test_leverage_ignores_the_size_of_a_strong_channel_and_loses_the_redundant_one() -> None:
    """Channels 1 and 2 are copies, so each has half the leverage of a channel alone at their size; 3 is weak."""
    second = torch.tensor([[4.0, 0, 0, 0], [0, 4, 4, 0], [0, 4, 4, 0], [0, 0, 0, 0.1]])
    assert channels_lost(second, 1).tolist() == [3]
    assert sorted(channels_lost(second, 3).tolist()) == [1, 2, 3]


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "smollm3"])
def test_every_port_of_every_layer_loses_the_same_share(tmp_path: Path, name: str) -> None:
    reference = opened(tmp_path / "m", name)
    spec = reference.spec
    tensors = masked(reference, measure(reference, WINDOWS).moments, 0.25)
    for layer in range(spec.n_layers):
        down, wq, wv = (tensors[f"layers.{layer}.{role}.weight"].decode() for role in ("down", "wq", "wv"))
        assert (~down.any(0)).sum() == 40
        lost_pairs = 0 if spec.attention[layer].rope == "none" else round(spec.rope.dim // 2 * 0.25)
        rows = ~wq.reshape(4, 24, -1).any(2)
        assert rows.sum(1).tolist() == [2 * lost_pairs] * 4
        half = spec.rope.dim // 2
        np.testing.assert_array_equal(rows[:, :half], rows[:, half : 2 * half])
        assert [np.linalg.matrix_rank(head, tol=1e-4) for head in wv.reshape(2, 24, -1)] == [18, 18]
    [before], [after] = reference.hidden(WINDOWS[:1]), Reference(spec, tensors, dtype=torch.float64).hidden(WINDOWS[:1])
    assert (before - after).abs().max() > 0.01


def test_the_directions_lost_are_the_weakest_of_the_values(tmp_path: Path) -> None:
    """With biases (qwen2): what the values lose on the calibration text is the least that any projection of this rank can lose."""
    reference = opened(tmp_path / "m", "qwen2")
    inputs: list[torch.Tensor] = []

    def observe(layer: int | None, point: str, x: torch.Tensor) -> None:
        if (layer, point) == (0, "attn_in"):
            inputs.append(x.flatten(0, 1).clone())

    reference.hidden(WINDOWS, observe=observe)
    cut = masked(reference, measure(reference, WINDOWS).moments, 0.25)

    def values(tensors: Mapping[str, LazyTensor]) -> torch.Tensor:
        weight, bias = (torch.from_numpy(tensors[f"layers.0.wv.{kind}"].decode()).double() for kind in ("weight", "bias"))
        return (torch.cat(inputs) @ weight.T + bias).unflatten(1, (2, 24))

    whole, left = values(reference.tensors), values(cut)
    for head in range(2):
        singular = torch.linalg.svdvals(whole[:, head])
        torch.testing.assert_close((whole - left)[:, head].square().sum(), singular[-6:].square().sum(), rtol=1e-3, atol=0)


def test_rate_zero_changes_nothing(tmp_path: Path) -> None:
    reference = opened(tmp_path / "m", "llama")
    tensors = masked(reference, measure(reference, WINDOWS).moments, 0)
    [before], [after] = reference.hidden(WINDOWS[:1]), Reference(reference.spec, tensors, dtype=torch.float64).hidden(WINDOWS[:1])
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


def test_what_has_no_rule_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="qwen3 normalizes queries and keys over all dimensions"):
        masked(opened(tmp_path / "q", "qwen3"), {}, 0.2)
    with pytest.raises(PlanError, match=r"rate 1 is outside 0 to 1"):
        masked(opened(tmp_path / "m", "llama"), {}, 1.0)


def test_rates_follow_importance_up_to_the_most() -> None:
    """As the authors' code has it: n_layers * rate * softmax(-importance / 0.1), what is above 0.85 being dropped."""
    rates = layer_rates([0.2, 0.1, 0.3], 0.2)
    assert sum(rates) == pytest.approx(0.6)
    assert rates[1] / rates[0] == pytest.approx(np.exp(1.0)) and rates[0] / rates[2] == pytest.approx(np.exp(1.0))
    assert layer_rates([0.0, 1.0], 0.6)[0] == 0.85


def test_importance_is_the_turn_that_a_layer_gives_the_last_token(tmp_path: Path) -> None:
    reference = opened(tmp_path / "m", "llama")
    states = reference.embed(WINDOWS)
    expected = []
    for _, blocks in reference.spec.layers():
        behind = reference.layer(blocks)(states, lambda layer, point, x: None)
        a, b = states[:, -1].numpy(), behind[:, -1].detach().numpy()
        expected.append(1 - np.mean((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)))
        states = behind.detach()
    np.testing.assert_allclose(measure(reference, WINDOWS, points=()).importance, expected, rtol=1e-6)


def test_rates_by_layer_are_kept(tmp_path: Path) -> None:
    reference = opened(tmp_path / "m", "llama")
    tensors = masked(reference, measure(reference, WINDOWS).moments, (0.1, 0.5))
    assert [(~tensors[f"layers.{i}.down.weight"].decode().any(0)).sum() for i in (0, 1)] == [16, 80]


@pytest.mark.parametrize("alike", [False, True])
def test_a_sorted_model_is_cut_in_width_by_leverage(tmp_path: Path, *, alike: bool) -> None:
    reference = opened(tmp_path / "m", "llama")
    found = sort(reference, WINDOWS, channel_step=32, alike=alike)
    second = measure(reference, WINDOWS).moments[0, "mlp_hidden"]
    assert found.orders[1][::-1].tolist() == channels_lost(second, 160).tolist()
    assert found.orders[0].tolist() == [0, 1]
    assert {step.port for step in found.ladder.steps} == {"ffn"}
    assert (found.ladder.steps[0].layer is None) == alike
    assert not found.hidden
