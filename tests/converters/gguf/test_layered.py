"""The layered architecture (deci): the same logits as a family's own, with sizes per layer, and back through the reader."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_models import N_VOCAB, made_model, made_spec
from real_llama import all_logits
from test_gguf_logits import F32_TOLERANCE, N_CTX, N_TOKENS, VARIANTS
from tiny import N_VOCAB as TINY_VOCAB
from tiny import hf_folder

from edgeq.converters.gguf.carrier import write_model
from edgeq.converters.gguf.graph_rope import graph_rope
from edgeq.converters.gguf.lowering import Lowered, lower
from edgeq.converters.gguf.mixes import choose_grids
from edgeq.converters.sources.gguf import read_gguf_model
from edgeq.converters.sources.resolve import open_model
from edgeq.families import family
from edgeq.grids import F32
from edgeq.model import Model
from edgeq.reference import Reference
from edgeq.rope import NEVER, RopeSpec
from edgeq.spec import ModelSpec

LAYERED = {name: case for name, case in VARIANTS.items() if name.split("-")[0] in ("llama", "llama3", "mistral", "qwen2", "phi3")}


def write(path: Path, low: Lowered, quant: str = "F32") -> Path:
    write_model(path, low, choose_grids(quant, low, has_importance=False))
    return path


def reference_logits(model: Model, ids: list[int], *, n_ctx: int = N_CTX) -> np.ndarray:
    reference = Reference(model.spec, model.tensors, dtype=torch.float64)
    return reference.logits(reference.hidden([ids], n_ctx=n_ctx)[0]).numpy()


@pytest.mark.parametrize("variant", LAYERED)
def test_at_full_width_it_computes_what_the_familys_own_architecture_does(variant: str, tmp_path: Path) -> None:
    name, changes = LAYERED[variant]
    model = open_model(hf_folder(tmp_path / name, name, **changes))
    ids = torch.randint(3, TINY_VOCAB, (N_TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    paths = [write(tmp_path / "native.gguf", lower(model)), write(tmp_path / "deci.gguf", lower(model, elastic=True))]
    native, ours = all_logits(paths, ids, n_ctx=N_CTX)
    assert native.std() > 0.3
    assert np.abs(ours - native).max() < F32_TOLERANCE
    # What was written is read back as the same function.
    back = read_gguf_model(paths[1])
    assert back.spec.family == "llama"
    # The file keeps rotary factors in float32: 1e-4 of an angle at position 100 at most.
    assert np.abs(reference_logits(back, ids) - ours).max() < F32_TOLERANCE


def sized(name: str, sizes: tuple[tuple[int, int], ...], **changes: Any) -> ModelSpec:
    """A spec with (kv heads, n_ff) of each layer; 0 leaves the block out. Two query heads per kv head."""
    full = made_spec(name, n_layers=len(sizes), **changes)
    blocks = []
    for attention, mlp, (n_kv, n_ff) in zip(full.attention, full.mlps, sizes, strict=True):
        if n_kv:
            blocks.append(dataclasses.replace(attention, n_heads=2 * n_kv, n_kv_heads=n_kv))
        if n_ff:
            blocks.append(dataclasses.replace(mlp, n_ff=n_ff))
    return dataclasses.replace(full, blocks=tuple(blocks))


FACTORS = RopeSpec(dim=24, base=1e4, kind="factors", factors=tuple(1 + 0.25 * i for i in range(12)))
PARTIAL = RopeSpec(dim=12, base=1e4, attn_factor=1.25)
UNEQUAL: dict[str, ModelSpec] = {
    "llama": sized("llama", ((2, 160), (1, 64), (2, 32))),
    "every bias": sized("llama", ((2, 64), (1, 160)), biases=frozenset({"wq", "wk", "wv", "wo", "gate", "up", "down"})),
    "attention gone": sized("llama", ((1, 64), (0, 96), (2, 160), (0, 32)), rope=FACTORS),
    "layer gone": sized("llama", ((2, 64), (0, 0), (1, 96)), tied=True),
    "qwen2": sized("qwen2", ((2, 96), (1, 160), (2, 32)), n_embd=96),
    "phi3": sized("phi3", ((2, 96), (1, 160)), n_embd=96, rope=PARTIAL),
}


@pytest.mark.parametrize("case", UNEQUAL)
def test_sizes_per_layer_equal_the_reference(case: str, tmp_path: Path) -> None:
    model = made_model(UNEQUAL[case])
    low = lower(model)
    assert low.arch == "deci"
    ids = np.random.default_rng(2).integers(3, N_VOCAB, 60).tolist()
    path = write(tmp_path / "m.gguf", low)
    (ours,) = all_logits([path], ids, n_ctx=N_CTX)
    expected = reference_logits(model, ids)
    assert expected.std() > 0.05
    assert np.abs(ours - expected).max() < F32_TOLERANCE / 4
    back = read_gguf_model(path)
    assert [dataclasses.replace(b, layer=0) for b in back.spec.blocks] == [dataclasses.replace(b, layer=0) for b in model.spec.blocks]
    assert [b.layer for b in back.spec.blocks] == [b.layer for b in model.spec.blocks]
    assert back.spec.biases == model.spec.biases


@pytest.mark.parametrize("case", UNEQUAL)
def test_a_layered_source_goes_back_as_the_same_file(case: str, tmp_path: Path) -> None:
    first = write(tmp_path / "a.gguf", lower(made_model(UNEQUAL[case])), "Q8_0")
    second = write(tmp_path / "b.gguf", lower(read_gguf_model(first)), "Q8_0")
    assert first.read_bytes() == second.read_bytes()


def test_a_layered_source_of_equal_layers_stays_layered(tmp_path: Path) -> None:
    first = write(tmp_path / "a.gguf", lower(made_model(made_spec()), elastic=True))
    low = lower(read_gguf_model(first))
    assert low.arch == "deci"
    assert write(tmp_path / "b.gguf", low).read_bytes() == first.read_bytes()


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_a_gguf_source_of_another_architecture_becomes_a_layered_file(name: str, tmp_path: Path) -> None:
    """Codes stay: rows of q and k move, fused ones come apart. Keys take the new prefix, and rotation is stated anew."""
    rope = RopeSpec(dim=24, base=5000.0, kind="yarn", factor=4.0, original_n_ctx=64, attn_factor=1.138629) if name == "qwen2" else None
    changes = {} if rope is None else {"rope": rope}
    if name == "phi3":
        changes["rope"] = RopeSpec(dim=12, base=5000.0, kind="linear", factor=2.0)
    native = write(tmp_path / "native.gguf", lower(made_model(made_spec(name, n_embd=96, **changes))), "Q8_0")
    source = read_gguf_model(native)
    low = lower(source, elastic=True)
    grids = choose_grids("Q8_0", low, has_importance=False)
    assert all(t.tensor.grid == grids[t.name] for t in low.tensors)
    keys = {f.key: f.value for f in low.fields}
    assert not [key for key in keys if key.startswith(f"{name}.")]
    assert keys["general.architecture"] == "deci"
    assert keys["deci.feed_forward_length"] == [160, 160]
    assert keys["deci.attention.head_count_kv"] == [2, 2]
    ids = np.random.default_rng(2).integers(3, N_VOCAB, 100).tolist()
    layered = write(tmp_path / "deci.gguf", low, "Q8_0")
    expected = reference_logits(source, ids)
    assert np.abs(reference_logits(read_gguf_model(layered), ids) - expected).max() < 1e-6
    theirs, ours = all_logits([native, layered], ids, n_ctx=N_CTX)
    # Q8_0 products round activations to 8 bits, where a last bit of another sum can tip a value over: 2e-3 at most seen.
    assert np.abs(theirs - ours).max() < 1e-2
    assert expected.std() > 0.05


def test_partial_rotation_is_written_as_pairs_that_never_turn() -> None:
    low = {t.name: t for t in lower(made_model(UNEQUAL["phi3"])).tensors}
    factors = low["rope_freqs.weight"].tensor.decode()
    assert factors[6:].tolist() == [np.float32(NEVER)] * 6
    plain = 1e4 ** -(np.arange(0, 24, 2) / 24)
    assert (plain / factors)[:6] == pytest.approx(PARTIAL.frequencies(1), rel=1e-6)
    q = low["blk.0.attn_q.weight"].tensor
    assert q.grid is F32  # divided by the magnitude where it stays put


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "smollm3"])
def test_a_head_that_rotates_whole_keeps_its_rope(name: str) -> None:
    from edgeq.converters.gguf.architectures import arch_for

    spec = made_spec(name, n_embd=96)
    assert graph_rope(spec, arch_for(spec, elastic=True)) is spec.rope
    assert family(name).gguf_layered == ("deci" if name in ("llama", "qwen2") else None)
