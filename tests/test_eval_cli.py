"""`edgeq eval` with several artifacts and tasks: rows against what they are defined as, and the command line's contract."""

import json
import math

import numpy as np
import pytest
import torch
from peft_folders import lora_folder
from real_llama import all_logits
from tiny import hf_folder
from tiny_elastic import write_tiny_elastic
from tiny_gguf import write_tiny_gguf

import edgeq
from edgeq.errors import OutputError, SourceError, UsageError
from edgeq.quality_api import evaluate_tasks
from edgeq.runtime.engine import artifact_sha256

TEXT = "The harbour lights of the island were built between 1847 and 1902. " * 20
CTX, CHUNKS = 48, 4


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    (folder / "t.txt").write_text(TEXT)
    choices = [{"prompt": f"The {word} is", "choices": ["red", "a long way", "blue"], "answer": i % 3} for i, word in enumerate("abcdef")]
    (folder / "c.jsonl").write_text("\n".join(map(json.dumps, choices)))
    (folder / "e.jsonl").write_text('{"prompt": "The capital of France is", "answer": "Paris"}\n' * 2)
    write_tiny_gguf(folder / "a.gguf", seed=1)
    write_tiny_gguf(folder / "b.gguf", seed=2)
    return folder


def by_metric(rows, artifact):
    return {row.metric: row for row in rows if row.artifact == str(artifact)}


def test_rows_against_the_definitions(files, tmp_path):
    """KL, agreement and perplexity from whole logits by torch; standard errors over windows."""
    a, b = files / "a.gguf", files / "b.gguf"
    rows = evaluate_tasks([a], text=files / "t.txt", reference=b, ctx=CTX, chunks=CHUNKS, threads=1)
    assert [row.artifact for row in rows] == [str(b)] * 2 + [str(a)] * 5  # the reference first

    from edgeq.runtime.llama import LlamaModel

    with LlamaModel.load(a, vocab_only=True) as model:
        ids = model.tokenize(TEXT)
    kl, agree, nll, nll_b = [], [], [], []
    for i in range(CHUNKS):
        window = ids[i * CTX : (i + 1) * CTX]
        q, p = (torch.log_softmax(torch.from_numpy(logits).double(), 1) for logits in all_logits([a, b], window, n_ctx=CTX))
        kl.append((p.exp() * (p - q)).sum(1).mean().item())
        agree.append((p.argmax(1) == q.argmax(1)).double().mean().item())
        nll.append(-np.mean([q[j, window[j + 1]].item() for j in range(CTX - 1)]))
        nll_b.append(-np.mean([p[j, window[j + 1]].item() for j in range(CTX - 1)]))
    error = lambda units: np.std(units, ddof=1) / math.sqrt(CHUNKS)  # noqa: E731
    found = by_metric(rows, a)
    assert found["kl_mean"].value == pytest.approx(np.mean(kl), rel=2e-3)  # another cache type: float32 against float16
    assert found["kl_mean"].stderr == pytest.approx(error(kl), rel=0.02)
    assert found["top1_agreement"].value == pytest.approx(np.mean(agree), abs=2 / CTX)
    assert found["nll_mean"].value == pytest.approx(np.mean(nll), rel=1e-3)
    assert found["perplexity"].value == pytest.approx(math.exp(np.mean(nll)), rel=5e-3)
    assert found["perplexity"].stderr == pytest.approx(math.exp(np.mean(nll)) * error(nll), rel=0.02)
    assert found["nll_mean"].difference == pytest.approx(np.mean(nll) - np.mean(nll_b), rel=0.01)
    assert found["nll_mean"].difference_stderr == pytest.approx(error(np.array(nll) - nll_b), rel=0.02)
    assert found["kl_p99"].stderr is None and found["kl_p99"].value > found["kl_mean"].value
    assert (found["kl_mean"].n, found["nll_mean"].n) == (CTX * CHUNKS, (CTX - 1) * CHUNKS)
    whole = edgeq.evaluate(a, files / "t.txt", ctx=CTX, chunks=CHUNKS, threads=1)
    assert found["perplexity"].value == pytest.approx(whole.perplexity, rel=1e-9)
    assert by_metric(rows, b)["perplexity"].difference is None


def test_a_model_is_its_own_reference(files):
    rows = evaluate_tasks([files / "a.gguf"], text=files / "t.txt", reference=files / "a.gguf", ctx=CTX, chunks=2, threads=1)
    found = {row.metric: row for row in rows if row.reference == "a.gguf"}
    assert (found["kl_mean"].value, found["top1_agreement"].value, found["perplexity"].difference) == (0.0, 1.0, 0.0)


def test_a_float_model_as_reference(tmp_path, files):
    model = hf_folder(tmp_path / "model", "llama")
    edgeq.export(model, profile="laptop-cpu", output=tmp_path / "f32", quant="F32", elastic=False, verify=False)
    rows = evaluate_tasks([tmp_path / "f32"], text=files / "t.txt", reference=model, ctx=CTX, chunks=2, threads=1)
    found = {row.metric: row for row in rows}
    assert {row.reference for row in rows} == {"model"} and {row.artifact for row in rows} == {str(tmp_path / "f32")}
    assert found["kl_mean"].value < 1e-5  # the same model; the cache is in float16
    assert found["top1_agreement"].value > 0.97
    assert (found["kl_mean"].quant, found["kl_mean"].rate) == ("F32", 0.0)
    other = write_tiny_gguf(tmp_path / "other.gguf")
    (found, *_) = [
        row for row in evaluate_tasks([other], text=files / "t.txt", reference=model, ctx=CTX, chunks=2) if row.metric == "kl_mean"
    ]
    assert found.value > 0.1
    with pytest.raises(UsageError, match=r"model: a reference in float is compared on a text\. Give --text"):
        evaluate_tasks([other], choices=files / "c.jsonl", reference=model)


def test_both_runtimes_say_the_same_of_one_model(tmp_path, files):
    model = hf_folder(tmp_path / "model", "llama", head_dim=32)
    for file_format, quant in (("gguf", "F32"), ("onnx", "fp32")):
        settings = {"profile": "laptop-cpu", "format": file_format, "quant": quant, "elastic": False, "verify": False}
        edgeq.export(model, output=tmp_path / file_format, **settings)
    tasks = {"text": files / "t.txt", "choices": files / "c.jsonl", "exact": files / "e.jsonl"}
    rows = evaluate_tasks([tmp_path / "onnx"], reference=tmp_path / "gguf", ctx=CTX, chunks=2, threads=1, **tasks)
    onnx = by_metric(rows, tmp_path / "onnx")
    assert {row.runtime for row in onnx.values()} == {"onnxruntime"}
    assert onnx["kl_mean"].value < 1e-5
    assert onnx["perplexity"].difference == pytest.approx(0, abs=0.01 * onnx["perplexity"].value)
    assert [onnx[name].difference for name in ("acc", "acc_norm", "exact_match")] == [0, 0, 0]
    assert "onnxruntime" in onnx["acc"].library


def test_cuts_and_adapters_side_by_side(tmp_path, files):
    """Rows of a cut are those of the cut as a file, hash included; with --adapter every rate comes without it and with it."""
    model = hf_folder(tmp_path / "model", "llama")
    lora_folder(tmp_path / "sql", model)
    package = tmp_path / "p"
    edgeq.export(model, profile="laptop-cpu", output=package, quant="Q8_0", adapters=[tmp_path / "sql"], adapter_mode="keep", verify=False)
    out = tmp_path / "q.json"
    options = {"text": files / "t.txt", "choices": files / "c.jsonl", "exact": files / "e.jsonl", "ctx": CTX, "chunks": 2, "threads": 1}
    rows = evaluate_tasks([package], rates=[0, 0.25], adapter="sql", output=out, **options)
    assert list(dict.fromkeys((row.rate, row.adapter) for row in rows)) == [(0, None), (0, "sql"), (0.25, None), (0.25, "sql")]
    values = {(row.rate, row.adapter): row.value for row in rows if row.metric == "perplexity"}
    assert len(set(values.values())) == 4  # a cut and an adapter change something
    cut = edgeq.cut(package, output=tmp_path / "cut.gguf", rate=0.25)
    alone = edgeq.evaluate(cut.path, files / "t.txt", ctx=CTX, chunks=2, threads=1)
    assert values[0.25, None] == pytest.approx(alone.perplexity, rel=1e-9)
    assert {row.artifact_sha256 for row in rows if row.rate == 0.25} == {artifact_sha256(cut.path)}
    document = json.loads(out.read_text())
    assert (document["edgeq_results"], document["kind"]) == (2, "quality")
    assert document["rows"] == [row.to_json() for row in rows]
    assert {row["metric"] for row in document["rows"]} == {"perplexity", "nll_mean", "acc", "acc_norm", "exact_match"}


def test_rows_join_with_the_benchs(tmp_path, files):
    from edgeq.runtime.report.read import read_results

    elastic = write_tiny_elastic(tmp_path / "p")
    edgeq.bench([elastic], rates=[0, 0.2], prompt_tokens=8, gen_tokens=4, repeat=1, threads=1, output=tmp_path / "b.json")
    evaluate_tasks([elastic], rates=[0, 0.2], text=files / "t.txt", ctx=CTX, chunks=1, threads=1, output=tmp_path / "q.json")
    variants, _ = read_results([tmp_path / "b.json", tmp_path / "q.json"])
    assert [bool(v.quality) and v.setup is not None for v in variants] == [True, True]
    assert variants[0].quality["perplexity t.txt"].value != variants[1].quality["perplexity t.txt"].value


def test_other_tokenizers_are_refused(tmp_path, files):
    merges = write_tiny_gguf(tmp_path / "m.gguf", fields={"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.merges": ["t h"]})
    with pytest.raises(UsageError, match=r"m\.gguf makes other tokens of the text than .*a\.gguf\. KL compares models of one tokenizer"):
        evaluate_tasks([files / "a.gguf"], text=files / "t.txt", reference=merges, ctx=CTX, chunks=2)


def test_vocabularies_of_other_sizes_are_refused(files):
    from edgeq.runtime.compare import compare_windows
    from edgeq.runtime.worker import ScoringWorker

    with (
        ScoringWorker(files / "a.gguf", n_ctx=CTX, threads=1) as worker,
        pytest.raises(UsageError, match=r"has 320 tokens in its vocabulary, the reference has 7\. KL compares models of one vocabulary"),
    ):
        compare_windows(lambda i: np.zeros((2, 7), np.float32), worker, [[5, 6]])


def test_command_line(run, files, tmp_path):
    a, b = files / "a.gguf", files / "b.gguf"
    common = ("--ctx", CTX, "--chunks", 2, "--threads", 1)
    tasks = ("--text", files / "t.txt", "--choices", files / "c.jsonl", "--exact", files / "e.jsonl")
    status, out, err = run("eval", a, b, *tasks, "--reference", b, *common, "-o", tmp_path / "q.json")
    assert (status, err) == (0, "")
    for shown in ("perplexity", "kl_mean", "top1_agreement", "acc_norm", "exact_match", "±", str(a), str(b), "in brackets the difference"):
        assert shown in out
    status, out, _ = run("eval", a, *tasks, "--chat", *common, "--ctx", 200, "--chunks", 1, "--json")
    assert status == 0
    assert {row["metric"] for row in json.loads(out)} == {"perplexity", "nll_mean", "acc", "acc_norm", "exact_match"}
    assert all(row["settings"]["chat"] for row in json.loads(out))
    status, out, _ = run("eval", a, "--text", files / "t.txt", *common, "--json")
    assert json.loads(out).keys() == {"perplexity", "nll_mean", "tokens", "ctx", "chunks"}  # one text and one artifact: as ever
    status, _, err = run("eval", a, *tasks, *common, "-o", tmp_path / "q.json")
    assert status == 1 and "exists and is kept" in err
    assert run("eval", a, *tasks, *common, "-o", tmp_path / "q.json", "--force")[0] == 0
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}')
    for status, message, arguments in (
        (2, "Missing option '--text', '--choices' or '--exact'.", (a,)),
        (2, "--rate and --rates: give one of them", (a, *tasks, "--rate", 0, "--rates", "0")),
        (2, "'x' is not a list of rates like 0,0.15,0.25.", (a, *tasks, "--rates", "x")),
        (2, "--chat is for the prompts of --choices and --exact", (a, *tasks[:2], "--chat")),
        (2, "--chunks counts windows of a text; give --text", (a, *tasks[2:], "--chunks", 2)),
        (1, 'bad.jsonl, line 1: "choices" is not a list', (a, "--choices", tmp_path / "bad.jsonl")),
        (1, 'bad.jsonl, line 1: "answer" is missing', (a, "--exact", tmp_path / "bad.jsonl")),
        (2, "rates to measure are 0.9", (a, *tasks, "--rates", "0.9")),
        (1, "is a single file", (a, *tasks, "--rates", "0.1")),
    ):
        found, out, err = run("eval", *arguments)
        assert (found, out) == (status, ""), arguments
        assert message in err, (err, message)


def test_calls_that_make_no_sense(files, tmp_path):
    with pytest.raises(UsageError, match="nothing to measure; give at least one package or GGUF file"):
        evaluate_tasks([], text=files / "t.txt")
    with pytest.raises(UsageError, match="nothing to measure by; give a text, choices or exact answers"):
        evaluate_tasks([files / "a.gguf"])
    with pytest.raises(UsageError, match="ctx is 1 and chunks is 0; expected at least 2 and 1"):
        evaluate_tasks([files / "a.gguf"], text=files / "t.txt", ctx=1, chunks=0)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SourceError, match=r"latin\.txt: not UTF-8 text \(byte 3\)"):
        evaluate_tasks([files / "a.gguf"], text=tmp_path / "latin.txt")
    with pytest.raises(SourceError, match=r"none\.txt: cannot be read"):
        evaluate_tasks([files / "a.gguf"], text=tmp_path / "none.txt")
    with pytest.raises(OutputError, match="exists and is kept"):
        evaluate_tasks([files / "a.gguf"], text=files / "t.txt", output=files / "t.txt")
