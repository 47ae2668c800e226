"""Moving parts of a port changes nothing; leaving them out equals zeroing the columns that read them. In float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TINY_FAMILIES, hf_folder

from edgeq import ports
from edgeq.converters.sources.resolve import open_model
from edgeq.elastic import Kept
from edgeq.errors import ShapeError
from edgeq.model import Model
from edgeq.reference import Reference
from edgeq.spec import Attention, Mlp, ModelSpec
from edgeq.tensors import LazyTensor, map_values

VARIANTS = {name: (name, {}) for name in TINY_FAMILIES} | {
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-no-gqa": ("llama", {"num_key_value_heads": 4}),
}
IDS = np.random.default_rng(3).integers(0, 320, 40).tolist()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("ports")


def opened(folders: Path, name: str) -> Model:
    family, overrides = VARIANTS[name]
    if not (folders / name).exists():
        hf_folder(folders / name, family, **overrides)
    return open_model(str(folders / name))


def logits(spec: ModelSpec, tensors: Mapping[str, LazyTensor]) -> torch.Tensor:
    reference = Reference(spec, tensors, dtype=torch.float64)
    return reference.logits(reference.hidden([IDS])[0])


@pytest.mark.parametrize("name", VARIANTS)
def test_any_permutation_leaves_the_logits(folders: Path, name: str) -> None:
    model, rng = opened(folders, name), np.random.default_rng(0)
    moved, before = dict(model.tensors), logits(model.spec, model.tensors)
    for block in model.spec.blocks:
        moved = ports.select(moved, block, np.roll(rng.permutation(ports.size(block)), 1))
    assert moved["layers.1.wk.weight"].shape == model.tensors["layers.1.wk.weight"].shape
    assert (moved["layers.0.down.weight"].decode() != model.tensors["layers.0.down.weight"].decode()).any()
    torch.testing.assert_close(logits(model.spec, moved), before, atol=1e-11, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_cut_equals_masking(folders: Path, name: str) -> None:
    model = opened(folders, name)
    n_layers = model.spec.n_layers
    kept = Kept(n_ff=tuple(100 - 30 * (i % 2) for i in range(n_layers)), n_kv=tuple(1 + i % 2 for i in range(n_layers)))
    masked = dict(model.tensors)
    for block in model.spec.blocks:
        if isinstance(block, Mlp):
            role, columns = "down", kept.n_ff[block.layer]
        else:
            role, columns = "wo", kept.n_kv[block.layer] * block.head_dim * (block.n_heads // block.n_kv_heads)
        key = f"layers.{block.layer}.{role}.weight"

        def zero(values: np.ndarray, first: int = columns) -> np.ndarray:
            return np.where(np.arange(values.shape[1]) < first, values, 0).astype(np.float32)

        masked[key] = map_values(masked[key], zero)
    spec, tensors = ports.cut(model.spec, model.tensors, kept)
    assert tensors["layers.1.up.weight"].shape == (70, model.spec.n_embd)
    got, wanted = logits(spec, tensors), logits(model.spec, masked)
    torch.testing.assert_close(got, wanted, atol=1e-11, rtol=0)
    assert (wanted - logits(model.spec, model.tensors)).abs().max() > 0.01


def test_a_block_of_size_zero_is_gone(folders: Path) -> None:
    spec = opened(folders, "llama").spec
    cut = ports.with_sizes(spec, Kept(n_ff=(160, 32), n_kv=(1, 0)))
    assert [(type(b), b.layer, ports.size(b)) for b in cut.blocks] == [(Attention, 0, 1), (Mlp, 0, 160), (Mlp, 1, 32)]
    assert cut.attention[0].n_heads == 2


def test_rows_stay_in_their_grid(folders: Path) -> None:
    hf_folder(folders / "half", "llama", dtype="float16")
    model = open_model(str(folders / "half"))
    moved = ports.select(model.tensors, model.spec.mlps[0], np.arange(160)[::-1])
    assert moved["layers.0.up.weight"].grid.name == "F16"
    np.testing.assert_array_equal(moved["layers.0.up.weight"].packed(), model.tensors["layers.0.up.weight"].packed()[::-1])


def test_parameters_of_a_part(folders: Path) -> None:
    model = opened(folders, "llama-biases")
    attention, mlp = model.spec.attention[0], model.spec.mlps[0]
    assert ports.parameters(model.tensors, mlp) == 3 * 64 + 2
    assert ports.parameters(model.tensors, attention) == (2 * 48 + 2 * 24) * 64 + 48 + 2 * 24
    per_layer = 3 * 64 * 160 + 2 * 160 + 64 + 2 * 64 * 96 + 2 * 64 * 48 + 96 + 2 * 48 + 64 + 2 * 64
    assert ports.block_params(model.tensors) == 2 * per_layer


@pytest.mark.parametrize("parts", [[0, 0], [2], [-1]])
def test_parts_that_are_not_there(folders: Path, parts: list[int]) -> None:
    model = opened(folders, "llama")
    block = dataclasses.replace(model.spec.attention[0])
    with pytest.raises(ShapeError, match=r"layer 0: kv_group has parts 0 to 1, each at most once; got \["):
        ports.select(model.tensors, block, np.array(parts))
