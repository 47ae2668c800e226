"""Kept adapters in llama.cpp: base and adapter side by side against the merged model, for every family, sorted or not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from made_adapters import TOLERANCE, TOLERANCE_GELU, difference, made_adapter, moved, run, write_base
from peft_oracle import base_model

from edgeq.converters.adapters.gguf_writer import lowered_pairs, plan_lora, write_lora
from edgeq.converters.adapters.keep import KeptAdapter, kept_factors
from edgeq.converters.gguf.lowering import lower
from edgeq.deltas.delta import Factors
from edgeq.deltas.merge import merged
from edgeq.errors import OutputError, PlanError, UnsupportedError
from edgeq.gguf_file import read_header
from edgeq.grids import F32, GRIDS
from edgeq.runtime.adapter_file import read_adapter
from edgeq.spec import Attention

FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3", "phi3", "phi3-longrope", "gemma3", "smollm3")
LAYERED = ("llama3", "qwen2", "phi3", "phi3-longrope")


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_equals_merged(family: str, tmp_path: Path) -> None:
    model = base_model(family)
    adapter = made_adapter(model, outer=not model.spec.tied)
    base = write_base(tmp_path / "base.gguf", lower(model))
    write_lora(tmp_path / "lora.gguf", kept_factors(adapter, model), lower(model), grid=F32)
    together = write_base(tmp_path / "merged.gguf", lower(merged(model, [(adapter, 1.0)])))
    found = run({"base": (base, None), "kept": (base, tmp_path / "lora.gguf"), "merged": (together, None)})
    assert difference(found["base"], found["merged"]) > 0.1
    assert difference(found["kept"], found["merged"]) < (TOLERANCE_GELU if family == "gemma3" else TOLERANCE)
    assert set(read_adapter(tmp_path / "lora.gguf").ranks.values()) >= {2, 3}


@pytest.mark.parametrize("heads", [False, True], ids=["groups", "heads"])
@pytest.mark.parametrize("family", LAYERED)
def test_an_adapter_follows_the_sorted_model(family: str, heads: bool, tmp_path: Path) -> None:
    model = base_model(family)
    adapter = made_adapter(model)
    sorted_model, kept = moved(model, kept_factors(adapter, model), heads=heads)
    low = lower(sorted_model, elastic=True)
    assert low.arch == "deci"
    base = write_base(tmp_path / "base.gguf", low)
    write_lora(tmp_path / "lora.gguf", kept, low, grid=F32)
    together = write_base(tmp_path / "merged.gguf", lower(merged(model, [(adapter, 1.0)])))
    found = run({"base": (base, None), "kept": (base, tmp_path / "lora.gguf"), "merged": (together, None)})
    assert difference(found["base"], found["merged"]) > 0.1
    assert difference(found["kept"], found["merged"]) < 3 * TOLERANCE  # rotary divisors and rotated values are rounded as well


def test_parts_of_a_fused_projection_join_exactly(tmp_path: Path) -> None:
    """Adapters of some parts alone, of ranks of their own: ranks add, parts without one stay as they are."""
    model = base_model("phi3")
    one = made_adapter(model, (3,), only=("wq", "wv", "up"))
    two = made_adapter(model, (4,), only=("wv", "gate"), seed=1)
    factors = {**kept_factors(two, model).factors, **kept_factors(one, model).factors}
    factors["layers.0.wv.weight"] = kept_factors(two, model).factors["layers.0.wv.weight"]
    low = lower(model)
    by_name = {pair.name: pair for pair in lowered_pairs(factors, low)}
    assert sorted(by_name) == sorted(f"blk.{i}.{n}.weight" for i in range(2) for n in ("attn_qkv", "ffn_up"))
    assert by_name["blk.0.attn_qkv.weight"].rank == 7  # wq of one adapter, wv of the other
    assert by_name["blk.1.attn_qkv.weight"].rank == 3  # both of one, which share their directions
    assert by_name["blk.0.ffn_up.weight"].rank == 7
    attention = model.spec.attention[0]
    product = by_name["blk.0.attn_qkv.weight"].b @ by_name["blk.0.attn_qkv.weight"].a
    q, kv = attention.n_heads * attention.head_dim, attention.n_kv_heads * attention.head_dim
    np.testing.assert_allclose(product[:q], factors["layers.0.wq.weight"].product(), atol=1e-7)
    assert not product[q : q + kv].any()
    np.testing.assert_allclose(product[q + kv :], factors["layers.0.wv.weight"].product(), atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_smaller_grids_lose_what_they_round(family: str, tmp_path: Path) -> None:
    """A trained adapter's b is small: balanced, F16 keeps it to its 11 bits."""
    model = base_model(family)
    adapter = made_adapter(model, (32,), outer=True)
    tiny = {name: Factors(a=f.a * 2e4, b=f.b / 2e4) for name, f in kept_factors(adapter, model).factors.items()}
    kept = KeptAdapter(name="made", factors=tiny, lost={})
    low = lower(model)
    base = write_base(tmp_path / "base.gguf", low)
    files: dict[str, tuple[Path, Path | None]] = {"base": (base, None)}
    sizes = {}
    for grid in ("F32", "F16", "Q8_0"):
        sizes[grid] = write_lora(tmp_path / f"{grid}.gguf", kept, low, grid=GRIDS[grid]).nbytes
        assert sizes[grid] == (tmp_path / f"{grid}.gguf").stat().st_size == plan_lora(kept, low, GRIDS[grid]).nbytes
        files[grid] = (base, tmp_path / f"{grid}.gguf")
    assert sizes["F32"] > 1.9 * sizes["F16"] > 3.3 * sizes["Q8_0"]
    assert {t.grid.name for t in read_header(tmp_path / "Q8_0.gguf").tensors.values()} == {"Q8_0"}
    found = run(files)
    assert difference(found["F32"], found["base"]) > 0.1
    # ggml rounds activations to F16 and to 8 bits too: 4e-3 and 4e-2 at most seen
    assert 0 < difference(found["F16"], found["F32"]) < 1e-2
    assert 0 < difference(found["Q8_0"], found["F32"]) < 0.1


def test_rows_that_do_not_divide_into_blocks_become_f16() -> None:
    model = base_model("llama")
    plan = plan_lora(kept_factors(made_adapter(model, (5,)), model), lower(model), GRIDS["Q8_0"])
    grids = {t.name: t.grid.name for t in plan.tensors}
    assert grids["blk.0.attn_q.weight.lora_a"] == "Q8_0"
    assert grids["blk.0.attn_q.weight.lora_b"] == "F16"


def test_the_file_says_what_every_reader_needs(tmp_path: Path) -> None:
    model = base_model("llama")
    low = lower(model)
    first, again = tmp_path / "a.gguf", tmp_path / "b.gguf"
    mixed = kept_factors(made_adapter(model), model)
    written = write_lora(first, mixed, low)
    assert write_lora(again, mixed, low).sha256 == written.sha256
    header = read_header(first)
    assert header.value("general.architecture") == "llama"
    assert header.value("general.name") == "made"
    assert header.value("general.base_model.0.name") == "tiny/model"
    assert header.value("adapter.lora.alpha") == 0.0  # ranks differ: all strength is in b
    even = kept_factors(made_adapter(model, (5,)), model)
    write_lora(tmp_path / "c.gguf", even, low)
    assert read_header(tmp_path / "c.gguf").value("adapter.lora.alpha") == 5.0  # 5 / 5, for readers that know no 0
    with pytest.raises(OutputError, match=r"a\.gguf exists and is kept"):
        write_lora(first, mixed, low)


def test_what_cannot_be_written_is_refused() -> None:
    model = base_model("llama")
    low = lower(model)
    kept = kept_factors(made_adapter(model), model)
    with pytest.raises(PlanError, match=r"adapters cannot be written in Q4_0; choose one of F32, F16, Q8_0"):
        plan_lora(kept, low, GRIDS["Q4_0"])
    with pytest.raises(PlanError, match=r"adapter 'made' changes nothing"):
        plan_lora(dataclasses.replace(kept, factors={}), low)
    stranger = {"layers.7.wq.weight": kept.factors["layers.0.wq.weight"]}
    with pytest.raises(UnsupportedError, match=r"the adapter changes layers\.7\.wq\.weight, for which the base file has no tensor"):
        plan_lora(dataclasses.replace(kept, factors=stranger), low)


def test_a_rank_above_the_matrix_is_brought_down_exactly() -> None:
    model = base_model("llama")
    adapter = made_adapter(model, (200,), only=("wk",))
    found = kept_factors(adapter, model).factors["layers.0.wk.weight"]
    attention = model.spec.blocks[0]
    assert isinstance(attention, Attention)
    assert found.rank == attention.n_kv_heads * attention.head_dim
    whole = adapter.deltas["layers.0.wk.weight"].factors()
    assert whole is not None
    np.testing.assert_allclose(found.product(), whole.product(), atol=1e-12)
