"""Sessions over ONNX folders: what test_session.py asks of GGUF files, and the same tokens as onnxruntime-genai."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_folders import HEAD_DIM, N_CTX, AttentionOp, copy_of, edit_graph, genai_tokens, write_tiny_onnx
from tiny import CHAT_TEMPLATE, N_VOCAB, edit_json, hf_folder, tiny_tokenizer
from tiny_gguf import write_tiny_gguf

import edgeq
from edgeq.errors import AdapterError, PackageError, RuntimeFailure, TokenizerError, UsageError
from edgeq.runtime.onnx_context import OnnxContext
from edgeq.runtime.onnx_model import OnnxModel
from edgeq.runtime.session import Session, load

PROMPT = "the quick brown fox jumps over the lazy dog"
OPERATORS: tuple[AttentionOp, ...] = ("GroupQueryAttention", "Attention")


@pytest.fixture(scope="module", params=OPERATORS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx-session") / request.param
    write_tiny_onnx(folder, attention=request.param, seed=5)
    return folder


@pytest.fixture
def session(folder: Path) -> Iterator[Session]:
    with load(folder, n_ctx=N_CTX, threads=1) as session:
        yield session


def test_greedy_equals_onnxruntime_genai(session: Session, folder: Path) -> None:
    compared = 0
    for start in range(0, 60, 6):
        prompt = [1, *range(60 + start, 70 + 2 * start)]
        tokens = session.generate(prompt, max_tokens=64).tokens
        assert list(tokens) == genai_tokens(folder, prompt, 64)
        compared += len(set(tokens))
    assert compared > 30


def test_greedy_equals_onnxruntime_genai_in_float16(tmp_path: Path) -> None:
    write_tiny_onnx(tmp_path / "m", float_type=ir.DataType.FLOAT16, seed=5)
    prompt = [1, *range(60, 80)]
    with load(tmp_path / "m", threads=1) as session:
        tokens = session.generate(prompt, max_tokens=40).tokens
        assert session.memory().kv_bytes == 2 * 2 * N_CTX * 2 * HEAD_DIM * 2
    assert list(tokens) == genai_tokens(tmp_path / "m", prompt, 40)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_folders_of_the_genai_builder_run_as_they_are(tmp_path: Path, precision: str) -> None:
    """Symbolic head sizes, packed projections, a 4-bit embedding that the head shares."""
    source = hf_folder(tmp_path / "source", "llama", head_dim=HEAD_DIM, seed=5)
    built = tmp_path / "built"
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "tiny", "-i", str(source), "-o", str(built)]
    subprocess.run([*builder, "-p", precision, "-e", "cpu", "-c", str(tmp_path / "cache")], check=True, capture_output=True)
    prompt = [1, *range(60, 90)]
    with load(built, n_ctx=128, threads=1) as session:
        assert isinstance(session.model, OnnxModel) and session.model.chooses_rows
        tokens = session.generate(prompt, max_tokens=64).tokens
    assert list(tokens) == genai_tokens(built, prompt, 64) and len(set(tokens)) > 3


def test_a_file_and_its_folder_are_the_same(session: Session, folder: Path) -> None:
    with edgeq.load(folder / "model.onnx", threads=1) as other:
        assert other.generate(PROMPT, max_tokens=9).tokens == session.generate(PROMPT, max_tokens=9).tokens
        assert other.n_ctx == N_CTX, "what the graph has room for"


def test_pieces_join_to_the_text_and_the_completion_follows(session: Session) -> None:
    stream = session.stream(PROMPT, max_tokens=20, temperature=1.5, seed=4)
    pieces = list(stream)
    assert stream.completion is not None and stream.completion is session.last
    assert "".join(pieces) == stream.completion.text
    assert len(pieces) > 5 and all(pieces)
    joined = b"".join(session.model.token_to_piece(token) for token in stream.completion.tokens)
    assert stream.completion.text == joined.decode("utf-8", "replace")


def test_same_seed_same_text(session: Session) -> None:
    options: dict[str, Any] = {"max_tokens": 30, "temperature": 1.0}
    first = session.generate(PROMPT, seed=7, **options)
    session.generate("another prompt", seed=1, **options)
    assert session.generate(PROMPT, seed=7, **options).tokens == first.tokens
    assert session.generate(PROMPT, seed=8, **options).tokens != first.tokens
    assert len({session.generate(PROMPT, **options).tokens for _ in range(3)}) > 1


def test_sampling_narrows_to_the_likeliest(session: Session) -> None:
    greedy = session.generate(PROMPT, max_tokens=12).tokens
    hot: dict[str, Any] = {"max_tokens": 12, "temperature": 2.0, "seed": 3}
    assert session.generate(PROMPT, **hot).tokens != greedy
    for narrow in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}):
        assert session.generate(PROMPT, **hot, **narrow).tokens == greedy


def test_a_shared_beginning_is_reused_and_changes_nothing(folder: Path, session: Session) -> None:
    first = session.generate(PROMPT, max_tokens=25)
    longer = [*session.model.tokenize(PROMPT, add_special=True), *first.tokens[:10], 50, 60]
    again = session.generate(longer, max_tokens=25)
    assert again.timings.reused_tokens == len(longer) - 2
    branched = session.generate([*longer[:6], 99], max_tokens=25)
    assert branched.timings.reused_tokens == 6
    repeated = session.generate([*longer[:6], 99], max_tokens=25)
    assert repeated.timings.reused_tokens == 6, "the last token is computed again for its logits"
    for prompt, result in ((longer, again), ([*longer[:6], 99], branched), ([*longer[:6], 99], repeated)):
        with load(folder, n_ctx=N_CTX, threads=1) as fresh:
            expected = fresh.generate(prompt, max_tokens=25)
        assert expected.timings.reused_tokens == 0
        assert result.tokens == expected.tokens


def test_score_is_log_softmax_of_the_logits(session: Session) -> None:
    ids = np.random.default_rng(5).integers(0, N_VOCAB, 150).tolist()
    scores = session.score(ids)
    logits = session.context.logits_of(ids).astype(np.float64)[:-1]
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(scores, expected[np.arange(149), ids[1:]], atol=1e-4)
    assert np.ptp(scores) > 1


def test_scoring_and_generating_take_turns(session: Session) -> None:
    prompt = session.model.tokenize(PROMPT, add_special=True)
    expected = session.generate(prompt, max_tokens=10).tokens
    session.score([*prompt, 4, 5])
    result = session.generate(prompt, max_tokens=10)
    assert result.timings.reused_tokens == len(prompt) - 1
    assert result.tokens == expected


def test_contexts_do_not_overflow_silently(session: Session) -> None:
    with pytest.raises(UsageError, match=r"a prompt of 257 tokens does not fit the context of 256 tokens. Load with a larger n_ctx"):
        session.generate([1] * 257)
    with pytest.raises(UsageError, match="a prompt of 250 tokens and 7 new tokens does not fit the context of 256 tokens"):
        session.stream([1] * 250, max_tokens=7)
    assert session.generate([1] * 250, max_tokens=6).timings.prompt_tokens == 250


def test_a_full_context_ends_a_generation(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeq.runtime.session.Sampler.sample", lambda _self, _context: 70)
    full = session.generate([1] * 250)
    assert (len(full.tokens), full.finish_reason, session.context.n_past) == (256 - 250 + 1, "length", 256)


def test_memory_tells_model_and_cache(session: Session, folder: Path) -> None:
    memory = session.memory()
    assert memory.model_bytes == session.model.size_bytes > 100_000
    copies = 1 if folder.name == "GroupQueryAttention" else 2
    assert memory.kv_bytes == copies * 2 * 2 * N_CTX * 2 * HEAD_DIM * 4
    assert memory.rss > memory.kv_bytes


def test_an_unfinished_stream_keeps_the_session(session: Session) -> None:
    stream = session.stream(PROMPT, max_tokens=30, temperature=1.0, seed=1)
    next(stream)
    with pytest.raises(RuntimeFailure, match="busy with an unfinished stream"):
        session.generate(PROMPT, max_tokens=1)
    stream.close()
    expected = session.generate(PROMPT, max_tokens=10).tokens
    with load(session.model.path, n_ctx=256, threads=1) as fresh:
        assert fresh.generate(PROMPT, max_tokens=10).tokens == expected


def test_many_threads_get_the_same_answer(session: Session) -> None:
    expected = session.generate(PROMPT, max_tokens=8).tokens
    results: list[tuple[int, ...]] = []
    threads = [threading.Thread(target=lambda: results.append(session.generate(PROMPT, max_tokens=8).tokens)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 6


def test_use_after_close_is_an_error(folder: Path) -> None:
    session = load(folder, n_ctx=64, threads=1)
    stream = session.stream(PROMPT, max_tokens=10)
    next(stream)
    session.close()  # ends this thread's stream
    session.close()
    assert list(stream) == []
    with pytest.raises(RuntimeFailure, match=r"the session is closed\. Load it again"):
        session.generate("x")


def test_a_session_survives_a_failed_decode(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = session.generate(PROMPT, max_tokens=10).tokens
    real, calls = OnnxContext.decode, []

    def failing(self: OnnxContext, tokens: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeFailure("broken")
        return real(self, tokens, **options)

    with monkeypatch.context() as patch:
        patch.setattr(OnnxContext, "decode", failing)
        with pytest.raises(RuntimeFailure, match="broken"):
            session.generate(PROMPT, max_tokens=10)
    assert session.generate(PROMPT, max_tokens=10).tokens == expected


def test_outputs_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    write_tiny_onnx(tmp_path / "m", gain=float("nan"))
    with (
        load(tmp_path / "m", n_ctx=64, threads=1) as session,
        pytest.raises(RuntimeFailure, match=r"outputs are not finite\. Its weights are damaged"),
    ):
        session.generate(PROMPT, max_tokens=3)


def test_chat_goes_through_the_models_own_template(session: Session) -> None:
    from transformers import PreTrainedTokenizerFast

    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the dog?"}]
    oracle = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), bos_token="<|im_start|>", eos_token="<|im_end|>")
    expected = oracle.apply_chat_template(messages, chat_template=CHAT_TEMPLATE, add_generation_prompt=True, tokenize=False)
    assert session.render_chat(messages) == expected
    ids = session.chat_prompt(messages)
    assert ids == oracle.encode(expected, add_special_tokens=False)
    assert session.chat(messages, max_tokens=8).tokens == session.generate(ids, max_tokens=8).tokens


def test_generation_ends_with_every_token_that_ends_it(folder: Path, tmp_path: Path) -> None:
    copied = copy_of(folder, tmp_path / "m")
    with load(folder, threads=1) as session:
        tokens = session.generate(PROMPT, max_tokens=12).tokens
    edit_json(copied / "genai_config.json", lambda document: document["model"].update(eos_token_id=[2, tokens[4]]))
    with load(copied, threads=1) as session:
        ended = session.generate(PROMPT, max_tokens=12)
    assert (ended.tokens, ended.finish_reason) == (tokens[: tokens.index(tokens[4])], "stop")


def test_models_without_a_template_do_not_chat(folder: Path, tmp_path: Path) -> None:
    copied = copy_of(folder, tmp_path / "m")
    (copied / "chat_template.jinja").unlink()
    edit_json(copied / "tokenizer_config.json", lambda config: config.pop("chat_template"))
    with load(copied, n_ctx=64, threads=1) as session, pytest.raises(TokenizerError, match="the model has no chat template"):
        session.chat("hi")


def test_what_onnx_models_have_not(session: Session, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"patches change weights in memory, and ONNX Runtime gives no access to them\. Use a GGUF"):
        load(folder, patchable=True)
    with pytest.raises(UsageError, match=r"patches change weights in memory"):
        session.undo_patch("sql")
    with pytest.raises(PackageError, match="is an ONNX folder: what it may be cut to"):
        load(folder, rate=0.2)
    with pytest.raises(UsageError, match="this graph keeps keys and values in f32, not f16"):
        load(folder, kv_type="f16")
    from lora_files import write_lora  # a GGUF adapter of a GGUF model

    adapter = write_lora(tmp_path / "sql.gguf")
    with pytest.raises(AdapterError, match=r"sql\.gguf: a GGUF adapter cannot act on .*model\.onnx\. Give an \.onnx_adapter file"):
        session.load_adapter(adapter)
    assert session.generate(PROMPT, max_tokens=2).tokens


def test_gguf_and_onnx_sessions_side_by_side(session: Session, tmp_path: Path) -> None:
    expected = session.generate(PROMPT, max_tokens=10, temperature=0.8, seed=5).tokens
    with load(write_tiny_gguf(tmp_path / "tiny.gguf"), n_ctx=256, threads=1) as other:
        other.generate(PROMPT, max_tokens=10, temperature=0.8, seed=5)
        assert session.generate(PROMPT, max_tokens=10, temperature=0.8, seed=5).tokens == expected


def test_an_unreadable_graph_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    copied = copy_of(folder, tmp_path / "m")

    def change(proto: Any) -> None:
        next(node for node in proto.graph.node if node.op_type == "MatMul").input.append("nothing")

    edit_graph(copied, change)
    with pytest.raises(RuntimeFailure, match="cannot load it"):
        load(copied, threads=1)
    with load(folder, n_ctx=64, threads=1) as session:
        assert session.generate("the", max_tokens=1).tokens
