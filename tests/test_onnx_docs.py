"""docs/onnx.md is true: its commands run, its Python runs in stock onnxruntime-genai, and its names are those that --quant takes."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from peft_folders import lora_folder
from tiny import hf_folder

from edgeq.converters.onnx.quants import QUANT_NAMES

PAGE = (Path(__file__).parent.parent / "docs" / "onnx.md").read_text(encoding="utf-8")
BLOCKS = [[line[4:] for line in block.splitlines()] for block in re.findall(r"(?:^    .*\n)+", PAGE, re.MULTILINE)]
FIRST, THIRD = (block for block in BLOCKS if block[0].startswith("edgeq "))
SECOND = next(block for block in BLOCKS if block[0].startswith("import "))


def test_commands_and_python_run(tmp_path):
    pytest.importorskip("onnxruntime_genai")
    hf_folder(tmp_path / "my-model", "llama", head_dim=32)
    assert len(FIRST) == 4
    for line in FIRST:
        done = subprocess.run([sys.executable, "-m", "edgeq.cli", *shlex.split(line)[1:]], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr)
    done = subprocess.run([sys.executable, "-c", "\n".join(SECOND)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The harbour lights")
    drawn = re.search(r"    my-onnx/\n((?:      .*\n)+)", PAGE)
    assert drawn is not None
    names = [name.strip(",/") for line in drawn[1].splitlines() for name in line.split("  " * 4)[0].split()]
    for name in (name for name in names if "." in name or name.startswith("my-")):
        assert list((tmp_path / "my-onnx").rglob(name)), name


def test_commands_with_adapters_run(tmp_path):
    model = hf_folder(tmp_path / "my-model", "llama", head_dim=32)
    lora_folder(tmp_path / "my-adapter", model)
    assert len(THIRD) == 3
    for line in THIRD:
        done = subprocess.run([sys.executable, "-m", "edgeq.cli", *shlex.split(line)[1:]], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr)
    assert (tmp_path / "my-tuned" / "adapters" / "sql.onnx_adapter").is_file()
    assert (tmp_path / "my-smaller-sql.onnx_adapter").is_file()


def test_every_name_of_a_number_format_is_in_the_table():
    cells = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    written = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    for name in QUANT_NAMES:
        stem = re.sub("-b(64|128)|-full", "", name)
        assert {name, stem} & written, name
        assert "-b" not in name or {"..-b64", "..-b128"} <= written
    assert written - {"..-b64", "..-b128", "int4..-full", "auto"} <= set(QUANT_NAMES)
