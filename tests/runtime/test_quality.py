"""Perplexity and agreement against their definitions, computed here by other means (torch, plain float64)."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gguf import write_tiny_gguf

from edgeq.errors import RuntimeFailure, UsageError
from edgeq.runtime import likelihood
from edgeq.runtime.llama import LlamaModel
from edgeq.runtime.llama_context import LlamaContext
from edgeq.runtime.quality import compare, perplexity, perplexity_of

TEXT = "The quick brown fox counts 1234 dogs; größer, привет 你好. " * 6
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("quality") / "tiny.gguf")


def direct_nll(artifact: Path, *, ctx: int, chunks: int) -> npt.NDArray[np.float64]:
    """The definition, word by word: ids without specials, windows of ctx, each alone, positions 1..ctx-1."""
    with LlamaModel.load(artifact) as model, LlamaContext(model, n_ctx=ctx, threads=1) as context:
        ids = model.tokenize(TEXT)
        assert ids[0] != model.bos
        nll = []
        for start in range(0, chunks * ctx, ctx):
            window = ids[start : start + ctx]
            logits = torch.from_numpy(context.logits_of(window)).double()
            log_p = torch.log_softmax(logits, dim=1)
            nll += [-log_p[i, window[i + 1]].item() for i in range(ctx - 1)]
    return np.array(nll)


def test_perplexity_is_the_definition(artifact: Path) -> None:
    found = perplexity(artifact, TEXT, ctx=48, chunks=3, threads=1)
    nll = direct_nll(artifact, ctx=48, chunks=3)
    assert (found.tokens, found.ctx, found.chunks) == (3 * 47, 48, 3)
    assert found.nll_mean == pytest.approx(nll.mean(), rel=1e-9)
    assert found.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-9)
    assert list(found.to_json()) == ["perplexity", "nll_mean", "tokens", "ctx", "chunks"]


def test_all_whole_windows_by_default(artifact: Path) -> None:
    with LlamaModel.load(artifact, vocab_only=True) as model:
        n_tokens = len(model.tokenize(TEXT))
    steps: list[tuple[str, float, float]] = []
    found = perplexity(artifact, TEXT, ctx=70, threads=1, progress=lambda *step: steps.append(step))
    assert n_tokens % 70  # there is a shorter window to drop
    assert found.chunks == n_tokens // 70
    assert found.tokens == found.chunks * 69
    assert perplexity(artifact, TEXT, ctx=70, chunks=10_000, threads=1) == found
    assert steps[-1] == ("eval", found.chunks * 70, found.chunks * 70)
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)


def test_text_shorter_than_a_window(artifact: Path) -> None:
    with pytest.raises(UsageError, match=r"the text has 4 tokens, but one window needs 128\. Use a longer text or a smaller --ctx"):
        perplexity(artifact, "abcd", ctx=128)


@pytest.mark.parametrize(("ctx", "chunks"), [(1, None), (64, 0)])
def test_windows_that_score_nothing(artifact: Path, ctx: int, chunks: int | None) -> None:
    with pytest.raises(UsageError, match=f"ctx is {ctx} and chunks is {chunks}; expected at least 2 and 1"):
        perplexity(artifact, TEXT, ctx=ctx, chunks=chunks)


def test_nan_weights_are_an_error(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "nan.gguf")
    reader = gguf.GGUFReader(path, "r+")
    next(t for t in reader.tensors if t.name == "output_norm.weight").data[3] = np.nan
    del reader
    with pytest.raises(RuntimeFailure, match=r"nan\.gguf: 126 of 126 scored tokens have NaN or infinite likelihoods"):
        perplexity(path, TEXT, ctx=64, chunks=2)


def test_windows_beyond_the_trained_context_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tiny_gguf(tmp_path / "short.gguf", fields={"context_length": 32})
    with caplog.at_level(logging.WARNING, logger="edgeq.runtime.quality"):
        perplexity(path, TEXT, ctx=64, chunks=1)
    assert "was trained on 32 tokens; windows of 64 ask for more" in caplog.text


def test_perplexity_that_no_float_holds() -> None:
    assert perplexity_of(2.0) == pytest.approx(math.e**2)
    with pytest.raises(RuntimeFailure, match="the mean negative log-likelihood is 800, too large for a perplexity"):
        perplexity_of(800.0)


def pair(n_tokens: int = 40, n_vocab: int = 97, noise: float = 0.5) -> tuple[list[int], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    reference = (3 * RNG.standard_normal((n_tokens, n_vocab))).astype(np.float32)
    artifact = (reference + noise * RNG.standard_normal(reference.shape)).astype(np.float32)
    return RNG.integers(0, n_vocab, n_tokens).tolist(), reference, artifact


def test_agreement_is_the_definition() -> None:
    windows = [pair(40), pair(17), pair(1)]
    kl, same, nll = [], [], {1: [], 2: []}
    for window in windows:
        p, q = (torch.log_softmax(torch.from_numpy(logits).double(), dim=1) for logits in window[1:])
        kl += torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(1).tolist()
        same += (p.argmax(1) == q.argmax(1)).tolist()
        for side, log_p in ((1, p), (2, q)):
            nll[side] += [-log_p[i, token].item() for i, token in enumerate(window[0][1:])]
    found = compare(windows)
    assert found.tokens == 58
    assert 0 < sum(same) < 58
    assert found.top1_agreement == sum(same) / 58
    assert found.kl_mean == pytest.approx(np.mean(kl), rel=1e-12)
    assert found.kl_max == pytest.approx(max(kl), rel=1e-12)
    assert found.kl_p99 == pytest.approx(torch.quantile(torch.tensor(kl, dtype=torch.float64), 0.99).item(), rel=1e-12)
    assert found.nll_reference == pytest.approx(np.mean(nll[1]), rel=1e-12)
    assert found.nll_artifact == pytest.approx(np.mean(nll[2]), rel=1e-12)


def test_row_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = [pair(40), pair(17)]
    whole = compare(windows)
    monkeypatch.setattr(likelihood, "CHUNK_VALUES", 97 * 3 + 5)
    chunked = compare(windows)
    assert chunked.top1_agreement == whole.top1_agreement
    for name in ("kl_mean", "kl_p99", "kl_max", "nll_reference", "nll_artifact"):
        assert getattr(chunked, name) == pytest.approx(getattr(whole, name), rel=1e-12)


def test_equal_logits_agree_exactly() -> None:
    ids, reference, _ = pair()
    found = compare([(ids, reference, reference)])
    assert (found.kl_mean, found.kl_max, found.top1_agreement) == (0.0, 0.0, 1.0)
    assert found.nll_reference == found.nll_artifact


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-1e4, 1e4, width=32), st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
def test_kl_ignores_shifts_and_is_never_negative(seed: int, shift: float, spread: float) -> None:
    rng = np.random.default_rng(seed)
    reference, artifact = (np.float32(spread) * rng.standard_normal((2, 5, 33))).astype(np.float32)
    found = compare([([0, 1, 2, 3, 4], reference, artifact)])
    shifted = compare([([0, 1, 2, 3, 4], reference, artifact.astype(np.float64) + shift)])
    assert found.kl_mean >= 0
    assert shifted.kl_mean == pytest.approx(found.kl_mean, rel=1e-6, abs=1e-9)
    assert math.isfinite(found.kl_max)


def test_near_ties_agree() -> None:
    """The artifact takes the second token; the reference has it 0.25 below its first."""
    reference, artifact = np.zeros((2, 2, 4), dtype=np.float32)
    reference[:, 0], reference[:, 1], artifact[:, 1] = 1.25, 1.0, 1.0
    ids = [0, 0]
    assert compare([(ids, reference, artifact)]).top1_agreement == 0.0
    assert compare([(ids, reference, artifact)], tie_margin=0.2).top1_agreement == 0.0
    assert compare([(ids, reference, artifact)], tie_margin=0.25).top1_agreement == 1.0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["reference", "artifact"])
def test_broken_logits_are_counted(side: str, value: float) -> None:
    ids, reference, artifact = pair()
    broken = {"reference": reference, "artifact": artifact}[side]
    broken[3, 5] = broken[3, 6] = broken[30, 1] = value
    with pytest.raises(RuntimeFailure, match=f"2 positions have NaN or infinite logits in the {side}"):
        compare([pair(), (ids, reference, artifact), pair()])


def test_shapes_that_differ() -> None:
    ids, reference, artifact = pair()
    with pytest.raises(RuntimeFailure, match=r"cannot compare logits of shape \[40, 90\] with the reference's \[40, 97\] for 40 tokens"):
        compare([(ids, reference, artifact[:, :90])])
    with pytest.raises(RuntimeFailure, match="for 39 tokens"):
        compare([(ids[1:], reference, artifact)])


@pytest.mark.parametrize("windows", [[], [pair(1)]])
def test_nothing_to_compare(windows: list[tuple[list[int], npt.NDArray[np.float32], npt.NDArray[np.float32]]]) -> None:
    with pytest.raises(RuntimeFailure, match="there is nothing to compare; give at least one window of two tokens"):
        compare(windows)
