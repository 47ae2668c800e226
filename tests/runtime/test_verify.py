"""The gate passes what is right and fails every fault that we can think of; sources and artifacts are tiny GGUF files by gguf-py."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf_files import demo_file
from tiny import CHAT_TEMPLATE, N_VOCAB
from tiny_gguf import HEAD_DIM, write_tiny_gguf

from edgeq.converters.sources.gguf import read_gguf_model
from edgeq.errors import MissingDependency, PackageError, SourceError, UsageError
from edgeq.gate import GateResult, Thresholds, thresholds_for
from edgeq.gate_prompts import gate_prompts, gate_windows
from edgeq.model import Model
from edgeq.reference import Reference
from edgeq.reference_scores import TorchScores
from edgeq.runtime import fingerprint as fingerprint_module
from edgeq.runtime.fingerprint import TOP, Fingerprint, check_fingerprint, make_fingerprint
from edgeq.runtime.quality import compare
from edgeq.runtime.verify import run_gate
from edgeq.runtime.worker import ScoringWorker

Array = npt.NDArray[Any]
TAIL = [list(range(3, 131))]
EXACT = thresholds_for(["F32"])


def biases(n_layers: int = 2, head_dim: int = 16) -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(5)
    heads = {"attn_q": 4, "attn_k": 2, "attn_v": 2}
    return {
        f"blk.{i}.{n}.bias": (0.2 * rng.standard_normal(k * head_dim)).astype(np.float32) for i in range(n_layers) for n, k in heads.items()
    }


KINDS: Mapping[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"arch": "qwen2", "head_dim": 16, "extra": biases()},
    "gemma3": {"arch": "gemma3", "fields": {"attention.sliding_window": 16, "rope.freq_base_swa": 10000.0, "rope.freq_base": 1e6}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gate")


@pytest.fixture(scope="module")
def source(folder: Path) -> Callable[[str], tuple[Path, Model, TorchScores]]:
    @cache
    def make(kind: str) -> tuple[Path, Model, TorchScores]:
        path = write_tiny_gguf(folder / f"{kind}.gguf", **KINDS[kind])
        model = read_gguf_model(path)
        windows = gate_windows(model.tokenizer, TAIL, n_ctx=model.spec.n_ctx)
        return path, model, TorchScores(Reference(model.spec, model.tensors), windows)

    return make


Source = Callable[[str], tuple[Path, Model, TorchScores]]


def variant(path: Path, kind: str, **changes: Any) -> Path:
    """The same weights written with other arguments; fields are added to those of the kind."""
    arguments = {**KINDS[kind], **changes, "fields": {**KINDS[kind].get("fields", {}), **changes.get("fields", {})}}
    return write_tiny_gguf(path, **arguments)


def patched(source: Path, path: Path, pattern: str, change: Callable[[Array], Array]) -> Path:
    """A copy in which every tensor whose name matches has changed values."""
    shutil.copy(source, path)
    reader = gguf.GGUFReader(path, "r+")
    touched = [t for t in reader.tensors if re.fullmatch(pattern, t.name)]
    assert touched
    for tensor in touched:
        tensor.data[...] = change(np.array(tensor.data))
    return path


def judge(artifact: Path, source: tuple[Path, Model, TorchScores], **options: Any) -> GateResult:
    return run_gate(artifact, source[2], tokenizer=source[1].tokenizer, thresholds=EXACT, threads=1, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_faultless_artifact_passes(source: Source, kind: str) -> None:
    path, _, scores = source(kind)
    steps: list[tuple[str, float, float]] = []
    result = judge(path, source(kind), progress=lambda *step: steps.append(step))
    assert result.failures == ()
    assert result.passed
    n_tokens = sum(len(window) for window in scores.windows)
    assert (result.basis, result.tokens, result.tokenizer_equal, result.chat_template_equal) == ("logits", n_tokens, True, True)
    assert result.top1_agreement == 1.0
    assert result.kl_mean is not None
    assert result.kl_mean < 1e-5
    assert result.perplexity_artifact == pytest.approx(result.perplexity_reference, rel=1e-3)
    assert re.fullmatch(r"llama-cpp-python 0\.\S+ on CPU", result.runtime)
    assert steps[-1] == ("gate", n_tokens, n_tokens)
    assert GateResult.from_json(result.to_json()) == result


def rotate_half_to_pairs(x: Array) -> Array:
    """Rows of each head from (0, 1, 2, ...) to (0, d/2, 1, d/2 + 1, ...): the permutation of llama.cpp's converter, once too often."""
    return x.reshape(-1, 2, HEAD_DIM // 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)


FAULTS: Mapping[str, tuple[str, Callable[[Path, Path], Path]]] = {
    "rope base": ("llama", lambda path, to: variant(to, "llama", fields={"rope.freq_base": 20000.0})),
    "linear rope scaling": (
        "llama",
        lambda path, to: variant(to, "llama", fields={"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}),
    ),
    "norm epsilon": ("llama", lambda path, to: variant(to, "llama", fields={"attention.layer_norm_rms_epsilon": 1e-2})),
    "q and k interleaved": ("llama", lambda path, to: patched(path, to, r"blk\.\d\.attn_[qk]\.weight", rotate_half_to_pairs)),
    "one layer's q interleaved": ("llama", lambda path, to: patched(path, to, r"blk\.1\.attn_q\.weight", rotate_half_to_pairs)),
    "zeroed mlp": ("llama", lambda path, to: patched(path, to, r"blk\.1\.ffn_down\.weight", np.zeros_like)),
    "zeroed attention": ("llama", lambda path, to: patched(path, to, r"blk\.0\.attn_output\.weight", np.zeros_like)),
    "gate without up": ("llama", lambda path, to: patched(path, to, r"blk\.0\.ffn_up\.weight", np.ones_like)),
    "no biases": ("qwen2", lambda path, to: variant(to, "qwen2", extra={})),
    "norm offset dropped": ("gemma3", lambda path, to: patched(path, to, r".*_norm\.weight", lambda x: x - 1)),
    "one norm offset dropped": ("gemma3", lambda path, to: patched(path, to, r"blk\.1\.attn_q_norm\.weight", lambda x: x - 1)),
    "local rope base": ("gemma3", lambda path, to: variant(to, "gemma3", fields={"rope.freq_base_swa": 1e6})),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_fail(source: Source, tmp_path: Path, fault: str) -> None:
    kind, make = FAULTS[fault]
    result = judge(make(source(kind)[0], tmp_path / "artifact.gguf"), source(kind))
    assert not result.passed
    assert result.failures[0].startswith("mean KL from the reference is ")
    assert result.failures[0].endswith("; at most 0.0002 is expected of F32")
    assert (result.tokenizer_equal, result.chat_template_equal) == (True, True)


def test_rounded_weights_do_not_hide_a_fault(source: Source, tmp_path: Path) -> None:
    """With Q4_0's limits a slightly wrong rope base passes; with the artifact's own weights it does not."""
    path, model, scores = source("llama")
    wrong = variant(tmp_path / "wrong.gguf", "llama", fields={"rope.freq_base": 20000.0})
    loose = thresholds_for(["Q4_0"])
    options: dict[str, Any] = {"tokenizer": model.tokenizer, "thresholds": loose, "threads": 1}
    assert run_gate(wrong, scores, **options).passed
    own = TorchScores(Reference(model.spec, read_gguf_model(wrong).tensors), scores.windows[:4])
    result = run_gate(wrong, scores, own=(own, EXACT), **options)
    assert result.failures[0].startswith("with the artifact's own weights: mean KL from the reference is ")
    assert result.fidelity is not None
    assert result.fidelity.tokens == sum(len(window) for window in scores.windows[:4])
    alien = TorchScores(Reference(model.spec, model.tensors), TAIL)
    with pytest.raises(UsageError, match="has other windows than the first ones of the reference"):
        run_gate(path, scores, own=(alien, EXACT), **options)
    right = run_gate(path, scores, own=(own, EXACT), **options)
    assert right.passed
    assert right.fidelity is not None
    assert right.fidelity.kl_mean < 1e-5
    assert GateResult.from_json(right.to_json()) == right


def with_other_merges(path: Path, source: Source) -> Path:
    merges = source("llama")[1].tokenizer.vocabulary.merges
    return variant(path, "llama", fields={"tokenizer.ggml.merges": list(merges[::-1])})


@pytest.mark.slow
def test_demo_passes_its_own_gate() -> None:
    """The real model, unchanged: what is left is llama.cpp's rounding of activations."""
    path = demo_file()
    model = read_gguf_model(path)
    scores = TorchScores(Reference(model.spec, model.tensors), gate_windows(model.tokenizer, [], n_ctx=model.spec.n_ctx))
    grids = [tensor.grid for tensor in model.tensors.values() if len(tensor.shape) == 2]
    result = run_gate(path, scores, tokenizer=model.tokenizer, thresholds=thresholds_for([], copied=grids))
    assert result.failures == ()
    assert (result.tokenizer_equal, result.chat_template_equal) == (True, True)
    assert result.kl_mean is not None
    assert result.kl_mean > EXACT.kl_mean  # Q4_1 is not F32


def test_other_merges(source: Source, tmp_path: Path) -> None:
    result = judge(with_other_merges(tmp_path / "artifact.gguf", source), source("llama"))
    assert result.tokenizer_equal is False
    assert re.fullmatch(
        r"the tokenizers differ for \d+ of \d+ texts, first for text '.+' at position \d+: artifact \[.*\], source \[.*\]",
        result.failures[0],
    )
    assert result.kl_mean is not None
    assert result.kl_mean < 1e-5  # the weights are right, and said to be


def test_tokenizer_difference_is_named_exactly(source: Source, tmp_path: Path) -> None:
    """Two tokens change places: the first text that has either is named, with the position and both ids."""
    model = source("llama")[1]
    tokens = list(model.tokenizer.vocabulary.tokens)
    ids = model.tokenizer.encode(gate_prompts().passages[0].text)
    at = next(i for i, token in enumerate(ids) if ids.index(token) == i and i > 6)
    other = next(i for i in range(3, N_VOCAB) if i not in ids)
    swapped = ids[at]
    tokens[swapped], tokens[other] = tokens[other], tokens[swapped]
    result = judge(variant(tmp_path / "artifact.gguf", "llama", fields={"tokenizer.ggml.tokens": tokens}), source("llama"))
    around = f"{ids[at - 1]}, {{}}, {ids[at + 1]}"
    assert f"first for text 'english' at position {at}: artifact [..., " in result.failures[0]
    assert around.format(other) in result.failures[0].split(", source ")[0]
    assert around.format(swapped) in result.failures[0].split(", source ")[1]


def test_other_special_tokens(source: Source, tmp_path: Path) -> None:
    path = variant(tmp_path / "artifact.gguf", "llama", fields={"tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 0})
    result = judge(path, source("llama"))
    assert result.failures[:2] == (
        "the tokenizers differ: BOS is 2 in the artifact, 1 in the source",
        "the tokenizers differ: EOS is 0 in the artifact, 2 in the source",
    )
    assert "(with added specials)" in result.failures[2]
    assert result.tokenizer_equal is False


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            CHAT_TEMPLATE.replace("assistant\n", "assistant"),
            r"for conversation 'question': at character \d+ the artifact has '', the source '\\n'",
        ),
        (CHAT_TEMPLATE + "{{ raise_exception('no') }}", r"for conversation 'question': only the artifact's refuses it \(.*no\)"),
        ("{% if broken", r"for conversation 'question': only the artifact's refuses it \(the chat template does not parse"),
        (None, "the source has a chat template and the artifact has none"),
    ],
)
def test_other_chat_template(source: Source, tmp_path: Path, template: str | None, message: str) -> None:
    result = judge(variant(tmp_path / "artifact.gguf", "llama", fields={"tokenizer.chat_template": template}), source("llama"))
    assert result.chat_template_equal is False
    assert len(result.failures) == 1
    assert re.search(message, result.failures[0])


def test_templates_that_render_alike_are_equal(source: Source, tmp_path: Path) -> None:
    path = variant(tmp_path / "artifact.gguf", "llama", fields={"tokenizer.chat_template": "{# no difference #}" + CHAT_TEMPLATE})
    assert judge(path, source("llama")).passed


def test_templates_that_refuse_alike_are_equal(tmp_path: Path) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
    path = variant(tmp_path / "source.gguf", "llama", fields={"tokenizer.chat_template": refusing})
    model = read_gguf_model(path)
    scores = TorchScores(Reference(model.spec, model.tensors), TAIL)
    artifact = variant(tmp_path / "artifact.gguf", "llama", fields={"tokenizer.chat_template": refusing + "{# #}"})
    assert judge(artifact, (path, model, scores)).passed
    accepting = variant(tmp_path / "accepting.gguf", "llama")
    assert "for conversation 'system': only the source's refuses it" in judge(accepting, (path, model, scores)).failures[0]


def test_no_template_on_either_side(tmp_path: Path) -> None:
    path = variant(tmp_path / "artifact.gguf", "llama", fields={"tokenizer.chat_template": None})
    model = read_gguf_model(path)
    result = judge(path, (path, model, TorchScores(Reference(model.spec, model.tensors), TAIL)))
    assert result.passed
    assert result.chat_template_equal is None


def test_an_artifact_that_kills_llama_cpp_has_failed(source: Source, tmp_path: Path) -> None:
    fields = {f"attention.{name}_length": 8 for name in ("key", "value")} | {"rope.dimension_count": 8, "attention.head_count_kv": 2}
    path = write_tiny_gguf(tmp_path / "abort.gguf", arch="qwen2", head_dim=16, n_kv_heads=1, fields=fields)
    result = judge(path, source("llama"))
    assert not result.passed
    assert "was killed by SIGABRT while loading it" in result.failures[0]
    assert (result.kl_mean, result.tokens, result.runtime) == (None, 0, "llama.cpp on CPU")
    assert result.to_json()["passed"] is False


def test_an_artifact_that_is_no_gguf_has_failed(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "half.gguf"
    path.write_bytes(source("llama")[0].read_bytes()[:1000])
    result = judge(path, source("llama"))
    assert len(result.failures) == 1
    assert "half.gguf" in result.failures[0]


def test_nan_has_failed(source: Source, tmp_path: Path) -> None:
    path = patched(source("llama")[0], tmp_path / "nan.gguf", r"output_norm\.weight", lambda x: np.where(np.arange(x.size) == 3, np.nan, x))
    result = judge(path, source("llama"))
    assert result.failures == (f"{result_tokens(source)} positions have NaN or infinite logits in the artifact",)
    assert (result.kl_mean, result.tokenizer_equal) == (None, True)


def result_tokens(source: Source) -> str:
    return f"{sum(len(window) for window in source('llama')[2].windows):,}"


def test_missing_runtime_is_no_verdict(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise ImportError", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(MissingDependency):
        judge(source("llama")[0], source("llama"))


def test_an_unreadable_source_is_no_verdict(source: Source) -> None:
    path, model, _ = source("llama")
    tensors = {name: tensor for name, tensor in model.tensors.items() if name != "layers.1.up.weight"}
    with pytest.raises(SourceError, match=r"layers\.1\.up\.weight is missing"):
        judge(path, (path, model, TorchScores(Reference(model.spec, tensors), TAIL)))


def test_torch_scores(source: Source) -> None:
    _, model, _ = source("llama")
    reference = Reference(model.spec, model.tensors)
    scores = TorchScores(reference, [[1, 2, 3], list(range(3, 260))])
    assert scores.n_ctx == 512  # llama.cpp would make a context of 300 one of 512
    hidden = reference.hidden([[1, 2, 3]])[0]
    logits = scores.logits(0)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, reference.logits(hidden).numpy(), rtol=1e-4, atol=1e-5)
    double = TorchScores(Reference(model.spec, model.tensors, dtype=torch.float64), [[1, 2, 3]])
    assert double.n_ctx == 256
    assert TorchScores(reference, [[1, 2, 3]], n_ctx=1024).n_ctx == 1024
    np.testing.assert_allclose(double.logits(0), logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="no windows to score: give at least one"):
        TorchScores(reference, [])


# --- fingerprints


@pytest.fixture(scope="module")
def fingerprint(source: Source) -> Fingerprint:
    _, model, scores = source("llama")
    return make_fingerprint(scores, tokenizer=model.tokenizer, thresholds=EXACT)


def test_fingerprint_accepts_the_artifact(source: Source, fingerprint: Fingerprint, folder: Path) -> None:
    fingerprint.save(folder / "fingerprint.npz")
    result = check_fingerprint(source("llama")[0], Fingerprint.load(folder / "fingerprint.npz"), threads=1)
    assert result.failures == ()
    assert (result.basis, result.tokenizer_equal, result.chat_template_equal, result.top1_agreement) == ("fingerprint", True, None, 1.0)
    assert result.tokens == sum(len(window) for window in source("llama")[2].windows[:-1])
    assert result.kl_mean is not None
    assert result.kl_mean < 2e-5
    assert result.perplexity_artifact == pytest.approx(result.perplexity_reference, rel=1e-3)


@pytest.mark.parametrize("fault", ["rope base", "q and k interleaved", "zeroed mlp"])
def test_fingerprint_finds_faults(source: Source, fingerprint: Fingerprint, tmp_path: Path, fault: str) -> None:
    path = FAULTS[fault][1](source("llama")[0], tmp_path / "artifact.gguf")
    result = check_fingerprint(path, fingerprint, threads=1)
    assert result.failures[0].startswith("mean KL from the reference is ")
    assert result.kl_mean is not None
    with ScoringWorker(path, n_ctx=256, threads=1) as worker:
        scores = source("llama")[2]
        full = compare((ids, scores.logits(i), worker.logits(ids)) for i, ids in enumerate(scores.windows[:-1]))
    assert result.kl_mean <= full.kl_mean  # a lower bound ...
    assert result.kl_mean > 0.5 * full.kl_mean  # ... and not an idle one
    assert result.top1_agreement == pytest.approx(full.top1_agreement, abs=0.02)
    assert result.perplexity_artifact == pytest.approx(np.exp(full.nll_artifact), rel=1e-6)


def test_fingerprint_finds_other_tokenizers(source: Source, fingerprint: Fingerprint, tmp_path: Path) -> None:
    result = check_fingerprint(with_other_merges(tmp_path / "artifact.gguf", source), fingerprint, threads=1)
    assert result.tokenizer_equal is False
    assert "the tokenizers differ for" in result.failures[0]


def test_fingerprint_of_a_refused_artifact(fingerprint: Fingerprint, tmp_path: Path) -> None:
    result = check_fingerprint(tmp_path / "none.gguf", fingerprint)
    assert result.failures == (f"{tmp_path / 'none.gguf'} does not exist. Give a GGUF file or a package folder.",)


def test_fingerprint_of_a_larger_vocabulary(source: Source, fingerprint: Fingerprint) -> None:
    alien = Fingerprint(**{**vars(fingerprint), "top_ids": fingerprint.top_ids + N_VOCAB})
    result = check_fingerprint(source("llama")[0], alien, threads=1)
    assert result.failures == (f"the artifact has {N_VOCAB} tokens, the reference has more. It is another model.",)


def test_top_tokens_are_the_references(source: Source, fingerprint: Fingerprint) -> None:
    scores = source("llama")[2]
    log_p = torch.log_softmax(torch.from_numpy(scores.logits(0)).double(), dim=1)
    values, ids = log_p.topk(TOP, dim=1)
    n_tokens = len(scores.windows[0])
    assert np.array_equal(fingerprint.top_ids[:n_tokens], ids.numpy())
    np.testing.assert_allclose(fingerprint.top_logprobs[:n_tokens].astype(np.float64), values.numpy(), rtol=1e-3)
    following = [log_p[i, token].item() for i, token in enumerate(scores.windows[0][1:])]
    np.testing.assert_allclose(fingerprint.next_logprobs[:n_tokens], [*following, 0], rtol=1e-6)


def test_coarse_kl_is_kl_of_merged_outcomes() -> None:
    rng = np.random.default_rng(0)
    p, q = (torch.log_softmax(torch.from_numpy(2 * rng.standard_normal((7, 50))), dim=1) for _ in range(2))
    merged = [torch.cat([x[:, :8], x[:, 8:].logsumexp(1, keepdim=True)], dim=1) for x in (p, q)]
    expected = torch.nn.functional.kl_div(merged[1], merged[0], reduction="none", log_target=True).sum(1)
    found = fingerprint_module._coarse_kl(p[:, :8].numpy(), q[:, :8].numpy())
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-9)


def test_fingerprint_survives_its_file(fingerprint: Fingerprint, tmp_path: Path) -> None:
    fingerprint.save(tmp_path / "a.npz")
    loaded = Fingerprint.load(tmp_path / "a.npz")
    loaded.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert loaded.thresholds == fingerprint.thresholds
    assert [list(window) for window in loaded.windows] == [list(window) for window in fingerprint.windows]
    assert [vars(case) | {"ids": list(case.ids)} for case in loaded.cases] == [
        vars(case) | {"ids": list(case.ids)} for case in fingerprint.cases
    ]
    assert (tmp_path / "a.npz").stat().st_size < 400_000


def test_fingerprint_does_not_tell_the_time(tmp_path: Path) -> None:
    names = []
    for template in (CHAT_TEMPLATE, "{{ strftime_now('%Y') }}" + CHAT_TEMPLATE):
        model = read_gguf_model(variant(tmp_path / "a.gguf", "llama", fields={"tokenizer.chat_template": template}))
        made = make_fingerprint(TorchScores(Reference(model.spec, model.tensors), TAIL), tokenizer=model.tokenizer, thresholds=EXACT)
        names.append({case.name.split()[0] for case in made.cases})
    assert names == [{"text", "conversation"}, {"text"}]


@pytest.mark.parametrize("keep", [0, 1, 100, 5_000, 50_000, -1, -30])
def test_truncated_fingerprint(fingerprint: Fingerprint, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "fingerprint.npz"
    fingerprint.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(PackageError, match=r"fingerprint\.npz is no readable fingerprint .* The package is damaged; copy it again"):
        Fingerprint.load(path)


def test_missing_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"none\.npz is missing\. The package is damaged; copy it again"):
        Fingerprint.load(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("top_ids", lambda x: x[1:], "arrays of different lengths"),
        ("case_lengths", lambda x: x + 1, "ids for parts of"),
        (
            "facts",
            lambda x: np.frombuffer(x.tobytes().replace(b'"version": 1', b'"version": 9'), dtype=np.uint8),
            "version 9, this edgeq reads version 1",
        ),
        ("facts", lambda x: x[:-1], "Expecting"),
        ("window_lengths", None, "window_lengths"),
    ],
)
def test_fingerprint_that_contradicts_itself(
    fingerprint: Fingerprint, tmp_path: Path, name: str, change: Callable[[Array], Array] | None, message: str
) -> None:
    path = tmp_path / "fingerprint.npz"
    fingerprint.save(path)
    with np.load(path) as file:
        arrays = dict(file)
    value = arrays.pop(name)
    if change is not None:
        arrays[name] = change(value)
    np.savez(path, **arrays)
    with pytest.raises(PackageError, match=message):
        Fingerprint.load(path)


def test_thresholds_travel_with_the_fingerprint(source: Source, fingerprint: Fingerprint) -> None:
    strict = Thresholds(grid="F16", kl_mean=0.0, kl_p99=0.0, top1_agreement=1.0)
    result = check_fingerprint(source("llama")[0], Fingerprint(**{**vars(fingerprint), "thresholds": strict}), threads=1)
    assert result.thresholds == strict
    assert not result.passed
