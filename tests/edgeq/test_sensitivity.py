"""Sensitivities and moments against autograd through transformers' own model."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import hf_folder, hf_model

from edgeq.converters.sources.resolve import open_model
from edgeq.errors import SourceError, UsageError
from edgeq.reference import Reference
from edgeq.sensitivity import EVEN, draw, layer_statistics
from edgeq.tensors import from_values

WINDOWS = np.random.default_rng(5).integers(0, 320, (3, 24)).tolist()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def drawn_tokens(logits: torch.Tensor) -> torch.Tensor:
    """The next tokens that sorting draws, (windows, n_tokens - 1), from logits in float64."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([draw(window[:-1].softmax(-1), generator)[:, 0] for window in logits.detach()])


class Oracle:
    """transformers' own model after a forward and a backward pass, with what went into and out of its modules."""

    def __init__(self, folder: Path) -> None:
        model = hf_model(folder).double()
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        for key, module in model.named_modules():
            if re.search(r"(down_proj|o_proj)$", key):
                module.register_forward_pre_hook(lambda _, args, key=key: self._keep(self.inputs, key, args[0]))
            if re.search(r"(q_proj|layers\.\d+)$", key):
                module.register_forward_hook(lambda _, args, out, key=key: self._keep(self.outputs, key, out))
            if re.search(r"layers\.\d+$", key):
                module.register_forward_pre_hook(lambda _, args, key=key: self.inputs.update({key: args[0]}))
        logits = model(torch.tensor(WINDOWS)).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), drawn_tokens(logits).flatten(), reduction="sum").backward()

    @staticmethod
    def _keep(kept: dict[str, torch.Tensor], key: str, x: torch.Tensor) -> None:
        if x.requires_grad:
            x.retain_grad()
        kept[key] = x

    def read(self, layer: int, role: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Input of a linear and its gradient, (windows, tokens, width)."""
        return with_gradient(self.inputs[f"model.layers.{layer}.{role}"])


def with_gradient(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    assert x.grad is not None
    return x.detach(), x.grad


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "gemma3", "smollm3"])
def test_equals_autograd_through_transformers(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeq.sensitivity._BATCH_TOKENS", 48)  # two windows, then one
    folder = hf_folder(tmp_path / name, name)
    model, oracle = open_model(str(folder)), Oracle(folder)
    found = list(layer_statistics(Reference(model.spec, model.tensors, dtype=torch.float64), WINDOWS))
    assert [s.layer for s in found] == list(range(model.spec.n_layers))[::-1]
    for statistics in found:
        x, slope = oracle.read(statistics.layer, "mlp.down_proj")
        assert statistics.taught is not None and statistics.checked is None and statistics.heads is None
        torch.testing.assert_close(statistics.taught.mean.double(), x.mean((0, 1)), atol=1e-5, rtol=1e-4)
        flat = x.flatten(0, 1)
        torch.testing.assert_close(statistics.taught.second.double(), flat.T @ flat / len(flat), atol=1e-5, rtol=1e-4)
        taylor = (x * slope).square().mean(1) / 2  # (windows, n_ff)
        shares = (taylor / taylor.sum(1, keepdim=True)).mean(0)
        smooth = (1 - EVEN) * shares + EVEN / len(shares)
        torch.testing.assert_close(statistics.channels.double(), smooth * taylor.sum(1).mean(), atol=1e-9, rtol=1e-3)
        mixed, slope = oracle.read(statistics.layer, "self_attn.o_proj")
        grouped = (mixed * slope).flatten(0, 1).unflatten(-1, (model.spec.attention[0].n_kv_heads, -1)).sum(-1)
        torch.testing.assert_close(statistics.groups.double(), grouped.square().mean(0) / 2, atol=1e-9, rtol=1e-3)
        behind, slope = with_gradient(oracle.outputs[f"model.layers.{statistics.layer}"])
        added = ((behind - oracle.inputs[f"model.layers.{statistics.layer}"].detach()) * slope).sum(-1)
        torch.testing.assert_close(statistics.whole.double(), added.square().mean()[None] / 2, atol=1e-9, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_heads_equal_autograd_through_transformers(tmp_path: Path, name: str) -> None:
    folder = hf_folder(tmp_path / name, name)
    model, oracle = open_model(str(folder)), Oracle(folder)
    for statistics in layer_statistics(Reference(model.spec, model.tensors, dtype=torch.float64), WINDOWS, heads=True):
        heads, block = statistics.heads, model.spec.attention[statistics.layer]
        assert heads is not None
        q, slope = (t.flatten(0, 1) for t in with_gradient(oracle.outputs[f"model.layers.{statistics.layer}.self_attn.q_proj"]))
        by_pair = (q * slope).unflatten(-1, (block.n_heads, 2, block.head_dim // 2)).sum((1, 2))  # pair j: dimensions j and j + half
        torch.testing.assert_close(heads.pairs.double(), by_pair.square().mean(0) / 2, atol=1e-9, rtol=1e-3)
        by_group = (q * slope).unflatten(-1, (block.n_kv_heads, -1, 2, block.head_dim // 2)).sum((2, 3))
        torch.testing.assert_close(heads.group_pairs.double(), by_group.square().mean(0) / 2, atol=1e-9, rtol=1e-3)
        mixed, slope = (t.flatten(0, 1).unflatten(-1, (2, -1, 24)) for t in oracle.read(statistics.layer, "self_attn.o_proj"))
        for group, rotation in enumerate(heads.rotations):
            torch.testing.assert_close(rotation @ rotation.T, torch.eye(24, dtype=torch.float64))
            energy = (mixed[:, group] @ rotation.T).square().mean((0, 1))
            assert (energy.diff() <= 1e-12).all(), "directions go from the strongest to the weakest"
            directions = torch.linalg.svd(mixed[:, group].flatten(0, 1))[2]
            torch.testing.assert_close((rotation * directions).sum(1).abs(), torch.ones(24, dtype=torch.float64), atol=1e-4, rtol=0)
        lost = sum((mixed[:, g] @ r.T) * (slope[:, g] @ r.T) for g, r in enumerate(heads.rotations))
        assert isinstance(lost, torch.Tensor)
        torch.testing.assert_close(heads.values.double(), lost.sum(1).square().mean(0) / 2, atol=1e-9, rtol=1e-3)
        by_group = torch.stack([((mixed[:, g] @ r.T) * (slope[:, g] @ r.T)).sum(1) for g, r in enumerate(heads.rotations)], dim=1)
        torch.testing.assert_close(heads.group_values.double(), by_group.square().mean(0) / 2, atol=1e-9, rtol=1e-3)


def test_windows_held_back_have_moments_of_their_own(tmp_path: Path) -> None:
    """Everything else is of all windows."""
    model = open_model(str(hf_folder(tmp_path / "m", "llama")))
    reference = Reference(model.spec, model.tensors, dtype=torch.float64)
    whole, first, last = (layer_statistics(reference, windows) for windows in (WINDOWS, WINDOWS[:2], WINDOWS[2:]))
    apart = list(layer_statistics(reference, WINDOWS[:2], WINDOWS[2:]))
    for found, everything, taught, checked in zip(apart, whole, first, last, strict=True):
        torch.testing.assert_close(found.channels, everything.channels)
        for mine, other in ((found.taught, taught.taught), (found.checked, checked.taught)):
            assert mine is not None and other is not None
            torch.testing.assert_close(mine.mean, other.mean)
            torch.testing.assert_close(mine.second, other.second)


def test_a_head_that_is_not_kept_in_memory_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(str(hf_folder(tmp_path / "m", "llama")))
    whole = [s.channels for s in layer_statistics(Reference(model.spec, model.tensors), WINDOWS)]
    monkeypatch.setattr("edgeq.reference.HEAD_CACHE_BYTES", 0)
    monkeypatch.setattr("edgeq.reference.CHUNK_VALUES", 64 * 50)
    chunked = [s.channels for s in layer_statistics(Reference(model.spec, model.tensors), WINDOWS)]
    for one, other in zip(whole, chunked, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("windows", [[[1, 2], [1, 2, 3]], [[1], [2]], []])
def test_windows_of_other_shapes(tmp_path: Path, windows: list[list[int]]) -> None:
    model = open_model(str(hf_folder(tmp_path / "m", "llama")))
    with pytest.raises(UsageError, match="sorting wants calibration windows of one length of at least 2 tokens"):
        next(layer_statistics(Reference(model.spec, model.tensors), windows))


def test_broken_weights_are_named(tmp_path: Path) -> None:
    model = open_model(str(hf_folder(tmp_path / "m", "llama")))
    gate = model.tensors["layers.1.gate.weight"].decode()
    gate[3, 3] = np.nan
    tensors = {**model.tensors, "layers.1.gate.weight": from_values(gate, origin="gate")}
    with pytest.raises(SourceError, match=r"layer 1: its output is NaN or infinite in calibration, so one of its weights is broken"):
        next(layer_statistics(Reference(model.spec, tensors), WINDOWS))


def test_a_gradient_that_overflows_is_named(tmp_path: Path) -> None:
    """A norm's weight of 1e38 does nothing to inputs that are all zero, but its gradient is infinite."""
    model = open_model(str(hf_folder(tmp_path / "m", "llama")))
    embed, norm = model.tensors["embed.weight"].decode(), model.tensors["layers.0.attn_norm.weight"].decode()
    broken = {
        "embed.weight": from_values(0 * embed, origin="embed"),
        "layers.0.attn_norm.weight": from_values(0 * norm + np.float32(1e38), origin="norm"),
    }
    with pytest.raises(SourceError, match="layer 0: its gradient is NaN or infinite in calibration"):
        list(layer_statistics(Reference(model.spec, {**model.tensors, **broken}), WINDOWS))


def test_tokens_are_drawn_by_their_probabilities() -> None:
    probabilities = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
    drawn = draw(probabilities.expand(20_000, -1), torch.Generator().manual_seed(1))
    assert drawn.shape == (20_000, 1)
    found = drawn.flatten().bincount(minlength=6) / len(drawn)
    torch.testing.assert_close(found, probabilities, atol=0.012, rtol=0)  # 3.5 standard deviations
    assert not found[probabilities == 0].any()
