from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import CHAT_TEMPLATE, N_VOCAB, tiny_tokenizer
from tiny_gguf import N_CTX, write_tiny_gguf

from edgeq.errors import PackageError, RuntimeFailure, TokenizerError, UsageError
from edgeq.runtime.answer import TextBuffer, Timings
from edgeq.runtime.llama import LlamaModel
from edgeq.runtime.llama_context import LlamaContext
from edgeq.runtime.memory import kv_bytes
from edgeq.runtime.session import MAX_DEFAULT_N_CTX, Session, load

PROMPT = "the quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("session") / "tiny.gguf")


@pytest.fixture
def session(path: Path) -> Iterator[Session]:
    with load(path, n_ctx=256, threads=1) as session:
        yield session


def argmax_loop(path: Path, prompt: list[int], n: int) -> list[int]:
    """Greedy generation from raw logits, one full pass per token: no cache, no sampler."""
    with LlamaModel.load(path) as model, LlamaContext(model, n_ctx=256, threads=1) as context:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + n:
            token = int(context.logits_of(tokens)[-1].argmax())
            if token in model.eog:
                break
            tokens.append(token)
    return tokens[len(prompt) :]


def test_greedy_equals_an_argmax_loop(session: Session, path: Path) -> None:
    completion = session.generate(PROMPT, max_tokens=40)
    prompt = session.model.tokenize(PROMPT, add_special=True)
    assert prompt[0] == session.model.bos
    assert list(completion.tokens) == argmax_loop(path, prompt, 40)
    assert len(completion.tokens) > 5
    pieces = b"".join(session.model.token_to_piece(token) for token in completion.tokens)
    assert completion.text == pieces.decode("utf-8", "replace")


def test_pieces_join_to_the_text_and_the_completion_follows(session: Session) -> None:
    stream = session.stream(PROMPT, max_tokens=20, temperature=1.5, seed=4)
    pieces = []
    for piece in stream:
        assert stream.completion is None
        pieces.append(piece)
    assert stream.completion is not None and stream.completion is session.last
    assert "".join(pieces) == stream.completion.text
    assert list(stream) == [], "a finished stream stays finished"
    assert stream.completion is session.last
    assert len(pieces) > 5 and all(pieces)


def test_prompts_may_be_ids(session: Session) -> None:
    prompt = session.model.tokenize(PROMPT, add_special=True)
    assert session.generate(prompt, max_tokens=9).tokens == session.generate(PROMPT, max_tokens=9).tokens
    with pytest.raises(UsageError, match=f"ids 0 to {N_VOCAB - 1}"):
        session.generate([N_VOCAB])


def test_same_seed_same_text(session: Session) -> None:
    options: dict[str, Any] = {"max_tokens": 30, "temperature": 1.0}
    first = session.generate(PROMPT, seed=7, **options)
    session.generate("another prompt", seed=1, **options)
    assert session.generate(PROMPT, seed=7, **options).tokens == first.tokens
    assert session.generate(PROMPT, seed=8, **options).tokens != first.tokens
    unseeded = {session.generate(PROMPT, **options).tokens for _ in range(3)}
    assert len(unseeded) > 1


def test_sampling_narrows_to_the_likeliest(session: Session) -> None:
    greedy = session.generate(PROMPT, max_tokens=12).tokens
    hot: dict[str, Any] = {"max_tokens": 12, "temperature": 2.0, "seed": 3}
    assert session.generate(PROMPT, **hot).tokens != greedy
    for narrow in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}):
        assert session.generate(PROMPT, **hot, **narrow).tokens == greedy


def test_draws_follow_the_probabilities(session: Session) -> None:
    """First tokens of 400 draws against softmax of the logits at the same temperature."""
    prompt = session.model.tokenize("the", add_special=True)
    logits = session.context.logits_of(prompt)[-1].astype(np.float64) / 0.5
    session._cached = [(token, ()) for token in prompt]
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    drawn = np.zeros(N_VOCAB)
    for seed in range(400):
        token = session.generate(prompt, max_tokens=1, temperature=0.5, seed=seed).tokens
        drawn[token[0] if token else 2] += 1
    top = int(expected.argmax())
    # Five standard deviations of a binomial count.
    assert abs(drawn[top] - 400 * expected[top]) < 5 * np.sqrt(400 * expected[top] * (1 - expected[top]))
    assert (drawn > 0).sum() > 1


def test_a_shared_beginning_is_reused_and_changes_nothing(path: Path, session: Session) -> None:
    first = session.generate(PROMPT, max_tokens=25)
    longer = [*session.model.tokenize(PROMPT, add_special=True), *first.tokens[:10], 50, 60]
    again = session.generate(longer, max_tokens=25)
    assert again.timings.reused_tokens == len(longer) - 2
    branched = session.generate([*longer[:6], 99], max_tokens=25)
    assert branched.timings.reused_tokens == 6
    repeated = session.generate([*longer[:6], 99], max_tokens=25)
    assert repeated.timings.reused_tokens == 6, "the last token is computed again for its logits"
    for prompt, result in ((longer, again), ([*longer[:6], 99], branched), ([*longer[:6], 99], repeated)):
        with load(path, n_ctx=256, threads=1) as fresh:
            expected = fresh.generate(prompt, max_tokens=25)
        assert expected.timings.reused_tokens == 0
        assert result.tokens == expected.tokens


def test_reuse_with_sliding_windows(tmp_path: Path) -> None:
    fields = {"attention.sliding_window": 8, "attention.sliding_window_pattern": 2}
    path = write_tiny_gguf(tmp_path / "g.gguf", arch="gemma3", n_layers=4, fields=fields)
    tokens = np.random.default_rng(0).integers(3, N_VOCAB, 1500).tolist()
    with load(path, n_ctx=2048, threads=1) as session:
        session.generate(tokens, max_tokens=3)
        back = [*tokens[:30], 5]
        result = session.generate(back, max_tokens=12)
        assert result.timings.reused_tokens == 0, "the window has left the beginning behind"
    with load(path, n_ctx=2048, threads=1) as session:
        assert session.generate(back, max_tokens=12).tokens == result.tokens


@pytest.mark.parametrize(
    ("n_tokens", "atol"),
    [
        (129, 2e-3),  # whole pieces of 64 rows: only the order of float32 sums differs
        (150, 5e-2),  # llama.cpp's attention of fewer than 64 rows on a CPU sums in float16
    ],
)
def test_score_is_log_softmax_of_the_logits(session: Session, path: Path, n_tokens: int, atol: float) -> None:
    ids = np.random.default_rng(5).integers(0, N_VOCAB, n_tokens).tolist()
    scores = session.score(ids)
    with LlamaModel.load(path) as model, LlamaContext(model, n_ctx=256, threads=1) as context:
        logits = context.logits_of(ids).astype(np.float64)[:-1]
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(scores, expected[np.arange(n_tokens - 1), ids[1:]], atol=atol)
    assert scores.shape == (n_tokens - 1,) and (scores < 0).all()
    assert np.ptp(scores) > 1


def test_scoring_and_generating_take_turns(session: Session) -> None:
    prompt = session.model.tokenize(PROMPT, add_special=True)
    expected = session.generate(prompt, max_tokens=10).tokens
    session.score([*prompt, 4, 5])
    result = session.generate(prompt, max_tokens=10)
    assert result.timings.reused_tokens == len(prompt) - 1
    assert result.tokens == expected
    with pytest.raises(UsageError, match="1 tokens cannot be scored; give at least two"):
        session.score([1])
    with pytest.raises(UsageError, match="a prompt of 300 tokens does not fit the context of 256"):
        session.score([1] * 300)


class Scripted:
    """A session whose model 'samples' given token ids: what comes out of the text machinery, whatever the weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, session: Session) -> None:
        self.session, self.monkeypatch = session, monkeypatch

    def say(self, text: str, *, end: bool = True) -> None:
        script = iter([*self.session.model.tokenize(text), *([2] if end else [])])
        self.monkeypatch.setattr("edgeq.runtime.session.Sampler.sample", lambda _self, _context: next(script))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, session: Session) -> Scripted:
    return Scripted(monkeypatch, session)


def test_characters_are_never_split(scripted: Scripted) -> None:
    text = "a😀👍🏽你好 привет é\u0301"
    scripted.say(text)
    stream = scripted.session.stream(PROMPT)
    pieces = list(stream)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.completion is not None
    assert stream.completion.finish_reason == "stop"
    assert len(stream.completion.tokens) > len(pieces), "some characters take several tokens"


def test_half_a_character_at_the_end_is_marked(scripted: Scripted) -> None:
    n = len(scripted.session.model.tokenize("ab😀"))
    scripted.say("ab😀", end=False)
    completion = scripted.session.generate(PROMPT, max_tokens=n - 1)
    assert completion.text == "ab\ufffd"
    assert completion.finish_reason == "length"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", "o three", "one tw"),
        ("one two three", ("zzz",), "one two three"),
        ("one two thr", ("three",), "one two thr"),
        ("aaab", ("aab",), "a"),
        ("x<|e", ("<|end|>", "|e"), "x<"),
        ("one two", ("two", "ne"), "o"),
        ("Zürich, 😀!", ("😀",), "Zürich, "),
        ("one", ("one",), ""),
    ],
)
def test_stop_strings(scripted: Scripted, text: str, stop: str | tuple[str, ...], expected: str) -> None:
    scripted.say(text)
    stream = scripted.session.stream(PROMPT, stop=stop)
    assert "".join(stream) == expected
    assert stream.completion is not None
    assert (stream.completion.text, stream.completion.finish_reason) == (expected, "stop")


def test_text_is_held_back_only_while_it_may_be_a_stop_string() -> None:
    buffer = TextBuffer(("<end>",))
    assert [buffer.push(piece) for piece in (b"a<", b"e", b"x", b"<en", b"d>b")] == ["a", "", "<ex", "", ""]
    assert buffer.stopped and buffer.flush() == ""


def test_ends_by_length_and_by_a_full_context(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    short = session.generate(PROMPT, max_tokens=1)
    assert (len(short.tokens), short.finish_reason, short.timings.decode_tok_s) == (1, "length", None)
    monkeypatch.setattr("edgeq.runtime.session.Sampler.sample", lambda _self, _context: 70)
    prompt = [1] * 250
    full = session.generate(prompt)
    assert len(full.tokens) == 256 - 250 + 1, "the last token needs no room: nothing follows it"
    assert full.finish_reason == "length"
    assert session.context.n_past == 256


def test_contexts_do_not_overflow_silently(session: Session) -> None:
    with pytest.raises(UsageError, match=r"a prompt of 257 tokens does not fit the context of 256 tokens. Load with a larger n_ctx"):
        session.generate([1] * 257)
    with pytest.raises(UsageError, match="a prompt of 250 tokens and 7 new tokens does not fit the context of 256 tokens"):
        session.stream([1] * 250, max_tokens=7)
    assert session.generate([1] * 250, max_tokens=6).timings.prompt_tokens == 250


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; expected a number of at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0; expected at least 1"),
        ({"top_p": 1.5}, "top_p is 1.5; expected a number from 0 to 1"),
        ({"min_p": -0.1}, "min_p is -0.1; expected a number from 0 to 1"),
        ({"seed": -1}, "seed is -1; expected 0 to 4294967294"),
        ({"max_tokens": 0}, "max_tokens is 0; expected at least 1"),
        ({"stop": ("a", "")}, "a stop string is empty"),
    ],
)
def test_bad_options_are_refused_before_any_work(session: Session, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        session.stream(PROMPT, **options)
    assert session.context.n_past == 0


def test_an_empty_prompt_starts_from_bos(session: Session, tmp_path: Path) -> None:
    assert session.generate("", max_tokens=2).timings.prompt_tokens == 1
    with pytest.raises(UsageError, match="the prompt is empty and the model has no BOS token"):
        session.generate([])
    without = write_tiny_gguf(tmp_path / "m.gguf", fields={"tokenizer.ggml.add_bos_token": False})
    with load(without, n_ctx=64, threads=1) as plain:
        assert plain.generate("", max_tokens=2).timings.prompt_tokens == 1
        assert plain.generate("the", max_tokens=2).timings.prompt_tokens == len(plain.model.tokenize("the"))


def test_timings_add_up(session: Session) -> None:
    timings = session.generate(PROMPT, max_tokens=10).timings
    assert timings.prompt_tokens == len(session.model.tokenize(PROMPT, add_special=True))
    assert 0 < timings.prefill_s <= timings.ttft_s
    assert timings.decode_tok_s == (timings.new_tokens - 1) / timings.decode_s
    assert timings.prefill_tok_s == timings.prompt_tokens / timings.prefill_s
    assert session.last is not None
    assert json.loads(json.dumps(session.last.to_json()))["timings"]["new_tokens"] == timings.new_tokens
    idle = Timings(prompt_tokens=3, reused_tokens=2, prefill_s=0.0, ttft_s=0.1, decode_s=0.0, new_tokens=0)
    assert (idle.prefill_tok_s, idle.decode_tok_s) == (None, None)


def test_memory_tells_model_and_cache(session: Session) -> None:
    memory = session.memory()
    assert memory.model_bytes == session.model.size_bytes
    assert memory.kv_bytes == kv_bytes(session.model.facts, 256)
    assert memory.rss > memory.kv_bytes


def test_an_unfinished_stream_keeps_the_session(session: Session) -> None:
    stream = session.stream(PROMPT, max_tokens=30, temperature=1.0, seed=1)
    next(stream)
    with pytest.raises(RuntimeFailure, match=r"busy with an unfinished stream\. Take its remaining pieces or close it first"):
        session.generate(PROMPT, max_tokens=1)
    stream.close()
    assert stream.completion is None
    expected = session.generate(PROMPT, max_tokens=10).tokens
    with load(session.model.path, n_ctx=256, threads=1) as fresh:
        assert fresh.generate(PROMPT, max_tokens=10).tokens == expected


def test_other_threads_wait_for_their_turn(session: Session) -> None:
    stream = session.stream(PROMPT, max_tokens=20, temperature=1.0, seed=2)
    next(stream)
    results: list[tuple[int, ...]] = []
    thread = threading.Thread(target=lambda: results.append(session.generate(PROMPT, max_tokens=5).tokens))
    thread.start()
    thread.join(0.1)
    assert thread.is_alive() and not results
    for _ in stream:
        pass
    thread.join()
    assert results == [session.generate(PROMPT, max_tokens=5).tokens]


def test_many_threads_get_the_same_answer(session: Session) -> None:
    expected = session.generate(PROMPT, max_tokens=8).tokens
    results: list[tuple[int, ...]] = []
    threads = [threading.Thread(target=lambda: results.append(session.generate(PROMPT, max_tokens=8).tokens)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 6


def test_use_after_close_is_an_error(path: Path) -> None:
    session = load(path, n_ctx=64, threads=1)
    stream = session.stream(PROMPT, max_tokens=10)
    next(stream)
    session.close()  # ends this thread's stream
    session.close()
    assert list(stream) == []
    for call in (
        lambda: session.generate("x"),
        lambda: session.stream("x"),
        lambda: session.score([1, 2]),
        lambda: session.chat("x"),
        session.memory,
    ):
        with pytest.raises(RuntimeFailure, match=r"the session is closed\. Load it again"):
            call()


def test_a_stream_begun_before_the_end_does_not_outlive_the_session(path: Path) -> None:
    with load(path, n_ctx=64, threads=1) as session:
        stream = session.stream(PROMPT)
    with pytest.raises(RuntimeFailure, match="the session is closed"):
        next(stream)


def test_a_session_survives_a_failed_decode(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = session.generate(PROMPT, max_tokens=10).tokens
    real, calls = LlamaContext.decode, []

    def failing(self: LlamaContext, tokens: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeFailure("broken")
        return real(self, tokens, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LlamaContext, "decode", failing)
        with pytest.raises(RuntimeFailure, match="broken"):
            session.generate(PROMPT, max_tokens=10)
    assert session.generate(PROMPT, max_tokens=10).tokens == expected


def test_outputs_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "nan.gguf", gain=float("nan"))
    with (
        load(path, n_ctx=64, threads=1) as session,
        pytest.raises(RuntimeFailure, match=r"outputs are not finite\. Its weights are damaged"),
    ):
        session.generate(PROMPT, max_tokens=3)


def test_default_context(path: Path, tmp_path: Path) -> None:
    with load(path, threads=1) as session:
        assert session.n_ctx == N_CTX < MAX_DEFAULT_N_CTX
    long = write_tiny_gguf(tmp_path / "long.gguf", fields={"context_length": 10 * MAX_DEFAULT_N_CTX})
    with load(long, threads=1) as session:
        assert session.n_ctx == MAX_DEFAULT_N_CTX


def test_packages_open_through_their_manifest(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"no manifest\.json: it is not an edgeq package"):
        load(tmp_path)
    with pytest.raises(PackageError, match=r"does not exist\. Give a package folder or a GGUF file"):
        load(tmp_path / "absent.gguf")
    artifact = write_tiny_gguf(tmp_path / "model.gguf")
    record = {"path": "model.gguf", "format": "gguf", "bytes": artifact.stat().st_size, "sha256": "0" * 64}
    manifest = {
        "format": "edgeq-package",
        "version": 1,
        "status": "passed",
        "export": {"profile": "laptop-cpu", "n_ctx": 128},
        "artifacts": [record],
        "side_files": [],
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with load(tmp_path, threads=1) as session:
        assert session.n_ctx == 128
        assert session.generate("the", max_tokens=3).tokens


def test_chat_goes_through_the_models_own_template(session: Session, path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the dog?"}]
    oracle = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), bos_token="<|im_start|>", eos_token="<|im_end|>")
    expected = oracle.apply_chat_template(messages, chat_template=CHAT_TEMPLATE, add_generation_prompt=True, tokenize=False)
    assert session.render_chat(messages) == expected
    ids = session.chat_prompt(messages)
    assert ids == oracle.encode(expected, add_special_tokens=False)
    assert ids.count(1) == 3, "each turn starts with the special token, and no BOS is added"
    assert session.chat(messages, max_tokens=8).tokens == session.generate(ids, max_tokens=8).tokens
    assert session.chat_prompt("hi") == session.chat_prompt([{"role": "user", "content": "hi"}])


def test_models_without_a_template_do_not_chat(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", fields={"tokenizer.chat_template": None})
    with load(path, n_ctx=64, threads=1) as session, pytest.raises(TokenizerError, match="the model has no chat template"):
        session.chat("hi")


def test_devices(path: Path) -> None:
    for name in ("tpu", "cuda:", "cuda:x", "cuda:-1", "gpu"):
        with pytest.raises(UsageError, match=f"device '{name}' is not known; expected cpu, cuda or cuda:N"):
            load(path, device=name)


def test_a_load_after_a_failed_one_works(path: Path) -> None:
    with pytest.raises(UsageError, match="kv_type 'q9' is not known"):
        load(path, kv_type="q9", threads=1)
    with load(path, n_ctx=64, threads=1) as session:
        assert session.generate("the", max_tokens=1).tokens
