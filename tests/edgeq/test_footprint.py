import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from model_shapes import SHAPES, header_only, shape_spec

from edgeq.errors import PlanError
from edgeq.footprint import MIB, N_OUTPUTS, compute_bytes, has_flash_attention, is_repacked, kv_bytes, process_bytes
from edgeq.grids import grid

CONTEXTS = (512, 4096, 32768)


@pytest.fixture(scope="module")
def said_by_llama(tmp_path_factory):
    """What llama.cpp allocates, by (shape, n_ctx, kv_type, flash, n_outputs, n_ubatch, swa_full)."""
    keys = list(itertools.product(SHAPES, CONTEXTS, ["f16"], [True, False], [1], [512], [False]))
    keys += list(itertools.product(SHAPES, CONTEXTS[:2], ["f16"], [True], [N_OUTPUTS], [512], [False]))
    keys += [(shape, 4096, "q8_0", True, 1, 512, False) for shape in SHAPES if shape_spec(shape).attention[0].head_dim % 32 == 0]
    keys += [(shape, n_ctx, "f16", True, 1, 128, False) for shape in SHAPES for n_ctx in (300, 4096)]
    keys += [("gemma3-1b", 4096, "f16", True, 1, 512, True)]
    folder = tmp_path_factory.mktemp("headers")
    paths = {shape: str(header_only(folder / f"{shape}.gguf", shape_spec(shape))) for shape in SHAPES}
    names = ("n_ctx", "kv_type", "flash", "n_outputs", "n_ubatch", "swa_full")
    cases = [{"path": paths[key[0]], **dict(zip(names, key[1:], strict=True))} for key in keys]
    program = Path(__file__).with_name("llama_reserve.py")
    done = subprocess.run([sys.executable, program], input=json.dumps(cases), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(keys, json.loads(done.stdout), strict=True))


def test_cache_is_as_llama_allocates_it(said_by_llama):
    for (shape, n_ctx, kv_type, flash, _, n_ubatch, swa_full), said in said_by_llama.items():
        ours = kv_bytes(shape_spec(shape), n_ctx, kv_type, n_ubatch=n_ubatch, swa_full=swa_full, flash_attention=flash)
        # The log has two decimals for each of up to two caches.
        assert ours / MIB == pytest.approx(said["kv_mib"], abs=0.011), (shape, n_ctx, kv_type, n_ubatch, swa_full)


def test_compute_buffer_is_near_what_llama_reserves(said_by_llama):
    """10 %: where the logits are the largest value, ggml's allocator leaves holes of a few per cent beside them."""
    for (shape, n_ctx, kv_type, flash, n_outputs, n_ubatch, swa_full), said in said_by_llama.items():
        if kv_type == "f16" and not swa_full:
            ours = compute_bytes(shape_spec(shape), n_ctx, n_ubatch=n_ubatch, n_outputs=n_outputs, flash_attention=flash) / MIB
            assert ours == pytest.approx(said["compute_mib"], rel=0.1), (shape, n_ctx, flash, n_outputs, n_ubatch)


def test_examples_of_cache_sizes():
    llama = shape_spec("llama-8b")
    assert kv_bytes(llama, 4096, "f16") == 2 * 32 * 4096 * 8 * 128 * 2 == 512 * MIB
    assert kv_bytes(llama, 4096, "q8_0") == 512 * MIB * 34 // 64
    assert kv_bytes(llama, 1, "f16") == kv_bytes(llama, 256, "f16") < kv_bytes(llama, 257, "f16") == kv_bytes(llama, 512, "f16")
    assert kv_bytes(llama, 4096, "f16", layers={0, 31}) * 16 == kv_bytes(llama, 4096, "f16")


def test_windows_count_only_where_llama_applies_them():
    gemma, llama = shape_spec("gemma3-1b"), shape_spec("llama-1b")
    windowed = replace(llama, blocks=tuple(replace(b, window=512) if hasattr(b, "window") else b for b in llama.blocks))
    assert kv_bytes(windowed, 4096, "f16") == kv_bytes(llama, 4096, "f16")
    assert kv_bytes(gemma, 4096, "f16") < kv_bytes(gemma, 4096, "f16", swa_full=True)


def test_without_flash_attention_values_are_as_wide_as_the_widest_layer():
    spec = shape_spec("tiny")
    narrow = replace(
        spec, blocks=(*spec.blocks[:2], *(replace(b, n_kv_heads=1) if hasattr(b, "n_kv_heads") else b for b in spec.blocks[2:]))
    )
    # keys: 2 + 3 x 1 heads; values: 4 x 2 heads; 24 dimensions of 2 bytes
    assert kv_bytes(narrow, 256, "f16", flash_attention=False) == 256 * (5 + 8) * 24 * 2
    assert kv_bytes(narrow, 256, "f16") == 256 * (5 + 5) * 24 * 2


def test_cache_blocks_must_divide_heads():
    with pytest.raises(PlanError, match=r"layer 0: heads of 24 do not divide into q8_0 blocks of 32\. Use kv_type f16\."):
        kv_bytes(shape_spec("tiny"), 512, "q8_0")


def test_process_grows_with_the_vocabulary():
    assert process_bytes(shape_spec("smollm2-135m")) == pytest.approx(65 * MIB, rel=0.02)  # measured
    assert process_bytes(shape_spec("gemma3-1b")) > process_bytes(shape_spec("llama-1b"))


def test_repacking_follows_the_instruction_set():
    x86 = {
        name
        for name in ("Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4")
        if is_repacked(grid(name), 64, ["avx2"])
    }
    assert x86 == {"Q4_0", "Q4_K", "IQ4_NL", "MXFP4"}
    assert is_repacked(grid("Q2_K"), 64, ["avx2", "avx512"]) and not is_repacked(grid("Q4_1"), 64, ["avx2", "avx512", "avx512_vnni"])
    arm = {
        name
        for name in ("Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL")
        if is_repacked(grid(name), 64, ["neon", "dotprod"])
    }
    assert arm == {"Q4_0", "Q8_0", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K"}
    assert not is_repacked(grid("Q4_0"), 64, ["neon"]) and not is_repacked(grid("Q4_0"), 64, [])
    assert not is_repacked(grid("Q4_0"), 60, ["avx2"]) and is_repacked(grid("Q4_0"), 60, ["neon", "dotprod"])
    assert not is_repacked(grid("Q4_K"), 60, ["neon", "dotprod"])


def test_flash_attention_depends_on_the_device():
    odd, common = shape_spec("tiny"), shape_spec("llama-8b")
    assert [has_flash_attention(odd, device) for device in ("cpu", "cuda", "metal")] == [True, False, False]
    assert all(has_flash_attention(common, device) for device in ("cpu", "cuda", "metal"))


def test_outputs_are_those_of_a_session():
    session = pytest.importorskip("edgeq.runtime.session")
    assert session._SCORE_ROWS == N_OUTPUTS
