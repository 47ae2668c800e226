"""The scoring child: what it computes is what llama.cpp computes, and however it ends, the parent says so and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from tiny import CHAT_TEMPLATE, N_VOCAB
from tiny_gguf import N_CTX, write_tiny_gguf

from edgeq.errors import MissingDependency, RuntimeFailure, SourceError, UsageError
from edgeq.runtime import worker as worker_module
from edgeq.runtime.llama import LlamaModel
from edgeq.runtime.llama_context import LlamaContext
from edgeq.runtime.worker import ScoringWorker

IDS = [1, *range(40, 100)]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("worker") / "tiny.gguf")


@pytest.fixture(scope="module")
def worker(artifact: Path) -> Iterator[ScoringWorker]:
    with ScoringWorker(artifact, n_ctx=256, threads=1, n_ubatch=16) as worker:
        yield worker


def fake_child(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """Let workers start this code as their child; `reply(text)` writes a line to the parent."""
    prologue = """
        import json, os, sys, time
        answers = os.dup(1)
        os.dup2(2, 1)
        def reply(text):
            os.write(answers, text.encode() + b"\\n")
        FACTS = dict.fromkeys("architecture n_vocab n_ctx_train bos eos bos_text eos_text chat_template threads library".split())
    """
    (folder / "fake_child.py").write_text(textwrap.dedent(prologue) + textwrap.dedent(code), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(worker_module, "CHILD", "fake_child")


def gone(pid: int, *, within_s: float = 10.0) -> bool:
    """Whether the process ends in time; one that waits to be reaped has ended."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid):
            return True
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_logits_are_those_of_llama_cpp(artifact: Path, worker: ScoringWorker) -> None:
    with LlamaModel.load(artifact) as model, LlamaContext(model, n_ctx=256, n_batch=16, n_ubatch=16, threads=1) as context:
        expected = context.logits_of(IDS)
    logits = worker.logits(IDS)
    assert logits.dtype == np.float32
    assert np.array_equal(logits, expected)
    assert np.ptp(logits) > 1  # not a row of zeros


def test_logits_cannot_be_written(worker: ScoringWorker) -> None:
    with pytest.raises(ValueError, match="read-only"):
        worker.logits(IDS)[0] = 0


def test_windows_are_scored_alone(worker: ScoringWorker) -> None:
    first = worker.logits(IDS).copy()
    worker.logits(IDS[::-1])
    assert np.array_equal(worker.logits(IDS), first)
    assert worker.logits(IDS[:1]).shape == (1, N_VOCAB)
    assert worker.logits([]).shape == (0, N_VOCAB)


def test_nll_is_log_softmax_of_the_logits(worker: ScoringWorker) -> None:
    rows = worker.logits(IDS)[:-1].astype(np.float64)
    expected = np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(rows)), IDS[1:]]
    nll = worker.nll(IDS)
    assert nll.dtype == np.float64
    np.testing.assert_allclose(nll, expected, rtol=1e-12)
    assert worker.nll(IDS[:1]).shape == (0,)


def test_progress_counts_tokens(worker: ScoringWorker) -> None:
    seen: list[int] = []
    worker.logits(IDS, on_tokens=seen.append)
    assert seen == [16, 32, 48, 61]
    seen.clear()
    worker.nll(IDS, on_tokens=seen.append)
    assert seen == [16, 32, 48, 61]


def test_tokenize(artifact: Path, worker: ScoringWorker) -> None:
    text = "<|im_start|>Größe 12\n"
    with LlamaModel.load(artifact, vocab_only=True) as model:
        for add, parse in ((False, False), (True, False), (False, True), (True, True)):
            expected = model.tokenize(text, add_special=add, parse_special=parse)
            assert worker.tokenize(text, add_special=add, parse_special=parse) == expected
    assert worker.tokenize(text, parse_special=True)[0] == 1
    assert worker.tokenize(text, add_special=True)[0] == 1
    assert worker.tokenize(text)[0] != 1


def test_facts(worker: ScoringWorker) -> None:
    facts = worker.facts
    assert (facts.architecture, facts.n_vocab, facts.n_ctx_train, facts.threads) == ("llama", N_VOCAB, N_CTX, 1)
    assert (facts.bos, facts.bos_text, facts.eos, facts.eos_text) == (1, "<|im_start|>", 2, "<|im_end|>")
    assert facts.chat_template == CHAT_TEMPLATE
    assert facts.library.startswith("llama-cpp-python 0.")
    peak = worker.peak_rss_bytes()
    assert peak is None or 10e6 < peak < 4e9


def test_a_bad_request_leaves_the_worker_ready(worker: ScoringWorker) -> None:
    with pytest.raises(UsageError, match=r"token 1 is 320, but the vocabulary of tiny.gguf has ids 0 to 319"):
        worker.logits([0, N_VOCAB])
    with pytest.raises(UsageError, match="257 tokens exceed the context of 256"):
        worker.nll([1] * 257)
    assert len(worker.nll(IDS)) == 60


def test_closed_worker(artifact: Path) -> None:
    worker = ScoringWorker(artifact, n_ctx=64)
    worker.close()
    worker.close()
    assert gone(worker.pid)
    with pytest.raises(RuntimeFailure, match=r"tiny.gguf: the process that ran llama.cpp is closed. Start a new one"):
        worker.nll(IDS)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none.gguf does not exist"):
        ScoringWorker(tmp_path / "none.gguf", n_ctx=64)


def test_refused_file(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "extra.gguf", extra={"blk.0.surplus.weight": np.zeros((2, 2), dtype=np.float32)})
    with pytest.raises(RuntimeFailure, match="wrong number of tensors"):
        ScoringWorker(path, n_ctx=64)


def aborting_gguf(path: Path) -> Path:
    """A qwen2 file whose heads are half as long as its projections: it loads, and building the graph reshapes 64 values into 32."""
    fields = {f"attention.{name}_length": 8 for name in ("key", "value")} | {"rope.dimension_count": 8, "attention.head_count_kv": 2}
    return write_tiny_gguf(path, arch="qwen2", head_dim=16, n_kv_heads=1, fields=fields)


def test_abort_in_c_is_an_error_here(tmp_path: Path) -> None:
    path = aborting_gguf(tmp_path / "abort.gguf")
    with pytest.raises(
        RuntimeFailure,
        match=r"abort\.gguf: the process that ran llama\.cpp was killed by SIGABRT while loading it\. It last said: .*GGML_ASSERT",
    ):
        ScoringWorker(path, n_ctx=64)


def test_killed_between_requests(artifact: Path) -> None:
    worker = ScoringWorker(artifact, n_ctx=64)
    os.kill(worker.pid, signal.SIGKILL)
    assert gone(worker.pid)
    message = r"was killed by SIGKILL while scoring 61 tokens\. That is often the system running out of memory"
    with pytest.raises(RuntimeFailure, match=message):
        worker.nll(IDS)
    with pytest.raises(RuntimeFailure, match=message):
        worker.nll(IDS)  # it says so again


def test_killed_within_a_request(artifact: Path) -> None:
    worker = ScoringWorker(artifact, n_ctx=1024, n_ubatch=1)
    with pytest.raises(RuntimeFailure, match="was killed by SIGKILL while scoring 1000 tokens"):
        worker.nll([1] * 1000, on_tokens=lambda done: os.kill(worker.pid, signal.SIGKILL))


def test_interrupt_ends_the_child(artifact: Path) -> None:
    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    worker = ScoringWorker(artifact, n_ctx=64, n_ubatch=4)
    with pytest.raises(KeyboardInterrupt):
        worker.nll(IDS, on_tokens=interrupt)
    assert gone(worker.pid)


def test_hang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_child(monkeypatch, tmp_path, "print('about to hang', flush=True); reply(json.dumps({'result': FACTS})); time.sleep(1000)")
    worker = ScoringWorker(Path("a.gguf"), n_ctx=64, patience_s=1.0)
    with pytest.raises(
        RuntimeFailure, match=r"no sign of life for 1 seconds while scoring 2 tokens; it was ended. It last said: about to hang"
    ):
        worker.nll([1, 2])
    assert gone(worker.pid)


def test_progress_is_a_sign_of_life(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = """
        reply(json.dumps({'result': FACTS}))
        for done in range(6):
            time.sleep(0.3)
            reply(json.dumps({'progress': done}))
        reply(json.dumps({'result': [0.5]}))
        time.sleep(1000)
    """
    fake_child(monkeypatch, tmp_path, code)
    with ScoringWorker(Path("a.gguf"), n_ctx=64, patience_s=1.2) as worker:
        assert worker.nll([1, 2]) == [0.5]


@pytest.mark.parametrize("line", ["hello", "[1]", "\\xff", "null"])
def test_babble(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str) -> None:
    fake_child(monkeypatch, tmp_path, f"reply('{line}'); time.sleep(1000)")
    with pytest.raises(
        RuntimeFailure, match=r"a\.gguf: the process that ran llama\.cpp answered .* while loading it, which is no answer\. Run it again"
    ):
        ScoringWorker(Path("a.gguf"), n_ctx=64)


def test_exit_status_and_last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_child(monkeypatch, tmp_path, "print('one\\n\\ntwo'); sys.stdout.flush(); sys.exit('three ' + 400 * 'x')")
    with pytest.raises(RuntimeFailure, match=r"exited with status 1 while loading it\. It last said: one \| two \| three x{294}$"):
        ScoringWorker(Path("a.gguf"), n_ctx=64)


def test_silent_death(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_child(monkeypatch, tmp_path, "os._exit(7)")
    with pytest.raises(RuntimeFailure, match=r"exited with status 7 while loading it\. It last said: nothing"):
        ScoringWorker(Path("a.gguf"), n_ctx=64)


def test_without_llama_cpp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, artifact: Path) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('not here')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(MissingDependency, match=r"llama_cpp is not installed. Install it with: pip install 'edgeq\[llama\]'"):
        ScoringWorker(artifact, n_ctx=64)


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, artifact: Path) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    before = psutil.Process().num_fds()
    with ScoringWorker(artifact, n_ctx=64) as worker:
        worker.logits(IDS)
        assert not list(folder.iterdir())
    with pytest.raises(RuntimeFailure):
        ScoringWorker(aborting_gguf(tmp_path / "abort.gguf"), n_ctx=64)
    assert not list(folder.iterdir())
    assert psutil.Process().num_fds() == before


def test_temporary_file_where_memory_has_no_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, artifact: Path, worker: ScoringWorker
) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with ScoringWorker(artifact, n_ctx=256, threads=1, n_ubatch=16) as other:
        assert np.array_equal(other.logits(IDS), worker.logits(IDS))
    assert not list(tmp_path.iterdir())


def test_child_ends_with_its_parent(artifact: Path) -> None:
    """Even in the middle of a request, and even when the parent had no time to do anything about it."""
    code = f"""
        import os, signal
        from pathlib import Path
        from edgeq.runtime.worker import ScoringWorker
        worker = ScoringWorker(Path({str(artifact)!r}), n_ctx=1024, n_ubatch=1)
        def die(done):
            print(worker.pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        worker.nll([1] * 1000, on_tokens=die)
    """
    parent = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert parent.returncode == -signal.SIGKILL, parent.stderr
    assert gone(int(parent.stdout))
