"""Sequences that are computed together against the same sequences computed alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lora_files import write_lora
from tiny_gguf import write_tiny_gguf

from edgeq.errors import RuntimeFailure, UsageError
from edgeq.runtime._bench_child import Bench
from edgeq.runtime.bench_plan import prompt_ids
from edgeq.runtime.bench_sequences import LlamaSequences
from edgeq.runtime.llama import LlamaAdapter, LlamaModel
from edgeq.runtime.llama_context import LlamaContext


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("sequences") / "m.gguf")


@pytest.mark.parametrize(("n_sequences", "n_prompt"), [(2, 5), (3, 300), (7, 73)])
def test_each_sequence_has_the_logits_it_has_alone(path: Path, n_sequences: int, n_prompt: int) -> None:
    """300 tokens of 3 sequences go in over two calls of llama_decode, of 170 and 130 tokens each.

    A call with fewer than 64 tokens of a sequence uses another attention kernel, with differences of 0.02 in these logits; so it does when
    one sequence alone is given in pieces.
    """
    ids = prompt_ids(320, n_sequences * n_prompt)
    prompts = [ids[i * n_prompt : (i + 1) * n_prompt] for i in range(n_sequences)]
    with LlamaModel.load(path) as model, LlamaContext(model, n_ctx=n_prompt + 4, threads=1, kv_type="f32") as alone:
        together = LlamaSequences(model, n_sequences=n_sequences, n_ctx=n_prompt + 4, threads=1, kv_type="f32")
        for _ in range(2):  # a second time after clear
            logits = together.prefill(prompts).copy()
            tokens = logits.argmax(axis=1)
            stamps = together.greedy_steps(tokens, 1)
            second = together._logits().copy()
            together.clear()
        for i, prompt in enumerate(prompts):
            alone.clear()
            np.testing.assert_allclose(logits[i], alone.decode(prompt)[0], atol=1e-3)
            np.testing.assert_allclose(second[i], alone.decode([int(tokens[i])])[0], atol=1e-3)
        assert len({tuple(row.round(3)) for row in logits}) == n_sequences, "different prompts, different logits"
        assert stamps.shape == (2,) and stamps[1] > stamps[0]
        together.close()
        together.close()


def test_what_does_not_fit_is_refused(path: Path) -> None:
    with LlamaModel.load(path) as model:
        sequences = LlamaSequences(model, n_sequences=2, n_ctx=8, threads=1, kv_type="f16")
        with pytest.raises(UsageError, match="9 tokens after the 0 in the caches exceed the context of 8"):
            sequences.prefill([list(range(9))] * 2)
        with pytest.raises(UsageError, match="1 prompts for 2 sequences; give one for each, all of the same length"):
            sequences.prefill([[1, 2]])
        with pytest.raises(UsageError, match="2 prompts for 2 sequences"):
            sequences.prefill([[1, 2], [1]])
        with pytest.raises(UsageError, match="token 0 is 320"):
            sequences.prefill([[1], [320]])
        sequences.close()
        with pytest.raises(UsageError, match=r"batch is 0; llama\.cpp computes 1 to"):
            LlamaSequences(model, n_sequences=0, n_ctx=8, threads=1, kv_type="f16")
        with pytest.raises(UsageError, match="heads of 24 do not divide into Q8_0 blocks of 32"):
            LlamaSequences(model, n_sequences=2, n_ctx=8, threads=1, kv_type="q8_0")


def test_a_failing_call_is_an_error(path: Path) -> None:
    with LlamaModel.load(path) as model:
        sequences = LlamaSequences(model, n_sequences=2, n_ctx=8, threads=1, kv_type="f16")
        with pytest.raises(RuntimeFailure, match="llama_decode of 2 tokens of 2 sequences failed with -1"):
            sequences.greedy_steps(np.array([1, 320]), 1)  # what these do not check, llama.cpp does


def test_an_adapter_acts_on_every_sequence(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    file = write_lora(tmp_path / "a.gguf")
    ids = prompt_ids(320, 20)
    prompts = [ids[:10], ids[10:]]
    bench = Bench()
    bench.load(path=str(path), adapter=str(file), threads=1, device="cpu", n_ctx=12, kv_type="f32", batch=2)
    logits = bench.loop.prefill(prompts).copy()
    with LlamaModel.load(path) as model, LlamaContext(model, n_ctx=12, threads=1, kv_type="f32") as alone:
        adapter = LlamaAdapter.load(model, file)
        for row, prompt in zip(logits, prompts, strict=True):
            alone.set_adapters({})
            alone.clear()
            assert np.abs(row - alone.decode(prompt)[0]).max() > 0.1, "the adapter changes them"
            alone.set_adapters({adapter: 1.0})
            alone.clear()
            np.testing.assert_allclose(row, alone.decode(prompt)[0], atol=1e-3)
        alone.set_adapters({})
        adapter.close()
    assert bench.end()["adapter_switch_ms"] is None, "timed with one sequence only"
