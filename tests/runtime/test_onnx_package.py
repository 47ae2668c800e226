"""ONNX packages measured and proven: worker, gate, fingerprint, eval, bench and the command line, on whole and on damaged files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_folders import HEAD_DIM, N_CTX, copy_of, edit_graph, write_tiny_onnx
from tiny import CHAT_TEMPLATE, N_VOCAB, edit_json
from tiny_gguf import write_tiny_gguf

import edgeq
from edgeq.errors import AdapterError, PackageError, RuntimeFailure, SourceError, UsageError
from edgeq.gate import Thresholds
from edgeq.gate_prompts import passage_windows
from edgeq.model import Model
from edgeq.package import record_files, sha256, write_manifest
from edgeq.reference import Reference
from edgeq.reference_scores import TorchScores
from edgeq.runtime.engine import artifact_sha256
from edgeq.runtime.fingerprint import check_fingerprint, make_fingerprint
from edgeq.runtime.likelihood import negative_log_likelihood
from edgeq.runtime.onnx_context import OnnxContext
from edgeq.runtime.onnx_model import OnnxModel
from edgeq.runtime.verify import run_gate
from edgeq.runtime.worker import ScoringWorker

EXACT = Thresholds(grid="F32", kl_mean=1e-6, kl_p99=1e-5, top1_agreement=1.0)
IDS = [1, *range(40, 100)]
SHORT = 200  # tokens that the model was trained for; contexts of the gate are rounded up to 256
TEXT = "the quick brown fox jumps over the lazy dog, and the other dogs think that this is the best thing there is. " * 8


def scores_of(model: Model) -> TorchScores:
    return TorchScores(Reference(model.spec, model.tensors), passage_windows(model.tokenizer, n_ctx=model.spec.n_ctx))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    """A package, and the model it was made from."""
    folder = tmp_path_factory.mktemp("onnx-package") / "package"
    model = write_tiny_onnx(folder, gain=1.0)
    make_fingerprint(scores_of(model), tokenizer=model.tokenizer, thresholds=EXACT).save(folder / "reference.npz")
    files = {record.path: record for record in record_files(folder, sorted(folder.iterdir()))}
    artifact = files.pop("model.onnx")
    manifest = {
        "status": "passed",
        "export": {"profile": "laptop-cpu", "n_ctx": 128, "kv_type": "f16"},
        "artifacts": [{"format": "onnx", **artifact.to_json()}],
        "side_files": [record.to_json() for record in files.values()],
        "adapters": [],
    }
    write_manifest(folder, manifest)
    return folder, model


@pytest.fixture
def package(made: tuple[Path, Model], tmp_path: Path) -> Path:
    return copy_of(made[0], tmp_path / "package")


@pytest.fixture(scope="module")
def worker(made: tuple[Path, Model]) -> Any:
    with ScoringWorker(made[0] / "model.onnx", n_ctx=N_CTX, threads=1, n_ubatch=16) as worker:
        yield worker


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def swap(package: Path) -> None:
    """The weights of another model of the same sizes."""
    other = package.with_name("other")
    write_tiny_onnx(other, gain=1.0, seed=9)
    (other / "model.onnx.data").replace(package / "model.onnx.data")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped weight": lambda p: flip(p / "model.onnx.data", 40_000),
    "flipped graph": lambda p: flip(p / "model.onnx", 900),
    "swapped weights": swap,
    "cut short": lambda p: os.truncate(p / "model.onnx.data", 100_000),
    "missing weights": lambda p: (p / "model.onnx.data").unlink(),
    "missing graph": lambda p: (p / "model.onnx").unlink(),
    "other tokenizer": lambda p: flip(p / "tokenizer.json", 3000),
    "other configuration": lambda p: edit_json(p / "genai_config.json", lambda document: document["model"].update(eos_token_id=7)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_by_verify_load_eval_and_bench(package: Path, tmp_path: Path, damage: str) -> None:
    DAMAGE[damage](package)
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    message = r"does not match its hash|is missing. The package is damaged|bytes, the manifest says"
    calls: tuple[Callable[[], object], ...] = (
        lambda: edgeq.verify(package, threads=1),
        lambda: edgeq.load(package, threads=1),
        lambda: edgeq.evaluate(package, text, ctx=32, threads=1),
        lambda: edgeq.bench([package], prompt_tokens=4, gen_tokens=2, repeat=1, threads=1),
    )
    for call in calls:
        with pytest.raises(PackageError, match=message):
            call()


def test_the_runtime_itself_takes_flipped_weights(package: Path) -> None:
    """Why a package is hashed before it is loaded."""
    with OnnxModel.load(package / "model.onnx", threads=1) as model, OnnxContext(model, n_ctx=64) as context:
        before = context.logits_of(IDS)
    data = bytearray((package / "model.onnx.data").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    (package / "model.onnx.data").write_bytes(data)
    with OnnxModel.load(package / "model.onnx", threads=1) as model, OnnxContext(model, n_ctx=64) as context:
        assert not np.allclose(context.logits_of(IDS), before, atol=1e-4)


def test_verify_passes_what_is_whole(made: tuple[Path, Model]) -> None:
    found = edgeq.verify(made[0], threads=1)
    assert found.passed and found.files == 7, found.failures
    assert found.gate is not None and found.gate.runtime.startswith("onnxruntime 1.") and found.gate.runtime.endswith(" on CPU")
    assert found.gate.tokenizer_equal and found.gate.kl_mean is not None and found.gate.kl_mean < 1e-6


def test_a_session_takes_what_the_package_was_planned_for(made: tuple[Path, Model]) -> None:
    with edgeq.load(made[0], threads=1) as session:
        assert session.n_ctx == 128
        assert session.context.kv_type == "f32", "that of the graph"
        assert session.generate("the", max_tokens=3).tokens
        with pytest.raises(UsageError, match=r"no adapter is named 'sql': .* has no adapters"):
            session._open_adapters("sql")


def test_logits_are_those_of_the_runtime(made: tuple[Path, Model], worker: ScoringWorker) -> None:
    with OnnxModel.load(made[0] / "model.onnx", threads=1) as model, OnnxContext(model, n_ctx=N_CTX, n_batch=16) as context:
        expected = context.logits_of(IDS)
    logits = worker.logits(IDS).copy()
    assert logits.dtype == np.float32 and np.array_equal(logits, expected)
    nll = worker.nll(IDS)
    np.testing.assert_allclose(nll, negative_log_likelihood(expected[:-1], np.array(IDS[1:])), rtol=1e-12)
    seen: list[int] = []
    worker.logits(IDS, on_tokens=seen.append)
    assert seen == [16, 32, 48, 61]


def test_facts_of_a_worker(worker: ScoringWorker) -> None:
    facts = worker.facts
    assert (facts.architecture, facts.n_vocab, facts.n_ctx_train, facts.threads) == ("llama", N_VOCAB, N_CTX, 1)
    assert (facts.bos, facts.bos_text, facts.eos, facts.eos_text) == (1, "<|im_start|>", 2, "<|im_end|>")
    assert facts.chat_template == CHAT_TEMPLATE and facts.library.startswith("onnxruntime 1.")
    assert worker.tokenize("<|im_start|>Größe 12\n", parse_special=True)[0] == 1


def test_a_bad_request_leaves_the_worker_ready(worker: ScoringWorker) -> None:
    with pytest.raises(UsageError, match=r"token 1 is 320, but the vocabulary of model\.onnx has ids 0 to 319"):
        worker.logits([0, N_VOCAB])
    with pytest.raises(UsageError, match="257 tokens exceed the context of 256"):
        worker.nll([1] * 257)
    assert len(worker.nll(IDS)) == 60


def test_a_worker_that_ends_says_what_it_ran(made: tuple[Path, Model]) -> None:
    worker = ScoringWorker(made[0] / "model.onnx", n_ctx=64)
    worker.close()
    with pytest.raises(RuntimeFailure, match=r"model\.onnx: the process that ran onnxruntime is closed\. Start a new one"):
        worker.nll(IDS)


def test_gguf_adapters_are_refused_before_a_process_starts(made: tuple[Path, Model], tmp_path: Path) -> None:
    from lora_files import write_lora

    with pytest.raises(AdapterError, match=r"sql\.gguf: a GGUF adapter cannot act on .*model\.onnx"):
        ScoringWorker(made[0] / "model.onnx", n_ctx=64, adapter=write_lora(tmp_path / "sql.gguf"))


def test_the_gate_passes_what_is_right_and_fails_what_is_not(made: tuple[Path, Model], package: Path) -> None:
    folder, model = made
    scores = scores_of(model)
    options: dict[str, Any] = {"tokenizer": model.tokenizer, "thresholds": EXACT, "threads": 1}
    right = run_gate(folder / "model.onnx", scores, **options)
    assert right.passed, right.failures
    assert right.tokenizer_equal and right.chat_template_equal and right.runtime.startswith("onnxruntime 1.")

    def slower(proto: Any) -> None:
        for node in proto.graph.node:
            for attribute in node.attribute:
                if attribute.name == "scale":
                    attribute.f *= 1.1

    wrong = run_gate(edit_graph(package, slower), scores, **options)
    assert any("mean KL from the reference" in failure for failure in wrong.failures)
    (package / "model.onnx").write_bytes(b"no graph")
    refused = run_gate(package / "model.onnx", scores, **options)
    assert refused.runtime == "onnxruntime on CPU" and "is no ONNX model" in refused.failures[0]


def test_the_gate_gives_a_short_model_no_more_than_its_tables_have(tmp_path: Path) -> None:
    """References round contexts up to 256 tokens, as llama.cpp does."""
    model = write_tiny_onnx(tmp_path / "m", gain=1.0, max_position_embeddings=SHORT)

    def shorten(proto: Any) -> None:
        import onnx

        for i, tensor in enumerate(proto.graph.initializer):
            if tensor.name in ("cos_cache", "sin_cache"):
                table = onnx.numpy_helper.to_array(tensor, base_dir=str(tmp_path / "m"))[:SHORT]
                proto.graph.initializer[i].CopyFrom(onnx.numpy_helper.from_array(table, tensor.name))

    path, scores = edit_graph(tmp_path / "m", shorten), scores_of(model)
    assert scores.n_ctx == 256
    assert run_gate(path, scores, tokenizer=model.tokenizer, thresholds=EXACT, threads=1).passed
    fingerprint = make_fingerprint(scores, tokenizer=model.tokenizer, thresholds=EXACT)
    assert check_fingerprint(path, fingerprint, threads=1).passed


def test_other_tokenizers_fail_the_fingerprint(made: tuple[Path, Model], package: Path) -> None:
    edit_json(package / "tokenizer.json", lambda tokenizer: tokenizer["model"]["merges"].pop(0))
    fingerprint = make_fingerprint(scores_of(made[1]), tokenizer=made[1].tokenizer, thresholds=EXACT)
    found = check_fingerprint(package / "model.onnx", fingerprint, threads=1)
    assert found.tokenizer_equal is False and "the tokenizers differ for" in found.failures[0]
    (package / "tokenizer.json").unlink()
    found = check_fingerprint(package / "model.onnx", fingerprint, threads=1)
    assert "tokenizer.json is missing" in found.failures[0]


def test_perplexity_is_that_of_the_reference(made: tuple[Path, Model], tmp_path: Path) -> None:
    folder, model = made
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    found = edgeq.evaluate(folder, text, ctx=48, chunks=4, threads=1)
    ids = model.tokenizer.encode(TEXT)
    windows = [ids[start : start + 48] for start in range(0, 4 * 48, 48)]
    reference = Reference(model.spec, model.tensors)
    nll = [
        negative_log_likelihood(reference.logits(hidden).numpy()[:-1], np.array(window[1:]))
        for window, hidden in zip(windows, reference.hidden(windows), strict=True)
    ]
    assert found.nll_mean == pytest.approx(float(np.mean(nll)), rel=1e-6)
    assert (found.tokens, found.ctx, found.chunks) == (4 * 47, 48, 4)
    with pytest.raises(UsageError, match="one window needs 256"):
        edgeq.evaluate(folder, text.with_name("short.txt") if text.with_name("short.txt").write_text("the") else text, ctx=256)


def test_bench_measures_onnx_beside_gguf(made: tuple[Path, Model], tmp_path: Path) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    onnx, llama = edgeq.bench([made[0], gguf], prompt_tokens=40, gen_tokens=6, repeat=2, threads=1)
    assert (onnx.runtime, llama.runtime, onnx.device) == ("onnxruntime", "llama.cpp", "cpu")
    assert list(onnx.to_json()) == list(llama.to_json())
    assert onnx.kv_bytes == 2 * 2 * 46 * 2 * HEAD_DIM * 4
    assert (onnx.environment["kv_type"], llama.environment["kv_type"]) == ("f32", "f16")
    assert onnx.environment["model"].startswith("llama, 2 layers, ONNX opset 23")
    assert onnx.environment["software"]["onnxruntime"].startswith("onnxruntime")
    assert onnx.environment["artifact_sha256"] == artifact_sha256(made[0] / "model.onnx") != llama.environment["artifact_sha256"]
    with OnnxModel.load(made[0] / "model.onnx", threads=1) as model:
        assert onnx.model_bytes == model.size_bytes
    assert onnx.peak_rss_bytes is not None and onnx.peak_rss_bytes > onnx.samples["rss_before_load_bytes"] > 0
    assert len(onnx.samples["repeats"]) == 2 and all(len(sample["itl_ms"]) == 6 for sample in onnx.samples["repeats"])


def test_the_hash_of_an_artifact_is_that_of_all_its_weights(package: Path) -> None:
    before = artifact_sha256(package / "model.onnx")
    flip(package / "model.onnx.data", 40_000)
    assert artifact_sha256(package / "model.onnx") != before
    assert artifact_sha256(write_tiny_gguf(package / "a.gguf")) == sha256(package / "a.gguf")


def test_bench_on_a_gpu_names_what_is_missing(made: tuple[Path, Model]) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(RuntimeFailure, match=r"the installed onnxruntime cannot use CUDA\. .* pip install onnxruntime-gpu"):
        edgeq.bench([made[0]], prompt_tokens=4, gen_tokens=2, repeat=1, device="cuda")


def test_bench_without_a_part_of_the_runtime_says_how_to_get_it(
    made: tuple[Path, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("onnxruntime", "tokenizers"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}.py").write_text("raise ImportError('not here')", encoding="utf-8")
        monkeypatch.setenv("PYTHONPATH", str(folder))
        with pytest.raises(edgeq.EdgeqError, match=rf"{name} is not installed. Install it with: pip install 'edgeq\[onnx\]'"):
            edgeq.bench([made[0]], prompt_tokens=4, gen_tokens=2, repeat=1)


def test_the_command_line(made: tuple[Path, Model], package: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    status, out, err = run("verify", made[0], "--threads", 1, "--json")
    assert (status, json.loads(out)["passed"]) == (0, True), err
    status, out, err = run("run", made[0], "-p", "the quick", "--max-tokens", 5, "--threads", 1, "--json")
    assert status == 0 and len(json.loads(out)["tokens"]) == 5, err
    status, out, err = run("eval", made[0], "--text", text, "--ctx", 32, "--chunks", 2, "--threads", 1, "--json")
    assert status == 0 and json.loads(out)["chunks"] == 2, err
    status, out, err = run("bench", made[0], "--prompt-tokens", 5, "--gen-tokens", 2, "--repeat", 1, "--threads", 1, "--json")
    assert status == 0 and json.loads(out)[0]["runtime"] == "onnxruntime", err
    flip(package / "model.onnx.data", 40_000)
    for command in (("verify", package), ("run", package, "-p", "the")):
        status, out, err = run(*command)
        assert status == 1 and "model.onnx.data does not match its hash" in " ".join(err.split())


def test_a_folder_without_a_graph(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"no manifest\.json: it is not an edgeq package"):
        edgeq.load(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(SourceError, match="holds no graph"):
        edgeq.load(tmp_path)
