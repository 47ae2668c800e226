"""A cut on the device is the export of the model that was cut beforehand, and llama.cpp computes with it what the reference does."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from made_models import N_VOCAB, made_model, made_spec
from real_llama import all_logits

from edgeq.converters.gguf.carrier import write_model
from edgeq.converters.gguf.lowering import Lowered, lower
from edgeq.converters.gguf.mixes import choose_grids
from edgeq.elastic import Kept
from edgeq.gguf_file import read_header
from edgeq.model import Model
from edgeq.reference import Reference
from edgeq.rope import RopeSpec
from edgeq.runtime.cut import cut_gguf, cut_to_memory
from edgeq.runtime.cut_plan import Extras
from edgeq.runtime.gguf_facts import read_facts
from edgeq.runtime.llama import LlamaModel
from edgeq.runtime.llama_context import LlamaContext
from edgeq.runtime.memory import kv_bytes
from edgeq.spec import Attention, Block, ModelSpec
from edgeq.tensors import LazyTensor, from_values, map_values, slice_rows

N_LAYERS, N_CTX, HEAD_DIM, GQA = 4, 256, 16, 2
SHAPE = {"n_layers": N_LAYERS, "n_embd": 96, "n_heads": 6, "n_kv_heads": 3, "head_dim": HEAD_DIM, "n_ff": 128}
ROPE = RopeSpec(dim=HEAD_DIM, base=1e4)
ALL_BIASES = frozenset({"wq", "wk", "wv", "wo", "gate", "up", "down"})
LAYERED = Kept(n_ff=(96, 32, 0, 64), n_kv=(2, 0, 0, 1))
UNIFORM = Kept(n_ff=(64,) * N_LAYERS, n_kv=(2,) * N_LAYERS)
CASES: Mapping[str, tuple[ModelSpec, Kept]] = {
    "llama": (made_spec("llama", **SHAPE), LAYERED),
    "llama, tied, every bias": (made_spec("llama", **SHAPE, tied=True, biases=ALL_BIASES), LAYERED),
    "qwen2": (made_spec("qwen2", **SHAPE), LAYERED),
    "phi3": (made_spec("phi3", **SHAPE, rope=dataclasses.replace(ROPE, dim=8)), LAYERED),
    "qwen3": (made_spec("qwen3", **SHAPE), UNIFORM),
    "gemma3": (made_spec("gemma3", **SHAPE), UNIFORM),
    "smollm3": (made_spec("smollm3", **SHAPE), UNIFORM),
}
# Sums in another order at logits with a standard deviation of 0.1; see tests/converters/gguf/test_gguf_logits.py for GELU and F16.
F32_TOLERANCE, GELU_TOLERANCE, F16_TOLERANCE = 2e-5, 2e-3, 5e-3


def sliced(model: Model, kept: Kept) -> Model:
    """The model without what is not kept, in canonical form."""
    blocks: list[Block] = []
    tensors: dict[str, LazyTensor] = {name: t for name, t in model.tensors.items() if not name.startswith("layers.")}
    for block in model.spec.blocks:
        n_ff, n_kv = kept.n_ff[block.layer], kept.n_kv[block.layer]
        n = n_kv if isinstance(block, Attention) else n_ff
        if not n:
            continue
        if isinstance(block, Attention):
            blocks.append(dataclasses.replace(block, n_heads=n * GQA, n_kv_heads=n))
            rows = {"wq": n * GQA * HEAD_DIM, "wk": n * HEAD_DIM, "wv": n * HEAD_DIM}
            cols, roles = {"wo": n * GQA * HEAD_DIM}, ("attn_norm", "wq", "wk", "wv", "wo", "q_norm", "k_norm", "post_attn_norm")
        else:
            blocks.append(dataclasses.replace(block, n_ff=n))
            rows, cols, roles = {"gate": n, "up": n}, {"down": n}, ("mlp_norm", "gate", "up", "down", "post_mlp_norm")
        for role in roles:
            for kind in ("weight", "bias"):
                name = f"layers.{block.layer}.{role}.{kind}"
                if name in model.tensors:
                    tensors[name] = _slice(model.tensors[name], rows.get(role), cols.get(role) if kind == "weight" else None)
    return dataclasses.replace(model, spec=dataclasses.replace(model.spec, blocks=tuple(blocks)), tensors=tensors)


def _slice(tensor: LazyTensor, rows: int | None, cols: int | None) -> LazyTensor:
    if rows is not None:
        return slice_rows(tensor, 0, rows)
    if cols is not None:
        return map_values(tensor, lambda values: values[:, :cols], shape=(tensor.shape[0], cols))
    return tensor


def write(path: Path, low: Lowered, quant: str) -> Path:
    write_model(path, low, choose_grids(quant, low, has_importance=False))
    return path


def reference_logits(model: Model, ids: list[int]) -> np.ndarray:
    reference = Reference(model.spec, model.tensors, dtype=torch.float64)
    return reference.logits(reference.hidden([ids], n_ctx=N_CTX)[0]).numpy()


@pytest.fixture
def ids() -> list[int]:
    return np.random.default_rng(2).integers(3, N_VOCAB, 60).tolist()


@pytest.mark.parametrize("case", CASES)
def test_a_cut_equals_the_export_of_the_sliced_model_and_the_reference(case: str, ids: list[int], tmp_path: Path) -> None:
    spec, kept = CASES[case]
    model = made_model(spec)
    paths = []
    for quant in ("F32", "F16", "Q8_0", "Q4_0"):
        elastic = write(tmp_path / f"{quant}-elastic.gguf", lower(model, elastic=True), quant)
        cut_gguf(elastic, tmp_path / f"{quant}.gguf", kept)
        expected = write(tmp_path / f"{quant}-expected.gguf", lower(sliced(model, kept), elastic=True), quant)
        assert (tmp_path / f"{quant}.gguf").read_bytes() == expected.read_bytes()
        paths.append(tmp_path / f"{quant}.gguf")
    f32, f16 = all_logits(paths[:2], ids, n_ctx=N_CTX)
    expected_logits = reference_logits(sliced(model, kept), ids)
    assert np.abs(expected_logits - reference_logits(model, ids)).max() > 0.05
    assert np.abs(f32 - expected_logits).max() < (GELU_TOLERANCE if case == "gemma3" else F32_TOLERANCE)
    assert np.abs(f16 - expected_logits).max() < F16_TOLERANCE


def test_an_added_bias_is_added(ids: list[int], tmp_path: Path) -> None:
    """What mean compensation needs: a bias of down that depends on the cut, in a model that has none."""
    model = made_model(made_spec("llama", **SHAPE))
    values = {i: np.random.default_rng(i).standard_normal(96).astype(np.float32) for i in (0, 1, 3)}
    elastic = write(tmp_path / "elastic.gguf", lower(model, elastic=True), "F32")
    cut_gguf(elastic, tmp_path / "plain.gguf", LAYERED)
    extras = Extras(add={f"blk.{i}.ffn_down.bias": v for i, v in values.items()})
    cut_gguf(elastic, tmp_path / "biased.gguf", LAYERED, extras=extras)
    small = sliced(model, LAYERED)
    tensors = {**small.tensors, **{f"layers.{i}.down.bias": from_values(v, origin="bias") for i, v in values.items()}}
    biased = dataclasses.replace(small, spec=dataclasses.replace(small.spec, biases=frozenset({"down"})), tensors=tensors)
    plain, ours = all_logits([tmp_path / "plain.gguf", tmp_path / "biased.gguf"], ids, n_ctx=N_CTX)
    assert np.abs(ours - plain).max() > 0.05
    assert np.abs(ours - reference_logits(biased, ids)).max() < F32_TOLERANCE
    # And it is a model that the pipeline reads.
    assert (tmp_path / "biased.gguf").read_bytes() == write(tmp_path / "again.gguf", lower(biased), "F32").read_bytes()


def test_a_cut_in_memory_runs_and_outlives_its_file(ids: list[int], tmp_path: Path) -> None:
    model = made_model(made_spec("qwen2", **SHAPE))
    elastic = write(tmp_path / "elastic.gguf", lower(model, elastic=True), "F32")
    with cut_to_memory(elastic, LAYERED) as small:
        loaded = LlamaModel.load(small.path)
    with loaded, LlamaContext(loaded, n_ctx=N_CTX, kv_type="f32") as context:
        logits = context.decode(ids)
        expected = reference_logits(sliced(model, LAYERED), ids)
        assert np.abs(logits[-1] - expected[-1]).max() < F16_TOLERANCE  # flash attention works in F16


def test_facts_of_a_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And the cache, which has nothing for layers without attention, is what llama.cpp allocates."""
    elastic = write(tmp_path / "elastic.gguf", lower(made_model(made_spec("llama", **SHAPE)), elastic=True), "F32")
    cut_gguf(elastic, tmp_path / "cut.gguf", LAYERED)
    facts = read_facts(tmp_path / "cut.gguf")
    assert facts.n_heads == (4, 0, 0, 2)
    assert facts.n_kv_heads == (2, 0, 0, 1)
    assert facts.tensor_bytes == sum(t.nbytes for t in read_header(tmp_path / "cut.gguf").tensors.values())
    expected = kv_bytes(facts, 8192, "f32")
    assert expected == 8192 * 4 * 2 * HEAD_DIM * (2 + 1)
    with (
        caplog.at_level(logging.DEBUG, logger="edgeq.runtime.llama"),
        LlamaModel.load(facts.path) as model,
        LlamaContext(model, n_ctx=8192, threads=1, kv_type="f32", flash_attention=True),
    ):
        (said,) = (float(mib) for mib in re.findall(r"KV buffer size =\s+([\d.]+) MiB", caplog.text))
    assert said == pytest.approx(expected / 2**20, abs=0.006)
