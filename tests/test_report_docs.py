"""docs/quality.md and docs/report.md are true: their commands run, their files are read, and their names are those of the code."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import hf_folder

ROOT = Path(__file__).parent.parent
QUALITY, REPORT = ((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("quality", "report"))
SMALL = {"eval": ["--ctx", "64"], "bench": ["--prompt-tokens", "8", "--gen-tokens", "4", "--repeat", "1"]}
SMALL["sweep"] = [*SMALL["eval"], *SMALL["bench"], "--chunks", "2"]


def lines(page, start):
    return [line[4:] for line in page.splitlines() if line.startswith(f"    {start}")]


@pytest.fixture
def folder(tmp_path):
    hf_folder(tmp_path / "my-model", "llama")
    (tmp_path / "book.txt").write_text("The harbour lights of the island were built between 1847 and 1902. " * 20)
    choices, answers = lines(QUALITY, '{"prompt"')
    (tmp_path / "choices.jsonl").write_text(choices + "\n" + choices)
    (tmp_path / "answers.jsonl").write_text(answers)
    return tmp_path


@pytest.mark.parametrize(("page", "count", "made"), [(QUALITY, 4, "quality.html"), (REPORT, 6, "my-sweep/report.html")])
def test_the_commands_run(folder, page, count, made):
    commands = lines(page, "edgeq ")
    assert len(commands) == count
    for line in commands:
        arguments = shlex.split(line)[1:]
        arguments += SMALL.get(arguments[0], [])
        done = subprocess.run([sys.executable, "-m", "edgeq.cli", *arguments], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr)
    assert (folder / made).read_text().startswith("<!doctype html>")


def test_the_metrics_and_fields_are_those_of_the_code(folder):
    from tiny_gguf import write_tiny_gguf

    from edgeq.quality_api import evaluate_tasks

    write_tiny_gguf(folder / "a.gguf")
    tasks = {"text": folder / "book.txt", "choices": folder / "choices.jsonl", "exact": folder / "answers.jsonl"}
    rows = evaluate_tasks([folder / "a.gguf"], reference=folder / "a.gguf", ctx=64, chunks=2, threads=1, output=folder / "q.json", **tasks)
    table = {name for line in QUALITY.splitlines() if line.startswith("| `--") for name in re.findall(r"`(\w+)`", line.split("|")[3])}
    assert table == {row.metric for row in rows}
    said = QUALITY.split("A row has ")[1].split("; what is not")[0]
    document = json.loads((folder / "q.json").read_text())
    assert set(re.findall(r"`(\w+)`", said)) == document["rows"][0].keys()
    assert f'"edgeq_results": {document["edgeq_results"]}, "kind": "{document["kind"]}"' in QUALITY


def test_what_the_pages_say_of_numbers():
    from edgeq.runtime import exact_match
    from edgeq.runtime.report import advice

    assert f"{exact_match._MORE_TOKENS} tokens more than the longest answer" in QUALITY
    assert f"more than {advice.CLOSE:.0%}".replace("%", " %") in REPORT
    assert "0.05 nats of KL, 5 % of perplexity, or two points or two standard errors" in REPORT
    assert advice.TOLERANCE == "KL 0.05 nats, perplexity 5 %, accuracies 2 points or two standard errors"
    assert f"prompts of {advice.USUAL_PROMPT} tokens" in REPORT


def test_what_a_sweep_leaves_is_what_the_page_lists():
    from edgeq.sweep import REPORTS

    listed = {name for line in REPORT.splitlines() if line.startswith("| `") for name in re.findall(r"`([^`]+)`", line)}
    assert listed == {"packages/", "measured/", "bench.json", "quality.json", *REPORTS}
