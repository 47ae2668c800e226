"""Docs are true: the command reference is what --help says, and every example in the README runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from peft_folders import lora_folder
from tiny import hf_folder

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_command_reference_is_current(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import generate

    assert generate.TARGET.read_text(encoding="utf-8") == generate.reference(), "run `make docs`"


def examples(prefix):
    lines = [line.strip() for line in README.splitlines() if line.startswith(f"    {prefix}")]
    return [re.sub(r"\s+#.*", "", line) for line in lines]


def test_every_command_in_the_readme_runs_on_a_tiny_model(tmp_path):
    model = hf_folder(tmp_path / "my-model", "llama")
    for seed, name in enumerate(("sql", "poems")):
        lora_folder(tmp_path / name, model, seed=seed)
    (tmp_path / "book.txt").write_text("The harbour lights of the island were built between 1847 and 1902. " * 200)
    ran = 0
    for line in examples("edgeq "):
        if "demo" in line or line.startswith("edgeq serve"):  # which does not end: tests of the server start it
            continue
        arguments = shlex.split(line)[1:] + (["--prompt-tokens", "8", "--gen-tokens", "8", "--repeat", "1"] if "bench" in line else [])
        done = subprocess.run([sys.executable, "-m", "edgeq.cli", *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr)
        ran += 1
    assert ran == 16


def test_the_demo_commands_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    demo = [line for line in examples("edgeq ") if "demo" in line]
    assert len(demo) == 4
    for line in demo:
        assert line in makefile


def test_the_python_example_names_what_exists():
    import edgeq

    code = re.search(r"    import edgeq\n(.*?)\n\n## ", README, re.DOTALL).group(1)
    for name in re.findall(r"edgeq\.(\w+)", code):
        assert callable(getattr(edgeq, name))


@pytest.mark.slow
def test_the_python_example_runs(tmp_path):
    code = "import edgeq\n" + re.search(r"    import edgeq\n(.*?)\n\n## ", README, re.DOTALL).group(1)
    lines = [line[4:] if line.startswith("    ") else line for line in code.splitlines()]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_every_link_in_the_docs_leads_somewhere():
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_table_of_gate_limits_is_that_of_the_code():
    from edgeq.gate import BF16_LIMIT, LIMITS, UNCHANGED_LIMIT

    limits = {f"at least {limit.bits:g}": limit for limit in LIMITS[:-1]}
    limits |= {f"below {LIMITS[-2].bits:g}": LIMITS[-1], "BF16": BF16_LIMIT, "unchanged": UNCHANGED_LIMIT}
    text = (ROOT / "docs" / "gate.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")][2:]
    assert {row[0] for row in rows} == limits.keys()
    for row in rows:
        limit = limits[row[0]]
        assert row[2:5] == [f"{limit.kl_mean:g}", f"{limit.kl_p99:g}", f"{100 * limit.top1_agreement:g} %"]
