"""What a device installs: `edgeq[llama]` in an environment of its own has no training libraries, imports fast, cuts and runs a package.

Needs a package index (or pip's cache) and the llama.cpp wheel that `make` keeps; about a minute. Times are processor time, which
other programs on the machine disturb less than the clock on the wall.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import hf_folder

import edgeq

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PARTS = ("edgeq", "converters", "runtime", "device_profiles", "pyproject.toml", "README.md", "LICENSE")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
WHEELS = Path(os.environ.get("WHEELS") or CACHE / "edgeq" / "wheels")  # as in the Makefile
NOT_ON_A_DEVICE = {"torch", "transformers", "onnx", "onnxruntime", "safetensors", "tokenizers", "huggingface-hub", "peft", "fastapi"}
IMPORT_S = 0.150
REPEAT = 7


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """The `bin` of an environment that holds edgeq[llama] and what that asks for."""
    if not list(WHEELS.glob("llama_cpp_python-*.whl")):
        pytest.skip(f"{WHEELS} holds no llama.cpp wheel; run `make demo`, which compiles one")
    folder = tmp_path_factory.mktemp("device")
    source = folder / "source"  # a copy: building leaves files behind
    source.mkdir()
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    pip = [folder / "venv" / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", "--find-links", WHEELS, f"{source}[llama]"], check=True, env=clean())
    return folder / "venv" / "bin"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    model = hf_folder(folder / "model", "llama", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=320)
    text = ROOT / "tests" / "data" / "multilingual.txt"
    edgeq.export(model, profile="laptop-cpu", output=folder / "p", quant="Q8_0", calibration=text)
    return folder / "p"


def clean():
    """The environment without what would let this Python's packages in."""
    return {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}}


def call(program, *arguments, cwd=None):
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, env=clean(), cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_training_library_is_installed(device):
    listed = json.loads(call(device / "python", "-m", "pip", "--disable-pip-version-check", "list", "--format", "json"))
    names = {entry["name"].lower().replace("_", "-") for entry in listed}
    assert {"edgeq", "llama-cpp-python", "gguf"} <= names
    assert not names & NOT_ON_A_DEVICE


def test_importing_takes_little_processor_time(device, tmp_path):
    code = "import time; began = time.process_time(); import edgeq; edgeq.__version__; print(time.process_time() - began)"
    seconds = [float(call(device / "python", "-c", code, cwd=tmp_path)) for _ in range(REPEAT)]
    ready = [float(call(device / "python", "-c", code.replace("__version__", "load"), cwd=tmp_path)) for _ in range(REPEAT)]
    print(
        f"import edgeq: {1000 * statistics.median(seconds):.1f} ms of processor time; edgeq.load: {1000 * statistics.median(ready):.1f} ms"
    )
    assert statistics.median(seconds) < IMPORT_S


def test_the_command_line_starts(device, tmp_path):
    assert "Usage: edgeq [OPTIONS] COMMAND" in call(device / "edgeq", "--help", cwd=tmp_path)


def test_a_package_runs_and_is_cut(device, package, tmp_path):
    here = ["-p", "The harbour", "--max-tokens", 6, "--threads", 1, "--json"]
    said = json.loads(call(device / "edgeq", "run", package, *here, cwd=tmp_path))
    with edgeq.load(package, threads=1) as session:
        assert said["tokens"] == list(session.generate("The harbour", max_tokens=6).tokens)
    cut = json.loads(call(device / "edgeq", "cut", package, "-o", tmp_path / "cut.gguf", "--rate", 0.2, "--json", cwd=tmp_path))
    assert cut["bytes"] < sum(file.stat().st_size for file in package.glob("*.gguf"))
    assert json.loads(call(device / "edgeq", "run", tmp_path / "cut.gguf", *here, cwd=tmp_path))["tokens"]


def test_what_is_missing_says_how_to_get_it(device, package, tmp_path):
    done = subprocess.run([device / "edgeq", "serve", package], capture_output=True, text=True, env=clean(), cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "error: fastapi is not installed. Install it with: pip install 'edgeq[server]'\n"
