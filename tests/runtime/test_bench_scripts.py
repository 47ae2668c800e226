"""The scripts that check the bench run on tiny models. What they find there means nothing; that they find it is what is tested."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from onnx_folders import write_tiny_onnx
from tiny import hf_folder
from tiny_gguf import write_tiny_gguf

import edgeq

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


def script(name: str, *arguments: object) -> str:
    done = subprocess.run([sys.executable, BENCHMARKS / name, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    found = re.findall(r"median of \d+ paired ratios: ([\d.]+)", done.stdout)
    if found:
        assert done.returncode == (0 if all(float(ratio) <= 1.02 for ratio in found) else 1), "the status is that of the ratios"
    return done.stdout


def test_overhead_of_llama_cpp(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    out = script("overhead.py", path, "--pairs", 3, "--tokens", 2, "--prompt-tokens", 600, "--threads", 1)
    assert re.search(r"edgeq / bare( +[\d.]+){4}\nmedian of 3 paired ratios: [\d.]+ \([\d.]+ to [\d.]+\), limit 1\.02", out)


def test_overhead_of_onnx_runtime(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    write_tiny_onnx(tmp_path / "onnx")
    out = script("overhead.py", tmp_path / "onnx", "--pairs", 2, "--tokens", 2, "--prompt-tokens", 8, "--threads", 1)
    assert re.search(r"edgeq / genai( +[\d.]+){4}\nmedian of 2 paired ratios: [\d.]+, limit 1\.02", out)


def test_speed_of_cuts(tmp_path: Path) -> None:
    model = hf_folder(tmp_path / "m", "llama")
    edgeq.export(model, profile="laptop-cpu", output=tmp_path / "package", quant="F16", elastic=True, verify=False)
    out = script("speed.py", tmp_path / "package", "--rates", "0,0.3", "--rounds", 3, "--prompt-tokens", 8, "--tokens", 2, "--threads", 1)
    ratio = r"[\d.]+ \([\d.]+ to [\d.]+, [\d.]+ tok/s\)"
    assert re.search(
        rf"rate 0\.00: prefill 1\.000 .*\nrate 0\.30: prefill {ratio}   decode {ratio}\n(slower than|no cut is slower than)", out
    )


@pytest.mark.slow
def test_cuts_of_onnx_packages(tmp_path: Path) -> None:
    """A script by the name of a library that it imports."""
    model = hf_folder(tmp_path / "m", "llama", head_dim=32)
    (tmp_path / "text.txt").write_text("The harbour lights went out one by one, and nobody came to light them again. " * 60)
    out = script(
        "onnx.py",
        "--work",
        tmp_path / "work",
        "--text",
        tmp_path / "text.txt",
        "--model",
        model,
        "--tables",
        "cuts",
        "--ctx",
        64,
        "--chunks",
        2,
    )
    rates = r"( +0\.\d+: \d+\.\d+){3}\n"
    assert re.search(
        rf"onnx int8   perplexity at 0\.0: [\d.]+{rates}.*gguf Q8_0   perplexity at 0\.0: [\d.]+{rates}.*--prune   perplexity at{rates}",
        out,
    )


def test_what_is_no_model_is_an_error(tmp_path: Path) -> None:
    out = script("overhead.py", tmp_path)
    assert out == ""


def test_repeatability(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    out = script("repeatable.py", path, "--repeat", 3, "--prompt-tokens", 4, "--gen-tokens", 2, "--threads", 1)
    assert (
        len(re.findall(r"^again +\w+ +[\d.e-]+ to [\d.e-]+   [\d.e-]+ to [\d.e-]+   (?:overlap|DO NOT OVERLAP)$", out, re.MULTILINE)) == 4
    )
    assert "no interval: repeat more often" in out, "two warm loads are too few"
    worst = re.search(r"^memory +/proc beside psutil in (\d+) processes: the worst ratio is ([\d.]+)$", out, re.MULTILINE)
    assert worst is not None and int(worst[1]) >= 6
    assert float(worst[2]) == pytest.approx(1, abs=0.02)
