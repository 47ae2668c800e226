"""`edgeq bench` on the command line: lists, comparisons, warnings and what a person sees of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import write_tiny_gguf

from edgeq.cli_bench import show_bench
from edgeq.runtime import bench as module
from edgeq.runtime.bench_fields import BenchResult

Run = Callable[..., tuple[int, str, str]]
SHORT = ("--gen-tokens", "2", "--repeat", "1", "--retakes", "0")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("cli")
    return write_tiny_gguf(folder / "small.gguf"), write_tiny_gguf(folder / "large.gguf", n_layers=3)


def test_lists_and_a_base(run: Run, paths: tuple[Path, Path], tmp_path: Path) -> None:
    small, large = paths
    options = ("--prompt-tokens", "4,8", "--threads", "1", *SHORT, "--against", large)
    status, out, err = run("bench", small, *options, "--json")
    assert status == 0, err
    rows = json.loads(out)
    assert [(row["name"], row["prompt_tokens"]) for row in rows] == [(n, p) for n in ("large.gguf", "small.gguf") for p in (4, 8)]
    assert [row["against"] is None for row in rows] == [True, True, False, False]
    status, out, err = run("bench", small, *options, "-o", tmp_path / "r.json")
    assert status == 0, err
    assert "prompt" in out.splitlines()[0] and "threads" not in out.splitlines()[0], "columns for what differs"
    assert "small.gguf, prompt 4 against the base: decode " in out
    assert "2 generated, medians of 1 repeats (95 % interval), llama.cpp on cpu, 1 threads, f16 keys and values." in out
    assert len(json.loads((tmp_path / "r.json").read_text())["rows"]) == 4


def row(**changes: Any) -> BenchResult:
    numbers = ("load_s", "ttft_ms", "prefill_tok_s", "decode_tok_s", "peak_rss_bytes", "model_bytes", "kv_bytes", "artifact_bytes")
    values: dict[str, Any] = dict.fromkeys(BenchResult.__dataclass_fields__) | dict.fromkeys(numbers, 1.0)
    values |= {"artifact": "a/x", "name": "x", "runtime": "llama.cpp", "device": "cpu", "prompt_tokens": 4, "gen_tokens": 2, "batch": 1}
    values |= {"threads": 1, "kv_type": "f16", "itl_ms": {"p50": 1.0, "p95": 2.0, "p99": 3.0}, "warnings": (), "environment": {"repeat": 5}}
    values |= {"intervals": {"prefill_tok_s": None, "decode_tok_s": (9.0, 11.0)}}
    return BenchResult(**{**values, **changes})


def test_the_table_shows_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    show_bench([row(decode_tok_s=10.0)])
    out = capsys.readouterr().out
    assert "10.0 (9.0-11.0)" in out and "VRAM" not in out and "J/token" not in out and "adapter" not in out
    gpu = row(vram_bytes=2_000_000_000, energy_j_per_token=0.1234, temperature_c=61.0, adapter="sql", adapter_switch_ms=1.25)
    show_bench([gpu, row(artifact="b/x", rate=0.25)])
    out = capsys.readouterr().out
    for text in ("VRAM", "2.00 GB", "J/token", "0.123", "61", "sql", "a/x", "b/x", "0.25"):
        assert text in out, text
    assert "Switching to sql takes 1.2 ms once it is in memory." in out


def test_warnings_say_whose_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    show_bench([row(warnings=("all of it", "only mine")), row(rate=0.25, warnings=("all of it",))])
    out = capsys.readouterr().out
    assert "Warning: all of it.\n" in out and out.count("all of it") == 1
    assert "Warning: x: only mine.\n" in out
    show_bench([row(rate=0.0), row(rate=0.25, runtime="onnxruntime", warnings=("slow",))])
    out = capsys.readouterr().out
    assert "Warning: x, rate 0.25: slow." in out and "llama.cpp and onnxruntime on cpu" in out


def test_ratios_are_shown_with_their_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    against = {"decode_tok_s": {"ratio": 1.25, "low": 1.2, "high": 1.31}, "ttft_ms": {"ratio": 0.5, "low": None, "high": None}}
    show_bench([row(), row(adapter="sql", against=against)])
    assert "x, with sql against the base: decode 1.250x" in capsys.readouterr().out
    show_bench([row(), row(rate=0.25, against=against)])
    assert "x, rate 0.25 against the base: decode 1.250x (1.200 to 1.310), TTFT 0.500x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--threads", "a"), "'a' is not a list of different whole numbers of at least 1, like 128,512."),
        (("--threads", "0"), "'0' is not a list of different whole numbers"),
        (("--threads", "1,513"), "513 is more than 512."),
        (("--prompt-tokens", "8,8"), "'8,8' is not a list of different whole numbers"),
        (("--batch", ""), "'' is not a list of different whole numbers"),
        (("--batch", "-1"), "'-1' is not a list of different whole numbers"),
        (("--kv-type", "q9"), "kv_type 'q9' is not known; expected one of f16"),
        (("--wait", "-1"), "-1.0 is not in the range x>=0"),
        (("--device", "tpu"), "device 'tpu' is not known"),
    ],
)
def test_usage_errors(run: Run, paths: tuple[Path, Path], options: tuple[str, str], message: str) -> None:
    status, out, err = run("bench", paths[0], *options)
    assert (status, out) == (2, "")
    assert message in err


def test_a_gpu_without_a_build_for_it(run: Run, paths: tuple[Path, Path]) -> None:
    from edgeq.runtime import llama

    if llama.library().llama_supports_gpu_offload():
        pytest.skip("this llama-cpp-python has GPU support")
    status, out, err = run("bench", paths[0], "--device", "cuda")
    assert (status, out) == (1, "")
    assert "was built without GPU support. Build it with: CMAKE_ARGS" in err


def test_options_reach_the_measurement(run: Run, paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def measured(artifacts: Any, **settings: Any) -> list[BenchResult]:
        asked.update(settings)
        return [row()]

    monkeypatch.setattr(module, "bench", measured)
    status, _, err = run(
        "bench", paths[0], "--no-cold", "--wait", "5", "--retakes", "7", "--kv-type", "q8_0", "--batch", "1,2", "--threads", "1,2"
    )
    assert status == 0, err
    wanted = {"cold": False, "wait_s": 5.0, "retakes": 7, "kv_type": "q8_0", "batch": (1, 2), "threads": (1, 2), "prompt_tokens": (512,)}
    assert {name: asked[name] for name in wanted} == wanted
