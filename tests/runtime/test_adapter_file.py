from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_files import WHOLE_MODEL, lora_factors, merged, write_lora
from tiny import N_VOCAB
from tiny_gguf import write_tiny_gguf

from edgeq.errors import AdapterError, EdgeqError, RuntimeFailure, SourceError
from edgeq.runtime.adapter_file import check_base, read_adapter
from edgeq.runtime.gguf_facts import read_facts
from edgeq.runtime.llama import LlamaAdapter, LlamaModel
from edgeq.runtime.llama_context import LlamaContext

Q = "blk.0.attn_q.weight"
IDS = list(range(5, 29))
T = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("base") / "tiny.gguf")


def matrix(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def logits(model: Path, *adapters: tuple[Path, float]) -> np.ndarray:
    with LlamaModel.load(model) as loaded, LlamaContext(loaded, n_ctx=256, threads=1, kv_type="f32") as context:
        context.set_adapters({LlamaAdapter.load(loaded, path): scale for path, scale in adapters})
        return context.logits_of(IDS)


def test_what_the_header_says(base: Path, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.gguf", rank=3, alpha=6.0, targets=[Q, "token_embd.weight"], invocation=[7, 9])
    adapter = read_adapter(path)
    assert (adapter.arch, adapter.alpha, adapter.invocation) == ("llama", 6.0, (7, 9))
    assert adapter.ranks == {Q: 3, "token_embd.weight": 3}
    assert adapter.shapes == {Q: (96, 64), "token_embd.weight": (64, N_VOCAB)}
    payload = 4 * 3 * (96 + 64 + 64 + N_VOCAB)
    assert payload <= adapter.resident_bytes < payload + 4 * 128
    check_base(adapter, read_facts(base))


@pytest.mark.parametrize("target", WHOLE_MODEL)
def test_every_target_acts_as_merged_weights(base: Path, tmp_path: Path, target: str) -> None:
    path = write_lora(tmp_path / "a.gguf", rank=3, alpha=6.0, targets=[target])
    check_base(read_adapter(path), read_facts(base))
    expected = logits(merged(base, tmp_path / "merged.gguf", (lora_factors(3, seed=1, targets=[target]), 2.0)))
    plain, kept = logits(base), logits(base, (path, 1.0))
    assert np.abs(plain - expected).max() > 0.1, "the adapter changes the logits"
    # float32 sums in another order, and attention over fewer than 64 rows, which llama.cpp sums in float16 on a CPU
    np.testing.assert_allclose(kept, expected, atol=0.02 * np.abs(plain - expected).max() + 0.01)


def test_a_rank_one_factor_may_be_a_vector(base: Path, tmp_path: Path) -> None:
    a, b = lora_factors(1, seed=1, targets=[Q])[Q]
    flat = write_lora(tmp_path / "flat.gguf", rank=1, targets=[Q], tensors={f"{Q}.lora_a": a[0], f"{Q}.lora_b": b})
    assert read_adapter(flat).shapes == {Q: (96, 64)}
    plain = write_lora(tmp_path / "plain.gguf", rank=1, targets=[Q])
    np.testing.assert_array_equal(logits(base, (flat, 1.0)), logits(base, (plain, 1.0)))


@pytest.mark.parametrize("kind", [T.F16, T.BF16, T.Q8_0])
def test_number_formats(base: Path, tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    path = write_lora(tmp_path / "a.gguf", rank=32, kind=kind)
    check_base(read_adapter(path), read_facts(base))
    exact = logits(base, (write_lora(tmp_path / "exact.gguf", rank=32), 1.0))
    coarse = logits(base, (path, 1.0))
    effect = np.abs(exact - logits(base)).max()
    assert 0 < np.abs(coarse - exact).max() < 0.2 * effect


# Each with what llama.cpp would do: "refuses" it, "aborts" the process, or "takes" it and computes something else than was meant.
BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no adapter": ({"fields": {"general.type": "model"}}, "refuses", "general.type is 'model', expected 'adapter'. It is no adapter."),
    "no type": ({"fields": {"general.type": None}}, "refuses", "general.type is None, expected 'adapter'"),
    "type a number": ({"fields": {"general.type": 3}}, "aborts", "general.type is 3, expected 'adapter'"),
    "kind": ({"fields": {"adapter.type": "ia3"}}, "refuses", "adapter.type is 'ia3', expected 'lora'. Only LoRA adapters can be kept."),
    "alpha whole": ({"fields": {"adapter.lora.alpha": 4}}, "aborts", "adapter.lora.alpha is 4 (UINT32), expected a finite FLOAT32"),
    "alpha nan": (
        {"fields": {"adapter.lora.alpha": float("nan")}},
        "takes",
        "adapter.lora.alpha is nan (FLOAT32), expected a finite FLOAT32",
    ),
    "invocation": (
        {"fields": {"adapter.alora.invocation_tokens": "x"}},
        "refuses",
        "adapter.alora.invocation_tokens is 'x', expected a list of UINT32 token ids",
    ),
    "half": ({"tensors": {f"{Q}.lora_b": None}}, "refuses", f"{Q}.lora_b is missing"),
    "other half": ({"tensors": {f"{Q}.lora_a": None}}, "refuses", f"{Q}.lora_a is missing"),
    "ranks": ({"tensors": {f"{Q}.lora_b": matrix(96, 5)}}, "refuses", f"lora_a and lora_b of {Q} are [4, 64] and [96, 5], of rank 4 and 5"),
    "embedding ranks": (
        {"targets": ["token_embd.weight"], "tensors": {"token_embd.weight.lora_b": matrix(64, 5)}},
        "aborts",
        f"lora_a and lora_b of token_embd.weight are [{N_VOCAB}, 4] and [64, 5], of rank 4 and 5",
    ),
    "dims": (
        {"tensors": {f"{Q}.lora_a": matrix(2, 4, 64), f"{Q}.lora_b": matrix(2, 96, 4)}},
        "aborts",
        f"{Q}.lora_a has shape [2, 4, 64], expected a matrix",
    ),
    "grid": ({"tensors": {f"{Q}.lora_a": np.ones((4, 64))}}, "aborts", f"{Q}.lora_a is F64; expected one of F32, F16, BF16, Q8_0"),
    "nan": (
        {"tensors": {f"{Q}.lora_a": np.full((4, 64), np.nan, dtype=np.float32)}},
        "takes",
        f"{Q}.lora_a has values that are not finite. The adapter is damaged",
    ),
    "alien": (
        {"tensors": {"blk.0.attn_q.weight.magnitude": matrix(96)}},
        "refuses",
        "tensor blk.0.attn_q.weight.magnitude is neither lora_a nor lora_b",
    ),
    "norm": ({"tensors": {"blk.0.attn_norm.weight": matrix(64)}}, "takes", "tensor blk.0.attn_norm.weight is neither lora_a nor lora_b"),
    "norm pair": (
        {"tensors": {"blk.0.attn_norm.weight.lora_a": matrix(4, 64), "blk.0.attn_norm.weight.lora_b": matrix(1, 4)}},
        "takes",
        "llama.cpp applies no adapter to blk.0.attn_norm.weight. Merge this adapter into its model instead.",
    ),
    "nothing": ({"targets": []}, "takes", "the adapter has no tensors"),
    "architecture": ({"arch": "qwen2"}, "refuses", "is for architecture 'qwen2', tiny.gguf is 'llama'. Use the model that the adapter was"),
    "width": (
        {"tensors": {f"{Q}.lora_a": matrix(4, 32)}},
        "refuses",
        f"its {Q} goes from 32 to 96 values, that of tiny.gguf from 64 to 96. Use the model that the adapter was made for. For a cut model",
    ),
    "embedding width": (
        {"targets": ["token_embd.weight"], "tensors": {"token_embd.weight.lora_a": matrix(100, 4)}},
        "refuses",
        f"its token_embd.weight goes from 100 to 64 values, that of tiny.gguf from {N_VOCAB} to 64",
    ),
    "layer": (
        {"tensors": {"blk.7.attn_q.weight.lora_a": matrix(4, 64), "blk.7.attn_q.weight.lora_b": matrix(96, 4)}},
        "refuses",
        "changes blk.7.attn_q.weight, which tiny.gguf does not have",
    ),
    "token": ({"invocation": [5, 99999]}, "takes", f"invocation token 99999 is not one of tiny.gguf, which has 0 to {N_VOCAB - 1}"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_adapters_are_refused(base: Path, tmp_path: Path, case: str) -> None:
    options, _, message = BAD[case]
    path = write_lora(tmp_path / "bad.gguf", **options)
    with pytest.raises(AdapterError, match=re.escape(f"{path}: ") + ".*" + re.escape(message)):
        check_base(read_adapter(path), read_facts(base))


def test_an_adapter_of_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    """llama.cpp aborts: it takes the pair of the table for one of the output matrix, of which it is the transpose."""
    tied = write_tiny_gguf(tmp_path / "tied.gguf", tied=True)
    path = write_lora(tmp_path / "a.gguf", targets=["token_embd.weight"])
    with pytest.raises(AdapterError, match=r"changes token_embd.weight, which tied.gguf uses as its output matrix too"):
        check_base(read_adapter(path), read_facts(tied))


@pytest.mark.parametrize("fate", ["refuses", "takes"])
def test_what_llama_does_with_them(base: Path, tmp_path: Path, fate: str) -> None:
    """The table above says the truth about llama.cpp, so a check that is no longer needed is found. Aborts are left alone."""
    with LlamaModel.load(base) as model:
        for i, (options, happens, _) in enumerate(BAD.values()):
            if happens == fate:
                path = write_lora(tmp_path / f"{i}.gguf", **options)
                if fate == "takes":
                    LlamaAdapter.load(model, path).close()
                else:
                    with pytest.raises(
                        RuntimeFailure, match=r"llama.cpp cannot load this adapter. It said: .*failed to apply lora adapter"
                    ):
                        LlamaAdapter.load(model, path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"none.gguf: cannot be read: No such file or directory. Give a GGUF adapter."):
        read_adapter(tmp_path / "none.gguf")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_truncated_and_damaged_files_are_our_errors(tmp_path: Path, data: st.DataObject) -> None:
    sound = write_lora(tmp_path / "sound.gguf", targets=[Q]).read_bytes()
    cut = data.draw(st.integers(0, len(sound) - 1))
    path = tmp_path / "cut.gguf"
    path.write_bytes(sound[:cut])
    with pytest.raises((AdapterError, SourceError)):
        read_adapter(path)
    damaged = bytearray(sound)
    for _ in range(3):
        damaged[data.draw(st.integers(0, 700))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    with suppress(EdgeqError):
        read_adapter(path)
