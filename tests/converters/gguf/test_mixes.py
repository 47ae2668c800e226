"""Grid of every tensor, for every quant, against llama_model_quantize's own choice."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_models import made_model, made_spec
from real_llama import quantized_types

from edgeq.converters.gguf.carrier import write_model
from edgeq.converters.gguf.lowering import Lowered, lower
from edgeq.converters.gguf.mixes import QUANTS, choose_grids, fallback_notes, file_type, finer_grid, quant
from edgeq.errors import UnsupportedError
from edgeq.grids import grid
from edgeq.spec import ModelSpec

# Ours alone: a dense MXFP4, and Q4_K without llama-quantize's bumps.
COMPARED = {name: row.file_type for name, row in QUANTS.items() if name not in ("MXFP4", "Q4_K")}

# Rows of 256 show the rules; rows of odd multiples of 32 and of 16 show the fallbacks. gqa 4 and 2; tied and untied.
WIDE = {"n_embd": 256, "n_ff": 256, "n_heads": 8, "n_kv_heads": 2, "head_dim": 32}
NARROW = {"n_embd": 96, "n_ff": 160, "n_heads": 4, "n_kv_heads": 2, "head_dim": 24}
ODD = {"n_embd": 80, "n_ff": 208, "n_heads": 4, "n_kv_heads": 2, "head_dim": 20}
SPECS = {
    "llama": made_spec("llama", n_layers=17, **WIDE),
    "llama-tied": made_spec("llama", n_layers=10, tied=True, **WIDE),
    "llama-odd": made_spec("llama", n_layers=8, **ODD),
    "qwen2": made_spec("qwen2", n_layers=9, **WIDE | {"n_kv_heads": 4}),
    "qwen2-narrow-tied": made_spec("qwen2", n_layers=9, tied=True, **NARROW),
    "phi3": made_spec("phi3", n_layers=10, **WIDE),
    "gemma3": made_spec("gemma3", n_layers=8, tied=True, **WIDE),
    # What llama.cpp takes for 70B models.
    "llama-80": made_spec("llama", n_layers=80, n_embd=256, n_ff=32, n_heads=2, n_kv_heads=1, head_dim=16),
    "llama-80-mha": made_spec("llama", n_layers=80, n_embd=256, n_ff=32, n_heads=2, n_kv_heads=2, head_dim=16),
    "smollm3-80": made_spec("smollm3", n_layers=80, n_embd=256, n_ff=32, n_heads=2, n_kv_heads=1, head_dim=16),
}


def lowered(spec: ModelSpec) -> Lowered:
    return lower(made_model(spec, seed=None))


@pytest.mark.parametrize("name", SPECS)
def test_every_tensor_gets_the_type_that_llama_quantize_gives_it(name: str, tmp_path: Path) -> None:
    low = lowered(SPECS[name])
    path = tmp_path / "f16.gguf"
    write_model(path, low, choose_grids("F16", low, has_importance=False))
    # The rule for 70B concerns Q3_K and Q4_K alone.
    names = [n for n in COMPARED if low.spec.n_layers < 80 or n in ("Q3_K_S", "Q3_K_M", "Q4_K_S", "Q5_K_M")]
    for imatrix in (False, True) if low.spec.n_layers < 80 else (False,):
        theirs = quantized_types(path, [COMPARED[n] for n in names], imatrix=imatrix)
        for quant_name, expected in zip(names, theirs, strict=True):
            ours = {tensor: grid.name for tensor, grid in choose_grids(quant_name, low, has_importance=imatrix).items()}
            assert ours == expected, (quant_name, imatrix)


def test_the_rules_show_in_these_shapes() -> None:
    """Otherwise the comparison above could hold for rules that do nothing."""
    mixed = choose_grids("Q4_K_M", lowered(SPECS["llama"]), has_importance=False)
    assert {g.name for g in mixed.values()} == {"F32", "Q4_K", "Q6_K"}
    assert mixed["blk.0.attn_v.weight"].name == "Q6_K" != mixed["blk.3.attn_v.weight"].name
    odd = choose_grids("Q4_K_M", lowered(SPECS["llama-odd"]), has_importance=False)
    assert {g.name for g in odd.values()} == {"F32", "F16"}
    narrow = choose_grids("Q4_K_M", lowered(SPECS["qwen2-narrow-tied"]), has_importance=False)
    assert {g.name for g in narrow.values()} == {"F32", "Q5_0", "Q8_0"}
    assert narrow["token_embd.weight"].name == "Q8_0"
    with_imatrix, without = (choose_grids("Q4_0", lowered(SPECS["llama"]), has_importance=has) for has in (True, False))
    assert (with_imatrix["blk.0.ffn_down.weight"].name, without["blk.0.ffn_down.weight"].name) == ("Q4_1", "Q4_0")


@pytest.mark.parametrize(("name", "block", "embed"), [("MXFP4", "MXFP4", "Q8_0"), ("Q4_K", "Q4_K", "Q4_K")])
def test_quants_that_are_ours_alone_use_one_grid_for_all_block_matrices(name: str, block: str, embed: str) -> None:
    low = lowered(SPECS["llama"])
    grids = choose_grids(name, low, has_importance=False)
    matrices = {t.name for t in low.tensors if len(t.tensor.shape) == 2 and t.layer is not None}
    assert {grids[t].name for t in matrices} == {block}
    assert grids["token_embd.weight"].name == embed
    assert grids["output.weight"].name == ("Q8_0" if name == "MXFP4" else "Q6_K")
    assert grids["output_norm.weight"].name == "F32"


def test_a_fallback_is_told_once_per_role_with_the_tensor_and_what_it_became() -> None:
    notes = fallback_notes("Q4_K", lowered(SPECS["qwen2-narrow-tied"]), has_importance=False)
    assert notes[0] == (
        "blk.0.attn_q.weight: rows of 96 values do not divide into Q4_K blocks of 256; it and others like it are written as Q5_0."
    )
    assert len(notes) == 7
    assert fallback_notes("Q4_K", lowered(SPECS["llama"]), has_importance=False) == ()


def test_the_file_type_is_that_of_the_quant() -> None:
    low = lowered(SPECS["llama"])
    for name, row in QUANTS.items():
        for imatrix in (False, True):
            assert file_type(low, choose_grids(name, low, has_importance=imatrix)) == row.file_type, name
    some = choose_grids("Q4_K_M", low, has_importance=False) | {"blk.3.ffn_down.weight": quant("Q8_0").base}
    assert file_type(low, some) == QUANTS["Q4_K"].file_type


def test_an_unknown_quant_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match=r"unknown quantization 'Q4_2'; known: F32, F16, BF16, .*Q2_K"):
        quant("Q4_2")


@pytest.mark.parametrize(
    ("wanted", "n_cols", "finer"),
    [("Q4_K", 128, "Q5_0"), ("Q6_K", 96, "Q8_0"), ("Q4_K", 256, None), ("Q4_K", 48, None), ("Q8_0", 48, None), ("F16", 48, None)],
)
def test_rows_that_are_to_be_cut_get_smaller_blocks_where_that_helps(wanted: str, n_cols: int, finer: str | None) -> None:
    found = finer_grid(grid(wanted), n_cols)
    assert (found and found.name) == finer
    assert found is None or found.bits >= grid(wanted).bits
