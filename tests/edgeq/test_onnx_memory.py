"""Memory of ONNX Runtime, foretold: against what was measured for SmolLM2-135M, and against the sizes of caches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from edgeq.device_memory import TensorPlan
from edgeq.footprint import CUDA_BYTES, MIB
from edgeq.grids import GRIDS
from edgeq.onnx_memory import OnnxRuntimeMemory, compute_bytes, kv_bytes
from edgeq.profiles import load_profile
from edgeq.rope import RopeSpec
from edgeq.spec import Attention, Mlp, ModelSpec

SMOLLM2 = ModelSpec(
    family="llama",
    n_embd=576,
    n_vocab=49152,
    n_ctx=8192,
    blocks=tuple(block for i in range(30) for block in (Attention(layer=i, n_heads=9, n_kv_heads=3, head_dim=64), Mlp(layer=i, n_ff=1536))),
    rope=RopeSpec(dim=64, base=100000.0),
    norm_eps=1e-5,
    tied=True,
    attn_scale=0.125,
)


def plans(nbytes: int, grid: str) -> list[TensorPlan]:
    shared: dict[str, Any] = {"layer": None, "shape": (49152, 576), "source_grid": GRIDS["F32"], "grid": GRIDS[grid], "action": "encode"}
    return [TensorPlan(name="all", role="embed", nbytes=nbytes, **shared)]


@pytest.mark.parametrize(
    ("grid", "file_mib", "half", "measured_mib"),
    [("Q4_0", 87.8, False, 261.7), ("F16", 257.6, True, 649.8)],  # resident, with libraries and tokenizer, an empty cache of 512 tokens
)
def test_what_was_measured(grid: str, file_mib: float, half: bool, measured_mib: float) -> None:
    found = OnnxRuntimeMemory((), half=half).estimate(
        load_profile("laptop-cpu"), SMOLLM2, plans(round(file_mib * MIB), grid), n_ctx=512, kv_type="f32"
    )
    loaded = found.model_bytes + found.runtime_bytes
    assert loaded / MIB == pytest.approx(measured_mib, rel=0.06)
    assert found.reclaimable_bytes == round(file_mib * MIB)
    assert found.host_bytes == 0
    assert found.total_bytes == loaded + found.kv_bytes + found.compute_bytes


def test_the_cache_is_exact_and_per_layer() -> None:
    assert kv_bytes(SMOLLM2, 4096, half=False) == 30 * 2 * 3 * 64 * 4096 * 4
    smaller = replace(SMOLLM2, blocks=(replace(SMOLLM2.attention[0], n_kv_heads=1, n_heads=3), *SMOLLM2.blocks[1:]))
    assert kv_bytes(smaller, 100, half=True) == kv_bytes(SMOLLM2, 100, half=True) - 2 * 2 * 64 * 100 * 2


def test_compute_grows_with_the_prompt() -> None:
    assert 20 * MIB < compute_bytes(SMOLLM2, 512, half=False) < 43 * MIB
    assert compute_bytes(SMOLLM2, 1, half=False) < MIB


def test_a_discrete_gpu_holds_weights_and_cache() -> None:
    found = OnnxRuntimeMemory((), half=True).estimate(load_profile("server-h100"), SMOLLM2, plans(MIB, "Q4_0"), n_ctx=512, kv_type="f16")
    assert (found.model_bytes, found.runtime_bytes, found.reclaimable_bytes) == (MIB, CUDA_BYTES, 0)
    assert found.host_bytes > 70 * MIB


@pytest.mark.parametrize(
    ("kind", "half", "notes"), [("f32", False, []), ("f16", False, []), ("q8_0", False, ["cache: f32 in place of q8_0"])]
)
def test_the_cache_is_of_the_graphs_type(kind: str, half: bool, notes: list[str]) -> None:
    profile = load_profile("laptop-cpu")
    profile = replace(profile, export=replace(profile.export, kv_type=kind))
    found, said = OnnxRuntimeMemory(("int4",), half=half).kv_type(profile, SMOLLM2)
    assert found == "f32"
    assert [note.split(",")[0] for note in said] == notes
    assert OnnxRuntimeMemory(("int4",), half=True).kv_type(profile, SMOLLM2)[0] == "f16"
    assert tuple(OnnxRuntimeMemory(("int4",), half=True).quants(profile)) == ("int4",)
