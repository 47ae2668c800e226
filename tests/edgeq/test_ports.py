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
from edgeq.errors import ShapeError, UnsupportedError
from edgeq.model import Model
from edgeq.reference import Reference
from edgeq.spec import Attention, Mlp, ModelSpec
from edgeq.tensors import LazyTensor, from_values, map_values

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


def test_a_layer_that_is_gone_leaves_no_tensors_and_passes_its_input_on(folders: Path) -> None:
    model = opened(folders, "gemma3")
    spec, tensors = ports.cut(model.spec, model.tensors, Kept(n_ff=(160, 0, 96), n_kv=(2, 0, 1)))
    assert [b.layer for b in spec.blocks] == [0, 0, 2, 2]
    assert not [name for name in tensors if name.startswith("layers.1.")]
    silent = dict(model.tensors)
    for role in ("wo", "down"):
        silent[f"layers.1.{role}.weight"] = map_values(silent[f"layers.1.{role}.weight"], np.zeros_like)
    _, silent = ports.cut(model.spec, silent, Kept(n_ff=(160, 160, 96), n_kv=(2, 2, 1)))
    kept = ports.with_sizes(model.spec, Kept(n_ff=(160, 160, 96), n_kv=(2, 2, 1)))
    torch.testing.assert_close(logits(spec, tensors), logits(kept, silent), atol=1e-11, rtol=0)


@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.startswith(("qwen3", "gemma3"))])
def test_a_cut_of_heads_equals_masking(folders: Path, name: str) -> None:
    """Queries without the pairs that go, outputs without the values that go, and the scale of whole heads."""
    model, d = opened(folders, name), 16
    order = np.random.default_rng(7).permutation(12)
    whole, sorted_tensors = ports.order_pairs(model.spec, model.tensors, order)
    masked = dict(sorted_tensors)
    for block in model.spec.attention:
        pairs = np.arange(block.n_heads * 24) % 12 < d // 2
        for kind in ("weight", "bias"):
            if (key := f"layers.{block.layer}.wq.{kind}") in masked:
                values = masked[key].decode()
                masked[key] = from_values(np.where(pairs if kind == "bias" else pairs[:, None], values, 0), origin=key)
        key = f"layers.{block.layer}.wo.weight"
        masked[key] = from_values(np.where(np.arange(block.n_heads * 24) % 24 < d, masked[key].decode(), 0), origin=key)
    n = model.spec.n_layers
    spec, tensors = ports.cut(whole, sorted_tensors, Kept(n_ff=(160,) * n, n_kv=tuple(b.n_kv_heads for b in whole.attention), head_dim=d))
    assert (spec.attention[0].head_dim, spec.rope.dim, spec.attn_scale) == (d, d, model.spec.attn_scale)
    assert tensors["layers.1.wk.weight"].shape[0] == model.spec.attention[1].n_kv_heads * d
    wanted = logits(whole, masked)
    torch.testing.assert_close(logits(spec, tensors), wanted, atol=1e-10, rtol=0)
    assert (wanted - logits(model.spec, model.tensors)).abs().max() > 0.01


BY_HEAD = [name for name in VARIANTS if not name.startswith(("qwen3", "gemma3"))]


@pytest.mark.parametrize("name", BY_HEAD)
def test_pairs_of_each_head_leave_the_logits(folders: Path, name: str) -> None:
    """Each layer but the first turns pairs of each KV head's own, and heads move with theirs."""
    model, rng = opened(folders, name), np.random.default_rng(11)
    orders = [rng.permutation(ports.size(block)) for block in model.spec.blocks]
    pair_orders = {b.layer: np.stack([rng.permutation(12) for _ in range(b.n_kv_heads)]) for b in model.spec.attention[1:]}
    spec, tensors = ports.apply(model.spec, model.tensors, orders, pair_orders=pair_orders)
    assert spec.attention[0].pairs is None
    for block in spec.attention[1:]:
        if block.rope != "none":
            groups = orders[next(i for i, b in enumerate(model.spec.blocks) if isinstance(b, Attention) and b.layer == block.layer)]
            assert block.pairs == tuple(tuple(pair_orders[block.layer][group].tolist()) for group in groups)
    assert (tensors["layers.1.wk.weight"].decode() != model.tensors["layers.1.wk.weight"].decode()).any()
    atol = 1e-6 if name == "phi3-longrope" else 1e-10  # its magnitude is divided out of queries, in float32
    torch.testing.assert_close(logits(spec, tensors), logits(model.spec, model.tensors), atol=atol, rtol=0)
    twice, tensors = ports.order_pairs_by_head(spec, tensors, {1: np.tile(np.arange(12)[::-1], (model.spec.attention[1].n_kv_heads, 1))})
    torch.testing.assert_close(logits(twice, tensors), logits(model.spec, model.tensors), atol=atol, rtol=0)


@pytest.mark.parametrize("name", BY_HEAD)
def test_a_cut_of_heads_in_one_layer_equals_masking(folders: Path, name: str) -> None:
    """Layer 1 keeps 16 of 24 dimensions, each KV head pairs of its own; layer 0 stays whole."""
    model, d, rng = opened(folders, name), 16, np.random.default_rng(13)
    attention = model.spec.attention[1]
    order = np.stack([rng.permutation(12) for _ in range(attention.n_kv_heads)])
    whole, sorted_tensors = ports.order_pairs_by_head(model.spec, model.tensors, {1: order})
    masked = dict(sorted_tensors)
    pairs = np.arange(attention.n_heads * 24) % 12 < d // 2
    for kind in ("weight", "bias"):
        if (key := f"layers.1.wq.{kind}") in masked:
            values = masked[key].decode()
            masked[key] = from_values(np.where(pairs if kind == "bias" else pairs[:, None], values, 0), origin=key)
    key = "layers.1.wo.weight"
    masked[key] = from_values(np.where(np.arange(attention.n_heads * 24) % 24 < d, masked[key].decode(), 0), origin=key)
    n = model.spec.n_layers
    kept = Kept(n_ff=(160,) * n, n_kv=tuple(b.n_kv_heads for b in whole.attention), head_dims=tuple(d if i == 1 else 24 for i in range(n)))
    spec, tensors = ports.cut(whole, sorted_tensors, kept)
    assert [block.head_dim for block in spec.attention] == list(kept.head_dims or ())
    assert spec.attention[1].pairs is None or spec.rope_dim(spec.attention[1]) == d
    assert tensors["layers.0.wk.weight"].shape[0] == spec.attention[0].n_kv_heads * 24
    assert tensors["layers.1.wk.weight"].shape[0] == attention.n_kv_heads * d
    wanted = logits(whole, masked)
    torch.testing.assert_close(logits(spec, tensors), wanted, atol=1e-10, rtol=0)
    assert (wanted - logits(model.spec, model.tensors)).abs().max() > 0.01
    one = ports.with_sizes(whole, dataclasses.replace(kept, n_kv=(1,) * n)).attention[1]
    assert one.pairs == (None if one.rope == "none" else (tuple(order[0, : d // 2].tolist()),))


@pytest.mark.parametrize("name", ["llama-biases", "phi3"])
def test_cuts_nest_whatever_the_order(folders: Path, name: str) -> None:
    model = opened(folders, name)
    first, second = (Kept(n_ff=(n, 160), n_kv=(2, k), head_dim=d) for n, k, d in ((96, 2, 20), (64, 1, 16)))
    spec, tensors = ports.cut(*ports.cut(model.spec, model.tensors, first), second)
    wanted_spec, wanted = ports.cut(model.spec, model.tensors, second)
    assert spec.blocks == wanted_spec.blocks == ports.with_sizes(model.spec, second).blocks
    np.testing.assert_allclose(spec.rope.factors, wanted_spec.rope.factors, rtol=1e-12)
    assert tensors.keys() == wanted.keys()
    for key in tensors:
        np.testing.assert_array_equal(tensors[key].decode(), wanted[key].decode())


def test_a_head_size_that_cannot_be(folders: Path) -> None:
    spec = opened(folders, "llama").spec
    for head_dim in (0, 15, 26):
        with pytest.raises(
            UnsupportedError, match=rf"heads of 24 dimensions cannot be cut to {head_dim}\. Keep an even number from 2 to 24"
        ):
            ports.with_sizes(spec, Kept(n_ff=(160,) * 2, n_kv=(2, 2), head_dim=head_dim))
    assert ports.with_sizes(spec, Kept(n_ff=(160,) * 2, n_kv=(2, 2), head_dim=24)) == spec
    for name in ("qwen3", "gemma3"):
        normed = opened(folders, name)
        n = normed.spec.n_layers
        with pytest.raises(
            UnsupportedError, match=rf"{name} normalises queries and keys over the whole head.*: without some dimensions all"
        ):
            ports.cut(normed.spec, normed.tensors, Kept(n_ff=(160,) * n, n_kv=(2,) * n, head_dim=16))
        with pytest.raises(UnsupportedError, match=f"{name} normalises queries and keys over the whole head.*: all heads share them"):
            ports.order_pairs_by_head(normed.spec, normed.tensors, {0: np.tile(np.arange(12), (2, 1))})
    with pytest.raises(UnsupportedError, match=r"heads of 24 dimensions cannot be cut to 15\. Keep an even number"):
        ports.with_sizes(spec, Kept(n_ff=(160,) * 2, n_kv=(2, 2), head_dims=(24, 15)))


def test_pairs_are_ordered_once_and_alike(folders: Path) -> None:
    model = opened(folders, "llama")
    for order in (np.arange(11), np.array([0] * 12)):
        with pytest.raises(UnsupportedError, match=r"an order of pairs names each of 0 to 11 once; got \["):
            ports.order_pairs(model.spec, model.tensors, order)
    first, *rest = model.spec.blocks
    unequal = dataclasses.replace(model.spec, blocks=(dataclasses.replace(first, head_dim=26), *rest))
    with pytest.raises(UnsupportedError, match=r"heads have \[24, 26\] dimensions, of which \[24\] turn: pairs of all layers can only be"):
        ports.order_pairs(unequal, model.tensors, np.arange(12))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_sorted_model_is_the_same_function(folders: Path, name: str) -> None:
    model, rng = opened(folders, name), np.random.default_rng(5)
    orders = [rng.permutation(ports.size(block)) for block in model.spec.blocks]
    rotations = {b.layer: np.linalg.qr(rng.standard_normal((b.n_kv_heads, 24, 24)))[0] for b in model.spec.attention[1:]}
    spec, tensors = ports.apply(model.spec, model.tensors, orders, pair_order=rng.permutation(12), rotations=rotations)
    assert list(tensors) == list(model.tensors)
    assert spec.blocks == model.spec.blocks
    # Rotated values are float32; the rest moves as it is.
    torch.testing.assert_close(logits(spec, tensors), logits(model.spec, model.tensors), atol=2e-5, rtol=0)
    spec, tensors = ports.apply(model.spec, model.tensors, orders)
    assert spec == model.spec
    torch.testing.assert_close(logits(spec, tensors), logits(model.spec, model.tensors), atol=1e-11, rtol=0)


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
