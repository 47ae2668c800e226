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
from edgeq.sensitivity import layer_statistics
from edgeq.tensors import from_values

WINDOWS = np.random.default_rng(5).integers(0, 320, (3, 24)).tolist()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "gemma3", "smollm3"])
def test_equals_autograd_through_transformers(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeq.sensitivity._BATCH_TOKENS", 48)  # two windows, then one
    folder = hf_folder(tmp_path / name, name)
    model, theirs = open_model(str(folder)), hf_model(folder).double()
    inputs: dict[str, torch.Tensor] = {}

    def keep(key: str, x: torch.Tensor) -> None:
        x.retain_grad()
        inputs[key] = x

    for key, module in theirs.named_modules():
        if re.search(r"(down_proj|o_proj)$", key):
            module.register_forward_pre_hook(lambda _, args, key=key: keep(key, args[0]))
    ids = torch.tensor(WINDOWS)
    logits = theirs(ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()

    found = list(layer_statistics(Reference(model.spec, model.tensors, dtype=torch.float64), WINDOWS))
    assert [s.layer for s in found] == list(range(model.spec.n_layers))[::-1]
    for statistics in found:
        hidden, mixed = (inputs[f"model.layers.{statistics.layer}.{role}"] for role in ("mlp.down_proj", "self_attn.o_proj"))
        assert hidden.grad is not None and mixed.grad is not None
        x = hidden.detach().flatten(0, 1)
        torch.testing.assert_close(statistics.mean.double(), x.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(statistics.second.double(), x.T @ x / len(x), atol=1e-5, rtol=1e-4)
        taylor = (x * hidden.grad.flatten(0, 1)).square().mean(0) / 2
        torch.testing.assert_close(statistics.channels.double(), taylor, atol=1e-9, rtol=1e-3)
        grouped = (mixed.detach() * mixed.grad).flatten(0, 1).unflatten(-1, (model.spec.attention[0].n_kv_heads, -1)).sum(-1)
        torch.testing.assert_close(statistics.groups.double(), grouped.square().mean(0) / 2, atol=1e-9, rtol=1e-3)


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
    with pytest.raises(SourceError, match=r"layer 1: its gradient is NaN or infinite"):
        next(layer_statistics(Reference(model.spec, tensors), WINDOWS))
