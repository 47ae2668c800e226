"""docs/bench.md is true: its commands run, its table has every field, and nothing else."""

import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from tiny_elastic import write_tiny_elastic

from edgeq.runtime.bench_fields import METRICS_VERSION, BenchResult

PAGE = (Path(__file__).parent.parent / "docs" / "bench.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for line in PAGE.splitlines() if line.startswith("    edgeq ")]
SHORT = ["--gen-tokens", "4", "--repeat", "1", "--retakes", "0"]


def test_commands_run(tmp_path):
    package = write_tiny_elastic(tmp_path / "my-model-pi")
    shutil.copy(next(package.glob("*.gguf")), tmp_path / "my-model-pi-20.gguf")
    assert len(COMMANDS) == 4
    for line in COMMANDS:
        arguments = shlex.split(line)[1:] + SHORT + ([] if "--prompt-tokens" in line else ["--prompt-tokens", "8"])
        done = subprocess.run([sys.executable, "-m", "edgeq.cli", *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr)
    assert (tmp_path / "results.json").is_file()


def test_every_field_is_defined_here_and_in_the_code():
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    written = [name for cell in rows for name in re.findall(r"`([^`]+)`", cell)]
    fields = [field.name for field in dataclasses.fields(BenchResult)]
    assert sorted(written) == sorted(fields)
    assert f"Version {METRICS_VERSION} " in PAGE
    definitions = sys.modules[BenchResult.__module__].__doc__
    for name in set(fields) - {"name", "artifact", "runtime", "device"}:
        assert re.search(rf"^{name} ", definitions, re.MULTILINE), name


def test_the_claim_about_kernels_is_the_one_in_the_code():
    from edgeq.footprint import is_repacked
    from edgeq.grids import grid

    for name in ("Q4_0", "Q4_K", "IQ4_NL"):
        assert is_repacked(grid(name), 8, ["avx2"])
    for name in ("Q4_1", "Q5_1", "Q8_0"):
        assert not is_repacked(grid(name), 8, ["avx2", "avx512"])
