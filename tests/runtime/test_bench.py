from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tiny import N_VOCAB
from tiny_elastic import write_tiny_elastic
from tiny_gguf import write_tiny_gguf

from edgeq.errors import EdgeqError, MissingDependency, PackageError, RuntimeFailure, SourceError, UsageError
from edgeq.package import sha256
from edgeq.runtime import bench as module
from edgeq.runtime import llama
from edgeq.runtime.bench import METRICS_VERSION, BenchResult, bench, contention, prompt_ids
from edgeq.runtime.child import Child, _error
from edgeq.runtime.contention import BUSY_BEFORE, THRESHOLD
from edgeq.runtime.decoding import greedy_steps
from edgeq.runtime.elastic_package import open_elastic
from edgeq.runtime.llama import LlamaModel
from edgeq.runtime.llama_context import LlamaContext
from edgeq.runtime.memory import kv_bytes

FIELDS = [
    *("artifact", "name", "artifact_sha256", "artifact_bytes", "elastic_package", "quant", "runtime", "device", "rate", "adapter"),
    *("prompt_tokens", "gen_tokens", "batch", "threads", "kv_type", "load_s", "load_cold_s", "ttft_ms", "prefill_tok_s", "decode_tok_s"),
    *("itl_ms", "peak_rss_bytes", "steady_rss_bytes", "model_bytes", "kv_bytes", "compute_bytes", "vram_bytes", "energy_j_per_token"),
    *("adapter_switch_ms", "temperature_c", "frequency_drift", "intervals", "spread", "against", "warnings", "samples", "environment"),
]
QUICK: dict[str, Any] = {"prompt_tokens": 4, "gen_tokens": 2, "repeat": 1, "threads": 1, "retakes": 0}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bench")
    return write_tiny_gguf(folder / "a.gguf"), write_tiny_gguf(folder / "b.gguf", n_layers=3)


@pytest.fixture(scope="module")
def results(paths: tuple[Path, Path]) -> list[BenchResult]:
    return bench(paths, prompt_tokens=40, gen_tokens=6, repeat=3, threads=1, retakes=0)


def test_rows_have_exactly_the_promised_fields(results: list[BenchResult], paths: tuple[Path, Path]) -> None:
    for result, path in zip(results, paths, strict=True):
        row = result.to_json()
        assert list(row) == FIELDS
        assert list(row["itl_ms"]) == ["p50", "p95", "p99"]
        assert json.loads(json.dumps(row, allow_nan=False)) == row
        assert (row["artifact"], row["runtime"], row["device"]) == (str(path), "llama.cpp", "cpu")
        assert row["rate"] is row["adapter"] is row["adapter_switch_ms"] is row["vram_bytes"] is None, "unknown is None, never 0"
        assert row["against"] is row["elastic_package"] is None
        assert (row["name"], row["quant"], row["artifact_bytes"]) == (path.name, "F32", path.stat().st_size)
        settings = {"prompt_tokens": 40, "gen_tokens": 6, "batch": 1, "threads": 1, "kv_type": "f16"}
        assert {key: row[key] for key in settings} == settings
        assert row["energy_j_per_token"] is None or row["energy_j_per_token"] > 0


def test_figures_follow_from_the_samples(results: list[BenchResult]) -> None:
    for result in results:
        repeats = result.samples["repeats"]
        assert len(repeats) == 3
        assert result.ttft_ms == np.median([sample["ttft_ms"] for sample in repeats])
        assert result.prefill_tok_s == np.median([40 / sample["prefill_s"] for sample in repeats])
        assert result.decode_tok_s == np.median([6 / sample["decode_s"] for sample in repeats])
        steps = [step for sample in repeats for step in sample["itl_ms"]]
        assert len(steps) == 18 and min(steps) > 0
        assert result.itl_ms["p95"] == np.percentile(steps, 95)
        assert result.itl_ms["p50"] <= result.itl_ms["p95"] <= result.itl_ms["p99"]
        for sample in repeats:
            assert sample["ttft_ms"] >= 1000 * sample["prefill_s"]
            assert sum(sample["itl_ms"]) == pytest.approx(1000 * sample["decode_s"])


def test_sizes(results: list[BenchResult], paths: tuple[Path, Path]) -> None:
    for result, path in zip(results, paths, strict=True):
        with LlamaModel.load(path) as model:
            assert result.model_bytes == model.size_bytes == model.facts.tensor_bytes
            assert result.kv_bytes == kv_bytes(model.facts, 46)
        before = result.samples["rss_before_load_bytes"]
        assert result.peak_rss_bytes is not None and result.peak_rss_bytes > before > 0
    assert results[0].model_bytes < results[1].model_bytes


def test_the_environment_says_what_was_run(results: list[BenchResult], paths: tuple[Path, Path]) -> None:
    environment = results[0].environment
    assert environment["metrics_version"] == METRICS_VERSION
    assert environment["artifact_sha256"] == sha256(paths[0]) != results[1].environment["artifact_sha256"]
    settings = {"threads": 1, "prompt_tokens": 40, "gen_tokens": 6, "repeat": 3, "n_ctx": 46, "kv_type": "f16"}
    assert {key: environment[key] for key in settings} == settings
    assert environment["model"].startswith("llama")
    assert len(environment["contention"]["other_cores"]) == 3


def test_the_prompt_is_fixed_and_fits_every_vocabulary() -> None:
    long = prompt_ids(320, 600)
    assert prompt_ids(320, 100) == long[:100]
    assert min(long) >= 0 and max(long) < 320 and len(set(long)) > 200
    assert prompt_ids(49152, 3) == prompt_ids(49152, 3) != prompt_ids(320, 3)


def test_repeats_go_in_turns_in_fresh_processes_with_the_same_prompt(monkeypatch: pytest.MonkeyPatch, paths: tuple[Path, Path]) -> None:
    asked: list[tuple[str, int, Any]] = []

    class Recorded(Child):
        def ask(self, request: Mapping[str, Any]) -> Any:
            asked.append((Path(self.subject).stem + " " + request["op"], self.pid, request.get("prompts")))
            return super().ask(request)

    monkeypatch.setattr(module, "Child", Recorded)
    steps: list[tuple[str, float, float]] = []
    progress = lambda *step: steps.append(step)  # noqa: E731
    bench(paths, prompt_tokens=5, gen_tokens=2, repeat=2, threads=1, retakes=0, progress=progress)
    turn = [f"{name} {op}" for name in "ab" for op in ("load", "repeat", "repeat", "end")]  # the first repeat warms up
    assert [name for name, _, _ in asked] == turn * 2
    assert len({pid for _, pid, _ in asked}) == 4
    assert len({str(prompts) for _, _, prompts in asked if prompts}) == 1
    assert steps == [("bench", i, 4) for i in range(5)]


def test_greedy_steps_are_greedy_and_fill_the_cache(paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[int] = []
    real = LlamaContext.greedy_stepper

    def recorded(self: LlamaContext, n_steps: int) -> Callable[[int], int]:
        step = real(self, n_steps)

        def recording(token: int) -> int:
            fed.append(token)
            return step(token)

        return recording

    monkeypatch.setattr(LlamaContext, "greedy_stepper", recorded)
    with LlamaModel.load(paths[0]) as model, LlamaContext(model, n_ctx=64, threads=1) as context:
        tokens = [1, 50, 60]
        first = int(context.decode(tokens)[0].argmax())
        stamps = greedy_steps(context, first, 10)
        assert context.n_past == 13
        assert stamps.shape == (11,) and (np.diff(stamps) > 0).all()
        assert len(set(fed)) > 3, "a model that repeats itself would prove little"
        for token in fed:
            assert token == int(context.logits_of(tokens)[-1].argmax())
            tokens.append(token)
        context.clear()
        with pytest.raises(UsageError, match="65 tokens after the 0 in the cache exceed the context of 64"):
            greedy_steps(context, first, 65)


def test_a_failing_step_is_an_error(paths: tuple[Path, Path]) -> None:
    with LlamaModel.load(paths[0]) as model, LlamaContext(model, n_ctx=64, threads=1) as context:
        context.decode([1])
        step = context.greedy_stepper(3)
        step(5)
        with pytest.raises(RuntimeFailure, match="llama_decode failed with -1 at position 2"):
            step(N_VOCAB)  # what the stepper does not check, llama.cpp does
        step(6)
        assert context.n_past == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens is 0; expected at least 1"),
        ({"gen_tokens": 0}, "gen_tokens is 0; expected at least 1"),
        ({"repeat": 0}, "repeat is 0; expected at least 1"),
        ({"device": "npu"}, "device 'npu' is not known; expected cpu, cuda or cuda:N"),
        ({"threads": 0}, "threads is 0; expected at least 1"),
        ({"threads": [1, 1]}, "threads is 1, 1; give different numbers"),
        ({"prompt_tokens": [8, 0]}, "prompt_tokens is 0; expected at least 1"),
        ({"prompt_tokens": []}, "prompt_tokens is an empty list; give different numbers"),
        ({"batch": 0}, "batch is 0; expected at least 1"),
        ({"batch": 100_000}, "batch is 100000; llama.cpp computes 1 to [0-9]+ sequences together"),
        ({"retakes": -1}, "retakes is -1; expected at least 0"),
        ({"wait_s": -1}, "wait_s is -1; expected at least 0"),
        ({"kv_type": "q3_x"}, "kv_type 'q3_x' is not known; expected one of f16, f32"),
    ],
)
def test_bad_arguments(paths: tuple[Path, Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench([paths[0]], **{**QUICK, **options})


def test_nothing_to_measure() -> None:
    with pytest.raises(UsageError, match="nothing to measure; give at least one package or GGUF file"):
        bench([])


def test_a_cpu_build_says_how_to_get_a_gpu(paths: tuple[Path, Path]) -> None:
    if llama.library().llama_supports_gpu_offload():
        pytest.skip("this llama-cpp-python has GPU support")
    with pytest.raises(RuntimeFailure, match=r"built without GPU support. Build it with: CMAKE_ARGS=.-DGGML_CUDA=on"):
        bench([paths[0]], device="cuda:0")


def test_a_bad_artifact_is_refused_before_any_process_starts(
    paths: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Child", None)
    bad = tmp_path / "bad.gguf"
    bad.write_text("not a model" * 10)
    with pytest.raises(SourceError, match="not a GGUF file"):
        bench([paths[0], bad])


def test_an_artifact_that_llama_cpp_refuses(paths: tuple[Path, Path], tmp_path: Path) -> None:
    bad = write_tiny_gguf(tmp_path / "bad.gguf", fields={"feed_forward_length": 161})
    with pytest.raises(RuntimeFailure, match=r"bad\.gguf: llama\.cpp cannot load it\. It said: .*wrong shape"):
        bench([paths[0], bad], **QUICK)
    assert no_children()


@pytest.mark.parametrize(("number", "name"), [(signal.SIGABRT, "SIGABRT"), (signal.SIGKILL, "SIGKILL.*out of memory")])
def test_a_process_that_dies_is_named_with_its_signal(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, number: signal.Signals, name: str
) -> None:
    class Doomed(Child):
        def ask(self, request: Mapping[str, Any]) -> Any:
            if request["op"] == "repeat" and "b.gguf" in self.subject:
                os.kill(self.pid, number)
            return super().ask(request)

    monkeypatch.setattr(module, "Child", Doomed)
    with pytest.raises(RuntimeFailure, match=rf"b\.gguf: the process that ran llama\.cpp was killed by {name}.*It last said: "):
        bench(paths, **QUICK)
    assert no_children()


CRASHING = """
import ctypes, llama_cpp, sys
from edgeq.runtime.child import serve
from edgeq.errors import UsageError

def handle(request):
    if request["op"] == "echo":
        print("chatter on stdout")
        return request["value"]
    if request["op"] == "bad":
        raise UsageError("no such thing")
    if request["op"] == "exit":
        sys.exit("giving up")
    llama_cpp.llama_batch_free  # the library is loaded
    base = ctypes.CDLL(llama_cpp.llama_cpp._lib._name)
    base.ggml_abort(b"here.c", 12, b"the widget is %s", b"broken")

serve(handle)
"""


def crashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Child:
    (tmp_path / "crashing_child.py").write_text(CRASHING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Child("crashing_child", "some.gguf")


def test_an_abort_in_c_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with crashing(tmp_path, monkeypatch) as child:
        assert child.ask({"op": "echo", "value": ["ü", 1.5, None]}) == ["ü", 1.5, None]
        with pytest.raises(UsageError, match="no such thing"):
            child.ask({"op": "bad"})
        assert child.ask({"op": "echo", "value": 1}) == 1, "an error is an answer, not an end"
        for _ in range(2):
            with pytest.raises(
                RuntimeFailure, match=r"some\.gguf: the process that ran llama\.cpp was killed by SIGABRT.*the widget is broken"
            ):
                child.ask({"op": "abort"})


def test_an_exit_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with crashing(tmp_path, monkeypatch) as child, pytest.raises(RuntimeFailure, match=r"exited with status 1\. It last said: giving up"):
        child.ask({"op": "exit"})


def test_errors_of_any_kind_cross_the_pipe() -> None:
    for kind in EdgeqError.__subclasses__():
        if kind is not MissingDependency:
            error = _error(kind.__name__, ["text"])
            assert (type(error), str(error)) == (kind, "text")
    missing = _error("MissingDependency", ["torch", "export"])
    assert (type(missing), str(missing)) == (MissingDependency, str(MissingDependency("torch", "export")))
    assert type(_error("Unheard", ["text"])) is EdgeqError


def test_waiting_processes_use_no_processor_and_end_with_their_parent(paths: tuple[Path, Path]) -> None:
    code = (
        "import sys, time\nfrom edgeq.runtime.child import Child\n"
        "child = Child('edgeq.runtime._bench_child', 'x')\n"
        f"files = {{'path': {str(paths[0])!r}, 'adapter': None}}\n"
        "child.ask({'op': 'load', **files, 'threads': 2, 'device': 'cpu', 'n_ctx': 64, 'kv_type': 'f16', 'batch': 1})\n"
        "child.ask({'op': 'repeat', 'prompts': [[1, 2, 3]], 'gen_tokens': 9})\n"
        "print(child.pid, flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        child = psutil.Process(int(parent.stdout.readline()))
    for _ in range(20):  # OpenMP threads spin for a moment after their last work, longer on a busy machine
        before = sum(child.cpu_times()[:2])
        time.sleep(0.3)
        used = sum(child.cpu_times()[:2]) - before
        if used <= 0.02:
            break
    assert used <= 0.02
    parent.kill()
    parent.wait()
    child.wait(timeout=5)


def test_contention_is_told() -> None:
    quiet = contention([0.0, THRESHOLD, 0.01], before=0.1, waited_s=2.0)
    assert quiet == {"before": 0.1, "waited_s": 2.0, "other_cores": [0.0, THRESHOLD, 0.01], "worst": THRESHOLD, "warning": None}
    loud = contention([0.0, 0.31, 0.06])
    assert loud["worst"] == 0.31
    assert loud["warning"] == "other processes used up to 0.31 of a core in 2 of 3 repeats; timings may be too slow"
    assert contention([None, None]) == {"before": None, "waited_s": 0.0, "other_cores": [None, None], "worst": None, "warning": None}


def test_a_busy_neighbour_shows(paths: tuple[Path, Path]) -> None:
    if not Path("/proc/stat").exists():
        pytest.skip("needs Linux")
    spinner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.1)
        (result,) = bench([paths[0]], prompt_tokens=500, gen_tokens=300, repeat=1, threads=1, retakes=1)
    finally:
        spinner.kill()
        spinner.wait()
    contended = result.environment["contention"]
    assert contended["warning"] in result.warnings
    assert contended["before"] > BUSY_BEFORE and any("before the run; end them" in text for text in result.warnings)
    assert len(result.samples["discarded"]) == 1, "the round was taken again"
    assert min(contended["other_cores"]) <= min(sample["other_cores"] for sample in result.samples["discarded"])


def test_packages_report_their_rate(paths: tuple[Path, Path], tmp_path: Path) -> None:
    data = paths[0].read_bytes()
    (tmp_path / "model.gguf").write_bytes(data)
    record = {"path": "model.gguf", "format": "gguf", "bytes": len(data), "sha256": sha256(paths[0])}
    manifest = {"format": "edgeq-package", "version": 1, "status": "passed", "artifacts": [record], "side_files": []}
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "export": {"profile": "laptop-cpu", "rate": 0.0}}))
    (result,) = bench([tmp_path], **QUICK)
    assert result.rate == 0.0
    assert result.artifact == str(tmp_path)
    assert result.environment["artifact_sha256"] == record["sha256"]


def no_children() -> bool:
    return not [child for child in psutil.Process().children() if "edgeq" in " ".join(child.cmdline())]


def test_cuts_of_a_package_take_turns(monkeypatch: pytest.MonkeyPatch, paths: tuple[Path, Path], tmp_path: Path) -> None:
    package = write_tiny_elastic(tmp_path / "p")
    loaded: list[str] = []

    class Recorded(Child):
        def ask(self, request: Mapping[str, Any]) -> Any:
            loaded.extend([request["path"]] if request["op"] == "load" else [])
            return super().ask(request)

    monkeypatch.setattr(module, "Child", Recorded)
    rows = bench([package], prompt_tokens=5, gen_tokens=2, repeat=2, threads=1, rates=[0.3, 0, 0.2], retakes=0)
    assert [row.rate for row in rows] == [0.3, 0, 0.2]
    assert len(set(loaded)) == 3 and loaded[:3] == loaded[3:]
    assert {row.elastic_package for row in rows} == {"p"}
    assert [row.load_cold_s is None for row in rows if row.rate] == [True, True], "cuts are in memory"
    elastic = open_elastic(package)
    for row in rows:
        assert row.rate is not None
        with elastic.cut_to_memory(elastic.at_rate(row.rate)) as small:
            assert row.environment["artifact_sha256"] == sha256(small.path)
            with LlamaModel.load(small.path) as model:
                assert (row.model_bytes, row.kv_bytes) == (model.size_bytes, kv_bytes(model.facts, 7))
    assert bench([paths[0]], **QUICK, rates=[0])[0].rate is None
    with pytest.raises(PackageError, match=r"a.gguf is a single file"):
        bench([paths[0]], rates=[0, 0.1])
    with pytest.raises(UsageError, match=r"rates to measure are none. Give different numbers from 0 to 0.35, e.g. 0,0.15,0.25"):
        bench([package], rates=[])


def test_interrupting_ends_the_children(paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Child):
        def ask(self, request: Mapping[str, Any]) -> Any:
            if request["op"] == "repeat":
                raise KeyboardInterrupt
            return super().ask(request)

    monkeypatch.setattr(module, "Child", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench(paths, **QUICK)
    assert no_children()
