"""A context over ONNX Runtime: logits equal the float reference's, in one go, in chunks and token by token, and reuse changes nothing."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import psutil
import pytest
from onnx_folders import N_CTX, AttentionOp, copy_of, edit_graph, write_tiny_onnx
from tiny import N_VOCAB

from edgeq.errors import AdapterError, MissingDependency, PlanError, RuntimeFailure, TokenizerError, UsageError
from edgeq.model import Model
from edgeq.onnx_adapter_file import write_onnx_adapter
from edgeq.reference import Reference
from edgeq.runtime import onnx_context, onnx_model
from edgeq.runtime.likelihood import Floats
from edgeq.runtime.onnx_adapters import OnnxAdapter
from edgeq.runtime.onnx_context import OnnxContext
from edgeq.runtime.onnx_model import OnnxModel

GAIN = 3.0
OPERATORS: tuple[AttentionOp, ...] = ("GroupQueryAttention", "Attention")


class Tiny:
    """A folder and the model it holds."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.path, self.source = folder / "model.onnx", write_tiny_onnx(folder, gain=GAIN, **options)

    def reference(self, ids: list[int]) -> Floats:
        return reference_logits(self.source, ids)


def reference_logits(model: Model, ids: list[int]) -> Floats:
    reference = Reference(model.spec, model.tensors)
    return GAIN * reference.logits(reference.hidden([ids])[0]).numpy()


@pytest.fixture(scope="module", params=OPERATORS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("onnx-context") / request.param, attention=request.param)


@pytest.fixture
def model(tiny: Tiny) -> Iterator[OnnxModel]:
    with OnnxModel.load(tiny.path, threads=1) as model:
        yield model


@pytest.fixture
def context(model: OnnxModel) -> Iterator[OnnxContext]:
    with OnnxContext(model, n_ctx=N_CTX, n_batch=32) as context:
        yield context


def ids(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, N_VOCAB, n).tolist()


def test_logits_equal_the_reference(tiny: Tiny, context: OnnxContext) -> None:
    expected = tiny.reference(ids(70))
    logits = context.logits_of(ids(70))
    assert logits.dtype == np.float32 and logits.shape == (70, N_VOCAB)
    assert np.abs(logits - expected).max() < 1e-4 < 1 < np.ptp(expected)
    assert context.n_past == 70


@pytest.mark.parametrize("n_batch", [1, 7, 64, 512])
def test_chunks_equal_one_go(tiny: Tiny, model: OnnxModel, n_batch: int) -> None:
    expected = tiny.reference(ids(130))
    with OnnxContext(model, n_ctx=N_CTX, n_batch=n_batch) as context:
        np.testing.assert_allclose(context.decode(ids(130))[0], expected[-1], atol=1e-4)
        assert context.n_past == 130
        np.testing.assert_allclose(context.logits_of(ids(130)), expected, atol=1e-4)


def test_decode_in_steps_equals_logits_of_the_whole(context: OnnxContext) -> None:
    tokens = ids(70)  # more than two batches
    whole = context.logits_of(tokens)
    context.clear()
    # Products of other shapes add up in another order: float32 rounding.
    np.testing.assert_allclose(context.decode(tokens[:50]), whole[49:50], atol=1e-4)
    np.testing.assert_allclose(context.decode(tokens[50:57], outputs="all"), whole[50:57], atol=1e-4)
    for i in range(57, 70):
        np.testing.assert_allclose(context.decode([tokens[i]])[0], whole[i], atol=1e-4)
        np.testing.assert_allclose(context.last_logits, whole[i], atol=1e-4)
    assert np.ptp(whole) > 1


def test_a_greedy_loop_takes_the_likeliest(context: OnnxContext) -> None:
    prompt = ids(9)
    token = int(context.decode(prompt)[0].argmax())
    step, found = context.greedy_stepper(20), [token]
    for _ in range(20):
        found.append(step(found[-1]))
    assert context.n_past == 29
    tokens = list(prompt)
    for expected in found:
        assert int(context.logits_of(tokens)[-1].argmax()) == expected
        tokens.append(expected)
    assert len(set(found)) > 3


def test_truncate_forgets_exactly_the_rest(context: OnnxContext) -> None:
    tokens = ids(40)
    expected = context.logits_of([*tokens[:12], 7, 8])[-2:].copy()
    context.logits_of(tokens)
    assert context.truncate(40) == 40
    assert context.truncate(12) == 12 == context.n_past
    np.testing.assert_allclose(context.decode([7, 8], outputs="all"), expected, atol=1e-4)
    with pytest.raises(UsageError, match="cannot keep 15 tokens of the 14 in the cache"):
        context.truncate(15)
    assert context.truncate(0) == 0
    again = context.decode(tokens[:5])[0].copy()
    np.testing.assert_allclose(again, context.logits_of(tokens[:5])[-1], atol=1e-4)


def test_a_cache_on_a_gpu_that_is_not_written_in_place_starts_over(tiny: Tiny, model: OnnxModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with OnnxContext(model, n_ctx=64) as context:
        context.decode(ids(20))
        monkeypatch.setattr(model, "gpu", 0)
        in_place = model.facts.caches[0].in_place
        assert context.truncate(10) == (10 if in_place else 0)


def test_logits_of_fills_an_array_of_the_caller(context: OnnxContext) -> None:
    out = np.full((5, N_VOCAB), np.nan, dtype=np.float32)
    assert context.logits_of(ids(5), out) is out
    assert np.isfinite(out).all()
    with pytest.raises(UsageError, match=r"out is float64 of shape \[5, 320\], expected float32"):
        context.logits_of(ids(5), out.astype(np.float64))


def test_too_many_tokens_never_reach_the_runtime(context: OnnxContext) -> None:
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


@pytest.mark.parametrize("bad", [[0, N_VOCAB], [-1]])
def test_token_ids_out_of_range_are_refused(context: OnnxContext, bad: list[int]) -> None:
    with pytest.raises(UsageError, match=rf"token {len(bad) - 1} is {bad[-1]}, but the vocabulary of model\.onnx has ids 0 to 319"):
        context.decode(bad)
    assert context.n_past == 0


def test_bad_context_arguments(model: OnnxModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("n_ctx", "n_batch"):
        options: dict[str, Any] = {"n_ctx": 64, name: 0}
        with pytest.raises(UsageError, match=f"{name} is 0; expected at least 1"):
            OnnxContext(model, **options)
    with pytest.raises(UsageError, match=r"this graph keeps keys and values in f32, not q8_0. Leave kv_type out"):
        OnnxContext(model, n_ctx=64, kv_type="q8_0")
    with pytest.raises(PlanError, match=r"has rotary tables for 256 tokens, n_ctx is 257. Use a smaller n_ctx"):
        OnnxContext(model, n_ctx=N_CTX + 1)
    monkeypatch.setattr(onnx_context.psutil, "virtual_memory", lambda: SimpleNamespace(total=1000))
    with pytest.raises(PlanError, match=r"256 tokens of context need 0\.0 GB of keys and values, this machine has 0\.0 GB"):
        OnnxContext(model, n_ctx=N_CTX)


def test_no_adapters(context: OnnxContext, tmp_path: Path) -> None:
    """A graph without places runs as before, and refuses a file."""
    context.set_adapters({})
    assert not context.model.facts.places
    path = tmp_path / "sql.onnx_adapter"
    values = {f"{name}.lora_{half}.weight": np.ones((2, 2), np.float32) for name in ("model.layers.0.mlp.up_proj",) for half in "AB"}
    write_onnx_adapter(path, values, plan="")
    with pytest.raises(
        AdapterError, match=r"has no place for adapters. Export the model with the adapter kept \(--adapters keep\) or merged"
    ):
        OnnxAdapter.load(context.model, path)


def test_float16(tmp_path: Path) -> None:
    tiny = Tiny(tmp_path / "m", float_type=ir.DataType.FLOAT16)
    expected = tiny.reference(ids(60))
    with OnnxModel.load(tiny.path, threads=1) as model, OnnxContext(model, n_ctx=64, n_batch=16) as context:
        assert (context.kv_type, model.facts.kv_bytes(64)) == ("f16", 2 * 2 * 64 * 2 * 32 * 2)
        logits = context.logits_of(ids(60))
        assert logits.dtype == context.decode([4]).dtype == np.float32
        assert 0 < np.abs(logits - expected).max() < 0.02 * np.ptp(expected), "products of half precision"


def test_graphs_that_want_positions(tmp_path: Path) -> None:
    """Graphs of other exporters take position_ids; here they pick the rows of the tables."""
    tiny = Tiny(tmp_path / "m", attention="Attention")
    plain = tiny.reference(ids(40))

    def change(proto: Any) -> None:
        import onnx

        for node in proto.graph.node:
            if node.op_type == "RotaryEmbedding":
                node.input[3] = "position_ids"
        proto.graph.input.append(onnx.helper.make_tensor_value_info("position_ids", 7, ["batch_size", "sequence_length"]))

    path = edit_graph(tiny.path.parent, change)
    with OnnxModel.load(path, threads=1) as model, OnnxContext(model, n_ctx=64, n_batch=7) as context:
        assert model.facts.positions == "position_ids"
        np.testing.assert_allclose(context.logits_of(ids(40)), plain, atol=1e-4)


def test_a_failed_run_leaves_the_cache_as_it_was(context: OnnxContext, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = ids(20)
    expected = context.logits_of([*tokens, 9])[-1].copy()
    context.logits_of(tokens)
    with monkeypatch.context() as patch:
        patch.setattr(context._graph, "_positions", onnx_context._Numbers(np.full(N_CTX, 99)))  # rows of logits that do not exist
        with pytest.raises(RuntimeFailure, match=r"model\.onnx: computing 1 tokens after 20 failed\. ONNX Runtime said: (?!\[ONNX)\S"):
            context.decode([9])
    assert context.n_past == 20
    np.testing.assert_allclose(context.decode([9])[0], expected, atol=1e-4)


def test_facts_of_a_loaded_model(tiny: Tiny, model: OnnxModel) -> None:
    assert (model.path, model.n_vocab, model.n_ctx_train, model.threads) == (tiny.path, N_VOCAB, N_CTX, 1)
    assert (model.bos, model.eos, model.eog) == (1, 2, frozenset({0, 2}))
    assert [model.is_eog(token) for token in (0, 1, 2)] == [True, False, True]
    assert model.description == "llama, 2 layers, ONNX opset 23, f32"
    assert model.library.startswith("onnxruntime 1.")
    assert model.size_bytes == sum(tensor.nbytes for tensor in tiny.source.tensors.values()) + _tables(tiny)
    assert model.token_text(1) == "<|im_start|>"
    assert model.detokenize(model.tokenize("the dog")) == "the dog"


def _tables(tiny: Tiny) -> int:
    """Bytes of what the graph has besides the model's tensors: rotary tables, and constants."""
    import onnx

    tensors = onnx.load(tiny.path).graph.initializer
    return sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in tensors if not tensor.name.startswith("model."))


def test_a_tokenizer_of_another_model(tiny: Tiny, tmp_path: Path) -> None:
    from tiny import tiny_tokenizer

    folder = copy_of(tiny.path.parent, tmp_path / "m")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json has 321 tokens, the model's logits 320\. They belong to different models"):
        OnnxModel.load(folder / "model.onnx", threads=1)


def test_close_is_final_and_repeatable(tiny: Tiny) -> None:
    model = OnnxModel.load(tiny.path, threads=1)
    first, second = OnnxContext(model, n_ctx=64), OnnxContext(model, n_ctx=64)
    first.close()
    first.close()
    calls: tuple[Callable[[], Any], ...]
    calls = (
        lambda: first.decode([1]),
        first.clear,
        lambda: first.truncate(0),
        lambda: first.logits_of([1]),
        lambda: first.greedy_stepper(1),
    )
    for call in calls:
        with pytest.raises(RuntimeFailure, match=r"the context is closed\. Make a new one"):
            call()
    other = model.share()
    model.close()
    assert second.decode([1]).shape == (1, N_VOCAB), "someone else has it still"
    other.close()
    other.close()
    for call in (lambda: second.decode([1]), lambda: OnnxContext(model, n_ctx=64)):
        with pytest.raises(RuntimeFailure, match=r"the model is closed\. Load it again"):
            call()


def test_nothing_keeps_a_closed_model(tiny: Tiny) -> None:
    model = OnnxModel.load(tiny.path, threads=1)
    context = OnnxContext(model, n_ctx=64)
    context.decode([1, 2])
    session, graph = weakref.ref(model.session), weakref.ref(context._graph)
    model.close()
    gc.collect()
    assert session() is None and graph() is None


def test_memory_is_given_back(tiny: Tiny) -> None:
    def cycle() -> None:
        with OnnxModel.load(tiny.path, threads=1) as model, OnnxContext(model, n_ctx=256) as context:
            context.decode(ids(100))

    for _ in range(5):  # allocator and caches settle
        cycle()
    gc.collect()
    before = psutil.Process().memory_info().rss
    for _ in range(20):
        cycle()
    gc.collect()
    grown = psutil.Process().memory_info().rss - before
    assert grown < 3 << 20, f"20 cycles left {grown} bytes behind"  # weights, cache and graph of one model are 1.5 MiB


def test_threads(tiny: Tiny) -> None:
    with pytest.raises(UsageError, match="threads is 0; expected at least 1"):
        OnnxModel.load(tiny.path, threads=0)
    with OnnxModel.load(tiny.path, threads=2) as model, OnnxContext(model, n_ctx=64) as context:
        assert context.threads == 2
        np.testing.assert_allclose(context.logits_of(ids(30)), tiny.reference(ids(30)), atol=1e-4)


def test_nothing_is_printed(tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with OnnxModel.load(tiny.path, threads=1) as model, OnnxContext(model, n_ctx=64) as context:
        context.decode([1])
    folder = copy_of(tiny.path.parent, tmp_path / "m")

    def change(proto: Any) -> None:
        next(node for node in proto.graph.node if node.op_type == "MatMul").input.append("nothing")

    with pytest.raises(RuntimeFailure, match="cannot load it"):
        OnnxModel.load(edit_graph(folder, change), threads=1)
    assert capfd.readouterr() == ("", "")


def test_missing_onnxruntime_says_how_to_get_it(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_model, "_ready", {})
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependency, match=r"onnxruntime is not installed. Install it with: pip install 'edgeq\[onnx\]'"):
        OnnxModel.load(tiny.path)


def test_importing_loads_no_library() -> None:
    code = (
        "import sys, edgeq.runtime.session, edgeq.runtime.bench, edgeq.runtime.engine, edgeq.runtime.onnx_context, edgeq.runtime.worker\n"
        "print([m for m in ('onnxruntime', 'onnx', 'tokenizers', 'llama_cpp', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
