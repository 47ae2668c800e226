"""Names, order and row layout of the tensors of a GGUF file."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_models import made_model, made_spec

from edgeq.calibration import Importance
from edgeq.converters.gguf.carrier import write_model
from edgeq.converters.gguf.lowering import CarrierTensor, Lowered, expected_shapes, interleaved, lower
from edgeq.converters.gguf.mixes import choose_grids
from edgeq.converters.sources.gguf import read_gguf_model, rotate_half_rows
from edgeq.errors import ShapeError, SourceError, UnsupportedError
from edgeq.families import FAMILIES, GGUF_NAMES, family
from edgeq.grids import F32
from edgeq.model import Model
from edgeq.rope import RopeSpec
from edgeq.tensors import from_values


def by_name(low: Lowered) -> dict[str, CarrierTensor]:
    return {t.name: t for t in low.tensors}


def test_names_order_roles_and_importance_keys() -> None:
    low = lower(made_model(made_spec("qwen2", n_layers=1, n_embd=96)))
    assert [(t.name, t.role, t.layer, t.importance_key) for t in low.tensors] == [
        ("token_embd.weight", "embed", None, None),
        ("blk.0.attn_norm.weight", "attn_norm", 0, None),
        ("blk.0.attn_q.weight", "wq", 0, "layers.0.wq"),
        ("blk.0.attn_q.bias", "wq.bias", 0, None),
        ("blk.0.attn_k.weight", "wk", 0, "layers.0.wk"),
        ("blk.0.attn_k.bias", "wk.bias", 0, None),
        ("blk.0.attn_v.weight", "wv", 0, "layers.0.wv"),
        ("blk.0.attn_v.bias", "wv.bias", 0, None),
        ("blk.0.attn_output.weight", "wo", 0, "layers.0.wo"),
        ("blk.0.ffn_norm.weight", "mlp_norm", 0, None),
        ("blk.0.ffn_gate.weight", "gate", 0, "layers.0.gate"),
        ("blk.0.ffn_up.weight", "up", 0, "layers.0.up"),
        ("blk.0.ffn_down.weight", "down", 0, "layers.0.down"),
        ("output_norm.weight", "final_norm", None, None),
        ("output.weight", "head", None, "head"),
    ]
    assert low.arch == "qwen2"
    assert not low.carried


def test_a_tied_head_is_not_written_and_lends_the_embedding_its_importance() -> None:
    low = by_name(lower(made_model(made_spec(tied=True))))
    assert "output.weight" not in low
    assert low["token_embd.weight"].importance_key == "head"


def test_joined_projections_stand_in_the_order_the_graph_cuts_them() -> None:
    model = made_model(made_spec("phi3", n_embd=96))
    low = by_name(lower(model))
    assert not {"blk.0.attn_q.weight", "blk.0.ffn_gate.weight"} & low.keys()
    qkv, up = low["blk.1.attn_qkv.weight"], low["blk.1.ffn_up.weight"]
    assert (qkv.role, qkv.importance_key, up.role, up.importance_key) == ("wqkv", "layers.1.wq", "gate_up", "layers.1.gate")
    parts = [model.tensors[f"layers.1.{role}.weight"].decode() for role in ("wq", "wk", "wv")]
    assert np.array_equal(qkv.tensor.decode(), np.concatenate(parts))
    assert np.array_equal(up.tensor.decode(), np.concatenate([model.tensors[f"layers.1.{r}.weight"].decode() for r in ("gate", "up")]))


def test_q_and_k_and_their_biases_are_interleaved_where_the_graph_rotates_neighbours() -> None:
    spec = made_spec("llama", biases=frozenset({"wq", "wk", "wv", "wo"}))
    model = made_model(spec)
    low = by_name(lower(model))
    for role, heads in (("wq", 4), ("wk", 2)):
        for kind in ("weight", "bias"):
            mine = low[f"{GGUF_NAMES[role].format(i=0)}.{kind}"].tensor.decode()
            source = model.tensors[f"layers.0.{role}.{kind}"].decode()
            halves = source.reshape(heads, 2, 12, *source.shape[1:])
            assert np.array_equal(mine, halves.swapaxes(1, 2).reshape(source.shape))
    for role in ("wv", "wo"):
        assert np.array_equal(
            low[f"{GGUF_NAMES[role].format(i=0)}.weight"].tensor.decode(), model.tensors[f"layers.0.{role}.weight"].decode()
        )


@given(n_heads=st.integers(1, 9), half=st.integers(1, 20))
def test_interleaving_undoes_what_the_gguf_reader_does(n_heads: int, half: int) -> None:
    there, back = interleaved(n_heads, 2 * half, 2 * half), rotate_half_rows(n_heads, 2 * half)
    assert np.array_equal(there[back], np.arange(2 * half * n_heads))
    assert np.array_equal(back[there], np.arange(2 * half * n_heads))


def test_dimensions_that_do_not_rotate_stay_where_they_are() -> None:
    assert interleaved(2, 6, 4).tolist() == [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]


def test_vectors_are_float32_whatever_the_source_has() -> None:
    low = lower(made_model(made_spec("gemma3", n_layers=3), seed=None))
    assert {t.tensor.grid for t in low.tensors if len(t.tensor.shape) == 1} == {F32}


def test_rope_factors_become_tensors() -> None:
    factors = tuple(1.0 + 0.25 * i for i in range(12))
    low = by_name(lower(made_model(made_spec(rope=RopeSpec(dim=24, base=1e4, kind="factors", factors=factors)))))
    assert low["rope_freqs.weight"].tensor.decode().tolist() == list(factors)
    assert low["rope_freqs.weight"].role == "rope_factors"
    rope = RopeSpec(dim=24, base=1e4, kind="longrope", short_factors=factors, long_factors=(2.0,) * 12, original_n_ctx=64)
    low = by_name(lower(made_model(made_spec("phi3", n_embd=96, rope=rope))))
    assert low["rope_factors_long.weight"].tensor.decode().tolist() == [2.0] * 12
    assert low["rope_factors_short.weight"].tensor.decode().tolist() == list(factors)


def test_a_yarn_ramp_without_keys_is_written_as_factors() -> None:
    rope = RopeSpec(dim=24, base=1e4, kind="yarn", factor=4.0, original_n_ctx=64, beta_fast=8.0)
    factors = by_name(lower(made_model(made_spec(rope=rope))))["rope_freqs.weight"].tensor.decode()
    plain = 1e4 ** -(np.arange(0, 24, 2) / 24)
    assert plain / factors == pytest.approx(rope.frequencies(1), rel=1e-6)
    assert factors.min() == 1.0
    assert factors.max() == 4.0


def test_an_attention_scale_of_its_own_goes_into_q_norm() -> None:
    spec = made_spec("gemma3", n_layers=62, n_embd=64, n_heads=4, head_dim=24, attn_scale=1 / math.sqrt(24))
    model = made_model(spec)
    low = by_name(lower(model))
    # With 62 layers the graph divides by sqrt(64 / 4) = 4.
    expected = model.tensors["layers.5.q_norm.weight"].decode() * np.float32(4 / math.sqrt(24))
    assert low["blk.5.attn_q_norm.weight"].tensor.decode() == pytest.approx(expected, rel=1e-6)
    assert np.array_equal(low["blk.5.attn_k_norm.weight"].tensor.decode(), model.tensors["layers.5.k_norm.weight"].decode())
    usual = dataclasses.replace(spec, attn_scale=0.25)
    low = by_name(lower(made_model(usual)))
    assert np.array_equal(low["blk.5.attn_q_norm.weight"].tensor.decode(), model.tensors["layers.5.q_norm.weight"].decode())


def test_tensors_must_be_those_of_the_spec() -> None:
    model = made_model(made_spec())
    without = dataclasses.replace(model, tensors={k: t for k, t in model.tensors.items() if k != "layers.1.up.weight"})
    with pytest.raises(SourceError, match=r"made: tensor layers\.1\.up\.weight is missing"):
        lower(without)
    wrong = from_values(np.zeros((160, 63), np.float32), origin="file: up")
    with pytest.raises(ShapeError, match=r"file: up: shape \[160, 63\], expected \[160, 64\] for layers\.1\.up\.weight"):
        lower(made_model(made_spec(), tensors={"layers.1.up.weight": wrong}))
    extra = from_values(np.zeros(3, np.float32), origin="x")
    with pytest.raises(UnsupportedError, match=r"made: tensor layers\.0\.wo\.bias has no place in a GGUF file of this architecture"):
        lower(made_model(made_spec(), tensors={"layers.0.wo.bias": extra}))


@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.name)
def test_expected_shapes_name_every_role_of_a_family(row: object) -> None:
    name = row.name  # type: ignore[attr-defined]
    spec = made_spec(name, n_embd=96)
    roles = {key.split(".")[2] for key in expected_shapes(spec) if key.startswith("layers.0.")}
    assert roles == set(family(name).roles)


@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.name)
def test_a_gguf_source_goes_back_as_the_same_file(row: object, tmp_path: Path) -> None:
    """Written in blocks, read, lowered and written again: not a byte differs, whatever rows the reader moved."""
    name = row.name  # type: ignore[attr-defined]
    low = lower(made_model(made_spec(name, n_layers=3, n_embd=96, n_heads=3, n_kv_heads=1, head_dim=32)))
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    grids = choose_grids("Q4_0", low, has_importance=False)
    write_model(first, low, grids)
    model: Model = read_gguf_model(first)
    again = lower(model)
    assert again.carried
    assert [t.name for t in again.tensors] == [t.name for t in low.tensors]
    assert {t.name: t.tensor.grid for t in again.tensors} == grids
    write_model(second, again, choose_grids("Q4_0", again, has_importance=False))
    assert first.read_bytes() == second.read_bytes()


def test_importance_keys_are_those_of_calibration() -> None:
    """Calibration knows linears by these names; a key it does not have would silently weigh nothing."""
    known: Importance = {
        f"layers.{i}.{r}": np.ones(1, np.float32) for i in range(2) for r in ("wq", "wk", "wv", "wo", "gate", "up", "down")
    }
    for name in ("llama", "phi3"):
        low = lower(made_model(made_spec(name, n_embd=96)))
        keys = {t.importance_key for t in low.tensors} - {None}
        assert keys <= known.keys() | {"head"}
