"""Runs of `edgeq bench` on tiny models: every setting in one run, comparisons, cold loads, memory and what is written."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from onnx_folders import write_tiny_onnx
from tiny_elastic import write_tiny_elastic
from tiny_gguf import write_tiny_gguf

import edgeq
from edgeq.errors import OutputError, PlanError, UsageError
from edgeq.runtime import _bench_child, contention
from edgeq.runtime import bench as module
from edgeq.runtime.bench import bench
from edgeq.runtime.bench_stats import overlap
from edgeq.runtime.child import Child
from edgeq.runtime.llama import LlamaModel
from edgeq.runtime.llama_context import LlamaContext
from edgeq.runtime.memory import kv_bytes
from edgeq.runtime.page_cache import drop_pages

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
QUICK: dict[str, Any] = {"prompt_tokens": 4, "gen_tokens": 2, "repeat": 1, "threads": 1, "retakes": 0}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("run") / "m.gguf", head_dim=32)


def test_every_setting_gets_a_row(path: Path) -> None:
    rows = bench([path], **{**QUICK, "prompt_tokens": [4, 20], "threads": [1, 2]}, batch=[1, 3])
    assert [(row.prompt_tokens, row.batch, row.threads) for row in rows] == [
        *((4, 1, 1), (4, 1, 2), (4, 3, 1), (4, 3, 2)),
        *((20, 1, 1), (20, 1, 2), (20, 3, 1), (20, 3, 2)),
    ]
    with LlamaModel.load(path) as model:
        for row in rows:
            assert row.kv_bytes == row.batch * kv_bytes(model.facts, row.prompt_tokens + 2)
            (sample,) = row.samples["repeats"]
            assert row.decode_tok_s == row.batch * 2 / sample["decode_s"]
            assert row.prefill_tok_s == row.batch * row.prompt_tokens / sample["prefill_s"]
            assert row.environment["batch"] == row.batch and row.environment["n_ctx"] == row.prompt_tokens + 2


def test_compute_and_kv_bytes_are_those_that_llama_cpp_logs(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small, large = bench([path], **{**QUICK, "prompt_tokens": [4, 500]}, kv_type="q8_0")
    assert small.kv_type == "q8_0"
    for row in (small, large):
        caplog.clear()
        with caplog.at_level("DEBUG", logger="edgeq.runtime.llama"), LlamaModel.load(path) as model:
            LlamaContext(model, n_ctx=row.prompt_tokens + 2, threads=1, kv_type="q8_0", max_outputs=1).close()
        sizes = {
            what: sum(float(line.split("=")[-1].split()[0]) for line in caplog.messages if f"{what} buffer size =" in line)
            for what in ("compute", "KV")
        }
        assert row.compute_bytes == pytest.approx(sizes["compute"] * 2**20, abs=6000), "logged with two digits"
        assert row.kv_bytes == pytest.approx(sizes["KV"] * 2**20, abs=6000)
    assert large.compute_bytes is not None and small.compute_bytes is not None and large.compute_bytes > small.compute_bytes


def test_against_a_base_that_is_measured_in_the_same_rounds(path: Path, tmp_path: Path) -> None:
    package = write_tiny_elastic(tmp_path / "p")
    base, row = bench([path], **{**QUICK, "repeat": 3}, against=package)
    assert (base.artifact, base.against) == (str(package), None)
    assert row.against is not None
    for figure in ("decode_tok_s", "prefill_tok_s", "ttft_ms", "peak_rss_bytes", "itl_p95_ms"):
        found = row.against[figure]
        assert None not in found.values() and found["low"] <= found["ratio"] <= found["high"]  # type: ignore[operator]
    pairs = zip(row.samples["repeats"], base.samples["repeats"], strict=True)
    ratios = sorted(theirs["decode_s"] / mine["decode_s"] for mine, theirs in pairs)
    assert row.against["decode_tok_s"]["ratio"] == pytest.approx(ratios[1])
    whole, cut = bench([package], **QUICK, rates=[0, 0.3], against=package)
    assert (whole.rate, whole.against) == (0.0, None), "an artifact among those measured is not measured twice"
    assert cut.rate == 0.3 and cut.against is not None and cut.against["decode_tok_s"]["low"] is None, "one repeat, no interval"


@LINUX
def test_every_second_load_is_cold_where_the_cache_can_be_emptied(path: Path) -> None:
    (row,) = bench([path], **{**QUICK, "repeat": 4})
    cold = [sample["cold"] for sample in row.samples["repeats"]]
    if not drop_pages([path]):
        pytest.skip("this file system keeps its files in memory")
    assert cold == [False, True, False, True]
    loads = [sample["load_s"] for sample in row.samples["repeats"]]
    assert row.load_s == pytest.approx((loads[0] + loads[2]) / 2) and row.load_cold_s == pytest.approx((loads[1] + loads[3]) / 2)
    assert [sample["resident_fraction"] for sample in row.samples["repeats"]] == [1.0, 0.0, 1.0, 0.0]
    (row,) = bench([path], **{**QUICK, "repeat": 2}, cold=False)
    assert row.load_cold_s is None and not any(sample["cold"] for sample in row.samples["repeats"])


def test_a_cache_that_cannot_be_emptied_gives_no_cold_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "drop_pages", lambda files: False)
    (row,) = bench([path], **{**QUICK, "repeat": 2})
    assert row.load_cold_s is None and row.load_s is not None
    assert [sample["cold"] for sample in row.samples["repeats"]] == [False, False]


@LINUX
def test_memory_of_the_process_is_what_psutil_sees(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Watched(Child):
        def ask(self, request: Mapping[str, Any]) -> Any:
            if request["op"] == "end":
                seen.append(psutil.Process(self.pid).memory_info().rss)
            return super().ask(request)

    monkeypatch.setattr(module, "Child", Watched)
    (row,) = bench([path], **QUICK)
    assert row.steady_rss_bytes == pytest.approx(seen[0], rel=0.02)
    assert row.peak_rss_bytes is not None and row.peak_rss_bytes >= 0.98 * row.steady_rss_bytes
    assert row.steady_rss_bytes > row.samples["rss_before_load_bytes"]


def test_intervals_and_spread_are_there_from_three_repeats_on(path: Path) -> None:
    (row,) = bench([path], **{**QUICK, "repeat": 3, "gen_tokens": 8})
    decode = [8 / sample["decode_s"] for sample in row.samples["repeats"]]
    assert row.intervals["decode_tok_s"] == (pytest.approx(min(decode)), pytest.approx(max(decode)))
    assert overlap(row.intervals["decode_tok_s"], (row.decode_tok_s, row.decode_tok_s))  # type: ignore[arg-type]
    for name in ("ttft_ms", "prefill_tok_s", "itl_p50_ms", "itl_p95_ms", "itl_p99_ms", "steady_rss_bytes"):
        assert row.intervals[name] is not None and row.spread[name] is not None, name
    assert row.to_json()["intervals"]["decode_tok_s"] == list(row.intervals["decode_tok_s"])  # type: ignore[arg-type]
    (single,) = bench([path], **QUICK)
    assert set(single.intervals.values()) == {None} and single.spread["decode_tok_s"] is None


def test_onnx_runs_one_sequence_at_a_time(tmp_path: Path) -> None:
    artifact = tmp_path / "onnx"
    write_tiny_onnx(artifact)
    with pytest.raises(UsageError, match=r"edgeq runs one sequence at a time in ONNX Runtime\. Measure it with --batch 1"):
        bench([artifact], **QUICK, batch=[1, 2])
    with pytest.raises(UsageError, match=r"this graph keeps keys and values in f32, not q8_0\. Leave --kv-type out"):
        bench([artifact], **QUICK, kv_type="q8_0")
    (row,) = bench([artifact], **{**QUICK, "repeat": 2}, kv_type="f32")
    assert (row.runtime, row.kv_type, row.compute_bytes, row.quant) == ("onnxruntime", "f32", None, None)
    assert row.artifact_bytes == sum(file.stat().st_size for file in artifact.glob("model.onnx*"))


def test_what_does_not_fit_the_memory_is_refused_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Child", None)
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(total=10**6, available=10**6))
    with pytest.raises(
        PlanError, match=r"8 times 1006 tokens of context need 0\.0 GB of keys and values, this machine has 0\.0 GB\. Measure"
    ):
        bench([path], **{**QUICK, "prompt_tokens": 1004}, batch=8)
    odd = write_tiny_gguf(path.parent / "odd.gguf")
    with pytest.raises(UsageError, match=r"odd\.gguf: heads of 24 do not divide into q8_0 blocks\. Use --kv-type f16"):
        bench([odd], **QUICK, kv_type="q8_0")


def test_counters_that_say_nothing_are_null(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, so that the counters can be made up: one that does not move, one that is missing, one that works."""
    settings: dict[str, Any] = {"threads": 1, "device": "cpu", "n_ctx": 16, "kv_type": "f16", "batch": 1}
    found = []
    for meter in (lambda: 0.0, None, lambda: 2.5):
        monkeypatch.setattr(_bench_child, "cpu_meter", lambda meter=meter: meter)
        measured = _bench_child.Bench()
        measured.load(path=str(path), adapter=None, **settings)
        found.append(measured.repeat(prompts=[[1, 2, 3]], gen_tokens=2)["energy_j"])
        assert measured.end()["vram_bytes"] is None
    assert found == [None, None, 2.5]


def test_on_a_gpu_its_own_counters_are_asked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model runs on the CPU; what is asked of GPU 3 is made up."""
    measured = _bench_child.Bench()
    measured.load(path=str(path), adapter=None, threads=1, device="cpu", n_ctx=16, kv_type="f16", batch=1)
    measured.gpu = 3
    monkeypatch.setattr(_bench_child, "gpu_meter", lambda gpu: lambda: 10.0 + gpu)
    monkeypatch.setattr(_bench_child, "temperature_c", lambda gpu: 60.0 + gpu)
    monkeypatch.setattr(_bench_child, "frequency_mhz", lambda gpu: 1000.0 + gpu)
    monkeypatch.setattr(_bench_child, "vram_bytes", lambda gpu, pid: (gpu, pid))
    sample = measured.repeat(prompts=[[1, 2, 3]], gen_tokens=2)
    assert (sample["energy_j"], sample["temperature_c"], sample["frequency_mhz"]) == (13.0, 63.0, 1003.0)
    assert measured.end()["vram_bytes"] == (3, os.getpid())


def test_results_files(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "r.json"
    (row,) = edgeq.bench([path], **QUICK, output=target)
    assert json.loads(target.read_text()) == {"edgeq_results": 2, "kind": "bench", "rows": [row.to_json()]}
    with pytest.raises(OutputError, match="exists and is kept"):
        edgeq.bench([path], **QUICK, output=target)


def test_waiting_for_a_quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    others = iter([0.9, 0.5, 0.1, 0.9, 0.9])

    def looked(seconds: float = contention.WINDOW_S) -> float:
        now[0] += seconds
        return next(others)

    monkeypatch.setattr(contention, "others_now", looked)
    monkeypatch.setattr(contention.time, "monotonic", lambda: now[0])
    assert contention.wait_for_quiet(10.0) == (0.1, pytest.approx(3 * contention.WINDOW_S))
    assert contention.wait_for_quiet(0.0) == (0.9, pytest.approx(contention.WINDOW_S)), "one look without patience"
    monkeypatch.setattr(contention, "others_now", lambda: None)
    assert contention.wait_for_quiet(10.0)[0] is None, "a system that does not say is not waited for"


@pytest.mark.parametrize("better", [True, False])
def test_a_disturbed_round_is_taken_again_and_the_quieter_one_counts(path: Path, monkeypatch: pytest.MonkeyPatch, better: bool) -> None:
    others = iter([0.0, 0.9, 0.0, 0.0] if better else [0.0, 0.5, 0.9, 0.9])  # three rounds are wanted; the rest are retakes

    def made(*_: Any) -> dict[str, Any]:
        timed = {"prefill_s": 1.0, "decode_s": 1.0, "ttft_ms": 1000.0, "itl_ms": [500.0, 500.0], "energy_j": None, "steady_rss_bytes": 1}
        state = {"temperature_c": None, "frequency_mhz": None, "cold": False, "resident_fraction": 1.0, "load_s": 1.0, "threads": 1}
        end = {"peak_rss_bytes": 1, "vram_bytes": None, "model_bytes": 1, "adapter_switch_ms": None, "compute_bytes": None}
        return {**timed, **state, **end, "rss_before_load_bytes": 1, "description": "m", "other_cores": next(others)}

    monkeypatch.setattr(module, "_sample", made)
    steps: list[tuple[float, float]] = []
    progress = lambda _, done, total: steps.append((done, total))  # noqa: E731
    (row,) = bench([path], **{**QUICK, "repeat": 2 if not better else 3, "retakes": 2}, progress=progress)
    kept = [sample["other_cores"] for sample in row.samples["repeats"]]
    discarded = [sample["other_cores"] for sample in row.samples["discarded"]]
    if better:
        assert (kept, discarded) == ([0.0, 0.0, 0.0], [0.9])
        assert not any("other processes used up to" in text for text in row.warnings)
    else:
        assert (kept, discarded) == ([0.0, 0.5], [0.9, 0.9]), "no better, so what was there stays, and both retakes are used up"
        assert "other processes used up to 0.50 of a core in 1 of 2 repeats; timings may be too slow" in row.warnings
    assert steps[-1] == (4, 4)
