"""Files we write, run by llama.cpp, against transformers on the folder they came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from real_llama import all_logits
from tiny import N_VOCAB, TINY_FAMILIES, hf_folder, hf_model

from edgeq.converters.gguf.carrier import write_model
from edgeq.converters.gguf.lowering import lower
from edgeq.converters.gguf.mixes import choose_grids
from edgeq.converters.sources.resolve import open_model

# Above every sliding window (8), original context (64) and short-factor range in the rows below.
N_TOKENS = 100
N_CTX = 256  # llama.cpp rounds a context up to a multiple of this

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0 + 0.1 * i for i in range(12)],
    "long_factor": [1.0 + 0.4 * i for i in range(12)],
}
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    **{name: (name, {}) for name in TINY_FAMILIES},
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama-longrope": ("llama", {"rope_parameters": LONGROPE}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-magnitude": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "llama-yarn-ramp": ("llama", {"rope_parameters": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0}}),
    # Beyond 256 tokens the long factors would apply, so this context gets the short ones.
    "phi3-longrope-short": ("phi3-longrope", {"original_max_position_embeddings": 256, "max_position_embeddings": 512}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": YARN}),
    "smollm3-yarn": ("smollm3", {"rope_parameters": YARN}),
    # Another attention scale than 1/sqrt(head_dim), which llama.cpp's graph has no key for: it goes into q_norm.
    "gemma3-scale": ("gemma3", {"query_pre_attn_scalar": 17}),
}
# Sums in another order: 6e-5 at most seen, at logits with a standard deviation of 0.6. ggml looks GELU up in a table of F16 values.
F32_TOLERANCE = 2e-4
F32_TOLERANCE_GELU = 4e-3
# ggml's F16 matrix product rounds activations to F16 as well: 1e-2 at most seen.
F16_TOLERANCE = 3e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(variant: str, tmp_path: Path) -> None:
    name, changes = VARIANTS[variant]
    folder = hf_folder(tmp_path / name, name, **changes)
    ids = torch.randint(3, N_VOCAB, (1, N_TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = hf_model(folder)(ids).logits[0].numpy()
    low = lower(open_model(folder))
    paths = {}
    for quant in ("F32", "F16"):
        paths[quant] = tmp_path / f"{quant}.gguf"
        write_model(paths[quant], low, choose_grids(quant, low, has_importance=False))
    f32, f16 = all_logits(list(paths.values()), ids[0].tolist(), n_ctx=N_CTX)
    assert expected.std() > 0.3
    assert np.abs(f32 - expected).max() < (F32_TOLERANCE_GELU if name == "gemma3" else F32_TOLERANCE)
    assert np.abs(f16 - expected).max() < F16_TOLERANCE
    assert np.abs(f16 - f32).max() > 0


def test_a_window_that_llama_cpp_ignores_agrees_up_to_the_context_we_write(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", "mistral", sliding_window=32)
    model = open_model(folder)
    low = lower(model)
    context = next(f.value for f in low.fields if f.key == "llama.context_length")
    assert context == 32
    assert "sliding window of 32 tokens" in low.notes[0]
    ids = torch.randint(3, N_VOCAB, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = hf_model(folder)(ids).logits[0].numpy()
    path = tmp_path / "m.gguf"
    write_model(path, low, choose_grids("F32", low, has_importance=False))
    (ours,) = all_logits([path], ids[0].tolist(), n_ctx=N_CTX)
    assert np.abs(ours[:context] - expected[:context]).max() < F32_TOLERANCE
    assert np.abs(ours[context:] - expected[context:]).max() > 0.1


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_bfloat16_checkpoint_keeps_its_values_in_bf16(name: str, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / name, name, dtype="bfloat16", shards=2)
    low = lower(open_model(folder))
    written = write_model(tmp_path / "m.gguf", low, choose_grids("BF16", low, has_importance=False), measure=True)
    assert {t.action for t in written.tensors if len(t.shape) == 2} == {"copy"}
    ids = list(range(3, 60))
    with torch.no_grad():
        expected = hf_model(folder)(torch.tensor([ids])).logits[0].numpy()
    (ours,) = all_logits([tmp_path / "m.gguf"], ids, n_ctx=N_CTX)
    # ggml's BF16 product rounds activations to 8 bits.
    assert np.abs(ours - expected).max() < 0.2
