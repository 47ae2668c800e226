"""Tiny models of every family, sorted, exported and cut on every port that their architecture has: llama.cpp against the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_models import made_model, made_spec
from real_llama import all_logits
from tiny import N_VOCAB, hf_folder

from edgeq import ports
from edgeq.converters.gguf.carrier import write_model
from edgeq.converters.gguf.lowering import lower
from edgeq.converters.gguf.mixes import choose_grids
from edgeq.converters.sources.gguf import read_gguf_model
from edgeq.converters.sources.resolve import open_model
from edgeq.elastic import Kept
from edgeq.gguf_file import Header, read_header
from edgeq.model import Model
from edgeq.reference import Reference
from edgeq.rope import RopeSpec
from edgeq.runtime.cut import cut_gguf
from edgeq.runtime.gguf_facts import read_facts

N_CTX = 256  # the least that llama.cpp makes; tiny phi3-longrope has other factors from 64 on
IDS = np.random.default_rng(2).integers(3, N_VOCAB, 60).tolist()
# Middle layer gone, sizes of their own in the others; heads of 24 dimensions cut to 16.
LAYERED = Kept(n_ff=(96, 0, 64), n_kv=(1, 0, 2), head_dim=16)


@dataclass(frozen=True)
class Case:
    """A tiny family, with values of its config and of the spec that is read from it, and what to keep."""

    family: str
    kept: Kept = LAYERED
    config: Mapping[str, Any] = field(default_factory=lambda: {"num_hidden_layers": 3})
    spec: Mapping[str, Any] = field(default_factory=dict)


def alike(n_layers: int) -> Kept:
    return Kept(n_ff=(96,) * n_layers, n_kv=(1,) * n_layers)


THREE = {"num_hidden_layers": 3}
LINEAR = RopeSpec(dim=24, base=1e4, kind="linear", factor=4.0)
YARN = RopeSpec(dim=24, base=1e4, kind="yarn", factor=4.0, original_n_ctx=64, attn_factor=1.1386)
LONGROPE = RopeSpec(
    dim=18,
    base=1e4,
    kind="longrope",
    short_factors=tuple(1 + i / 20 for i in range(9)),
    long_factors=tuple(1 + i / 2 for i in range(9)),
    original_n_ctx=N_CTX,
    attn_factor=1.2,
)
CASES = {
    "llama": Case("llama"),
    "llama, every bias": Case("llama", config={**THREE, "attention_bias": True, "mlp_bias": True}),
    "llama 3": Case("llama3"),
    "llama, linear": Case("llama", spec={"rope": LINEAR}),
    "llama, yarn": Case("llama", spec={"rope": YARN}),
    "mistral, whole heads": Case("mistral", kept=dataclasses.replace(LAYERED, head_dim=None)),
    "qwen2": Case("qwen2"),
    "qwen2, heads alone": Case("qwen2", kept=Kept(n_ff=(160,) * 3, n_kv=(2,) * 3, head_dim=8)),
    "phi3": Case("phi3"),
    "phi3, short longrope": Case("phi3", spec={"rope": LONGROPE}),
    "phi3, long longrope": Case("phi3-longrope"),
    "qwen3": Case("qwen3", alike(3)),
    "gemma3": Case("gemma3", alike(3), config={}),
    "smollm3": Case("smollm3", alike(4), config={}),
}
# Sums in another order at logits of standard deviation 1, in F32; llama.cpp's GELU is a table of F16 values, as are F16 weights.
F32_TOLERANCE, GELU_TOLERANCE, F16_TOLERANCE = 1e-4, 1e-2, 2e-2


def sorted_model(case: Case, folder: Path) -> Model:
    """A random order of everything, as sorting leaves a model."""
    model = open_model(str(hf_folder(folder, case.family, **case.config)))
    model = dataclasses.replace(model, spec=dataclasses.replace(model.spec, **case.spec))
    rng = np.random.default_rng(6)
    orders = [rng.permutation(ports.size(block)) for block in model.spec.blocks]
    if case.kept.head_dim is None:
        spec, tensors = ports.apply(model.spec, model.tensors, orders)
    else:
        rotations = {b.layer: np.linalg.qr(rng.standard_normal((b.n_kv_heads, 24, 24)))[0] for b in model.spec.attention}
        spec, tensors = ports.apply(model.spec, model.tensors, orders, pair_order=rng.permutation(12), rotations=rotations)
    assert np.abs(reference_logits(dataclasses.replace(model, spec=spec, tensors=tensors)) - reference_logits(model)).max() < 1e-4
    return dataclasses.replace(model, spec=spec, tensors=tensors)


def reference_logits(model: Model) -> np.ndarray:
    torch.set_num_threads(1)
    reference = Reference(model.spec, model.tensors, dtype=torch.float64)
    return reference.logits(reference.hidden([IDS], n_ctx=N_CTX)[0]).numpy()


def write(path: Path, model: Model, quant: str) -> Path:
    low = lower(model, elastic=True)
    write_model(path, low, choose_grids(quant, low, has_importance=False))
    return path


def data(header: Header, name: str) -> bytes:
    info = header.tensors[name]
    with header.path.open("rb") as file:
        file.seek(info.offset)
        return file.read(info.nbytes)


def assert_same_model(found: Path, expected: Path) -> None:
    """Byte for byte, but for the last bit of rotary divisors and of the magnitude."""
    a, b = read_header(found), read_header(expected)
    assert list(a.tensors) == list(b.tensors)
    assert a.fields.keys() == b.fields.keys()
    for key, stated in a.fields.items():
        magnitude = key.endswith(".attn_factor")
        assert stated.value == (pytest.approx(b.fields[key].value, rel=1e-6) if magnitude else b.fields[key].value), key
    for name in a.tensors:
        assert (a.tensors[name].shape, a.tensors[name].grid) == (b.tensors[name].shape, b.tensors[name].grid)
        if name.startswith("rope_f"):
            np.testing.assert_allclose(np.frombuffer(data(a, name), "<f4"), np.frombuffer(data(b, name), "<f4"), rtol=3e-7)
        else:
            assert data(a, name) == data(b, name)


@pytest.mark.parametrize("name", CASES)
def test_a_cut_on_every_port_is_the_smaller_model(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = sorted_model(case, tmp_path / "hf")
    small = dataclasses.replace(model, **dict(zip(("spec", "tensors"), ports.cut(model.spec, model.tensors, case.kept), strict=True)))
    elastic, cuts = {}, []
    for quant in ("F32", "F16"):
        elastic[quant] = write(tmp_path / f"{quant}.gguf", model, quant)
        cut_gguf(elastic[quant], tmp_path / f"{quant}-cut.gguf", case.kept)
        cuts.append(tmp_path / f"{quant}-cut.gguf")
        assert_same_model(cuts[-1], write(tmp_path / f"{quant}-expected.gguf", small, quant))
    whole, f32, f16 = all_logits([elastic["F32"], *cuts], IDS, n_ctx=N_CTX)
    tolerance = GELU_TOLERANCE if case.family == "gemma3" else F32_TOLERANCE
    assert np.abs(whole - reference_logits(model)).max() < tolerance  # max abs diff before the cut
    expected = reference_logits(small)
    assert np.abs(expected - whole).max() > 0.1
    assert np.abs(f32 - expected).max() < tolerance  # and after it
    assert np.abs(f16 - expected).max() < F16_TOLERANCE
    # What was written is a model that the pipeline reads, of the same function.
    assert np.abs(reference_logits(read_gguf_model(cuts[0])) - expected).max() < F32_TOLERANCE
    assert read_facts(cuts[0]).key_length == small.spec.attention[0].head_dim


@pytest.mark.parametrize(("quant", "head_dim"), [("Q8_0", 64), ("Q4_0", 32), ("Q4_1", 96)])
def test_quantized_heads_are_cut_in_whole_blocks(quant: str, head_dim: int, tmp_path: Path) -> None:
    """And a cut of a cut is the cut, to the last bit of the divisors."""
    model = made_model(made_spec("llama", n_embd=128, n_heads=2, n_kv_heads=1, head_dim=128, n_ff=64))
    spec, tensors = ports.order_pairs(model.spec, model.tensors, np.random.default_rng(0).permutation(64))
    model = dataclasses.replace(model, spec=spec, tensors=tensors)
    elastic = write(tmp_path / "elastic.gguf", model, quant)
    kept = Kept(n_ff=(64, 32), n_kv=(1, 1), head_dim=head_dim)
    cut_gguf(elastic, tmp_path / "cut.gguf", kept)
    smaller = read_gguf_model(tmp_path / "cut.gguf")
    codes = read_gguf_model(elastic)
    spec, tensors = ports.cut(codes.spec, codes.tensors, kept)
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(smaller.tensors[key].decode(), tensor.decode())
    cut_gguf(elastic, tmp_path / "once.gguf", dataclasses.replace(kept, n_ff=(64, 64), head_dim=96 if head_dim < 96 else None))
    cut_gguf(tmp_path / "once.gguf", tmp_path / "twice.gguf", kept)
    assert_same_model(tmp_path / "twice.gguf", tmp_path / "cut.gguf")


def test_a_source_whose_scaling_went_into_divisors_does_not_state_it_again(tmp_path: Path) -> None:
    """A layered GGUF source with linear scaling, sorted: its keys are carried over, but not those."""
    model = open_model(str(hf_folder(tmp_path / "hf", "llama")))
    source = read_gguf_model(
        write(tmp_path / "a.gguf", dataclasses.replace(model, spec=dataclasses.replace(model.spec, rope=LINEAR)), "F32")
    )
    assert source.spec.rope.kind == "linear"
    spec, tensors = ports.order_pairs(source.spec, source.tensors, np.arange(12)[::-1])
    written = write(tmp_path / "b.gguf", dataclasses.replace(source, spec=spec, tensors=tensors), "F32")
    assert not [key for key in read_header(written).fields if key.startswith("deci.rope.scaling.")]
    (ours,) = all_logits([written], IDS, n_ctx=N_CTX)
    assert np.abs(ours - reference_logits(source)).max() < F32_TOLERANCE
