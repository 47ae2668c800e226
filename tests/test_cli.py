"""The command line's contract: fields, streams, exit statuses, and what it loads."""

import json
import signal
import subprocess
import sys

import pytest
from tiny import hf_folder

import edgeq
from edgeq import cli

PROFILE = "laptop-cpu"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return hf_folder(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def package(llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("packages") / "p"
    edgeq.export(llama, profile=PROFILE, output=out, quant="Q4_0")
    return out


@pytest.fixture
def run(monkeypatch, capfd):
    """edgeq ARGUMENTS -> (exit status, stdout, stderr), in this process."""

    def call(*arguments):
        before = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr(sys, "argv", ["edgeq", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        signal.signal(signal.SIGTERM, before)
        out, err = capfd.readouterr()
        return ended.value.code, out, err

    return call


def test_export_json(run, llama, tmp_path):
    status, out, err = run(
        "export", llama, "--profile", PROFILE, "--quant", "Q8_0", "--fixed", "--sort", "none", "-o", tmp_path / "o", "--json"
    )
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert document.keys() == {"package", "artifacts", "plan", "gate", "seconds", "peak_rss_bytes"}
    assert document["package"] == str(tmp_path / "o")
    assert document["artifacts"][0].keys() == {"path", "format", "bytes", "sha256"}
    assert {"passed", "kl_mean", "top1_agreement"} <= document["gate"].keys()
    assert document["gate"]["passed"] is True
    assert document["seconds"] > 0
    assert document["peak_rss_bytes"] > 1 << 20


def test_export_text_shows_plan_gate_and_time(run, llama, tmp_path):
    status, out, err = run("export", llama, "--profile", PROFILE, "--quant", "F16", "-o", tmp_path / "o")
    assert (status, err) == (0, "")
    for shown in ("Plan: F16 for laptop-cpu", "bits per weight", "Memory at", "Gate: passed", "sha256", "Took"):
        assert shown in out


def test_dry_run_writes_nothing_and_needs_no_output(run, llama, tmp_path):
    status, out, _ = run("export", llama, "--profile", PROFILE, "--dry-run", "-o", tmp_path / "o")
    assert status == 0
    assert "Dry run: nothing was written." in out
    assert out.count("Plan:") == 1
    status, out, _ = run("export", llama, "--profile", PROFILE, "--dry-run", "--json")
    assert json.loads(out)["plan"]["profile"] == PROFILE
    assert not list(tmp_path.iterdir())


def test_a_failed_gate_exits_1(run, llama, tmp_path, monkeypatch):
    from edgeq import gate

    strict = gate.Thresholds(grid="Q2_K", kl_mean=0.0, kl_p99=0.0, top1_agreement=1.0)
    monkeypatch.setattr(gate, "thresholds_for", lambda grids, copied=(): strict)
    status, out, err = run("export", llama, "--profile", PROFILE, "--quant", "Q4_0", "-o", tmp_path / "o")
    assert status == 1
    assert "Gate: failed" in out
    assert "did not pass its gate and is marked failed" in err
    status, _, err = run("verify", tmp_path / "o")
    assert status == 1
    assert "failed verification" in err


def test_usage_errors_exit_2(run, llama):
    for arguments, message in (
        (("export", llama, "--profile", PROFILE), "Missing option '-o'"),
        (("export", llama), "Missing option '--profile'"),
        (("export",), "Missing argument 'MODEL'"),
        (("bench",), "Missing argument"),
        (("eval", llama), "Missing option '--text'"),
        (("nonsense",), "No such command"),
        (("export", llama, "--sort", "best"), "'best' is not"),
    ):
        status, out, err = run(*arguments)
        assert (status, out) == (2, ""), arguments
        assert message in err


def test_errors_are_one_line_and_exit_1(run, tmp_path):
    status, out, err = run("export", tmp_path / "nothing", "--profile", PROFILE, "-o", tmp_path / "o")
    assert (status, out) == (1, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    for command in ("verify", "bench", "inspect"):
        status, _, err = run(command, tmp_path)
        assert status == 1
        assert err.startswith("error: ")


def test_verify_bench_eval_run_inspect(run, package, tmp_path):
    status, out, _ = run("verify", package, "--json")
    assert status == 0
    assert json.loads(out)["passed"] is True
    status, out, _ = run("verify", package)
    assert "match their hashes" in out

    results = tmp_path / "r.json"
    options = ("--prompt-tokens", "16", "--gen-tokens", "8", "--repeat", "2", "-o", results)
    status, out, _ = run("bench", package, *options, "--json")
    assert status == 0
    (row,) = json.loads(out)
    assert json.loads(results.read_text()) == [row]
    fields = "artifact runtime device rate adapter load_s ttft_ms prefill_tok_s decode_tok_s itl_ms peak_rss_bytes model_bytes kv_bytes"
    assert row.keys() == {*fields.split(), "vram_bytes", "energy_j_per_token", "samples", "environment"}
    assert row["itl_ms"].keys() == {"p50", "p95", "p99"}
    status, out, err = run("bench", package, *options)
    assert status == 1
    assert "exists and is kept" in err
    status, out, _ = run("bench", package, *options, "--force")
    assert "decode tok/s" in out and "medians of 2 repeats" in out

    text = tmp_path / "t.txt"
    text.write_text("The harbour lights of the island were built between 1847 and 1902. " * 20)
    status, out, _ = run("eval", package, "--text", text, "--ctx", "64", "--chunks", "2", "--json")
    assert status == 0
    assert json.loads(out).keys() == {"perplexity", "nll_mean", "tokens", "ctx", "chunks"}
    assert json.loads(out)["tokens"] == 2 * 63
    status, out, _ = run("eval", package, "--text", text, "--ctx", "64")
    assert "perplexity" in out

    status, out, err = run("run", package, "-p", "Hello", "--max-tokens", "4")
    assert status == 0
    assert out.startswith("Hello")
    assert "tok/s" in err
    status, out, _ = run("run", package, "-p", "Hello", "--max-tokens", "4", "--chat", "--json")
    assert json.loads(out).keys() == {"text", "tokens", "finish_reason", "timings"}

    for path, kind in ((package, "package"), (next(package.glob("*.gguf")), "gguf")):
        status, out, _ = run("inspect", path, "--json")
        assert json.loads(out)["kind"] == kind
        status, out, _ = run("inspect", path)
        assert status == 0 and "Q4_0" in out


def test_inspect_a_model(run, llama):
    status, out, _ = run("inspect", llama, "--json")
    document = json.loads(out)
    assert (status, document["kind"], document["spec"]["head_dim"]) == (0, "model", 24)


def test_profiles(run):
    status, out, _ = run("profiles", "list", "--json")
    names = [row["name"] for row in json.loads(out)]
    assert {
        "laptop-4090",
        "laptop-cpu",
        "desktop-3060",
        "macbook-m3",
        "raspberry-pi-5",
        "jetson-orin-nano",
        "phone-8gb",
        "server-h100",
    } <= set(names)
    status, out, _ = run("profiles", "list")
    assert all(name in out for name in names)
    status, out, _ = run("profiles", "show", "phone-8gb")
    assert status == 0 and "ram_mib" in out
    status, out, _ = run("profiles", "show", "phone-8gb", "--json")
    assert json.loads(out)["name"] == "phone-8gb"
    status, out, _ = run("profiles", "detect", "--json")
    assert status == 0 and json.loads(out)
    status, out, _ = run("profiles", "detect")
    assert "Nearest profile" in out
    status, _, err = run("profiles", "show", "phone")
    assert status == 1 and "phone-8gb" in err


HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "llama_cpp", "tokenizers", "safetensors")


@pytest.mark.parametrize(
    "code",
    [
        "import edgeq",
        "import edgeq.runtime",
        "import sys; sys.argv = ['edgeq', '--help']; import edgeq.cli\ntry: edgeq.cli.main()\nexcept SystemExit as e: assert e.code == 0",
    ],
)
def test_help_and_imports_load_nothing_heavy(code):
    check = f"{code}\nimport sys\nloaded = [m for m in {HEAVY!r} if m in sys.modules]\nassert not loaded, loaded"
    subprocess.run([sys.executable, "-c", check], check=True, stdout=subprocess.DEVNULL)


def test_the_device_side_needs_no_export_library(package, tmp_path):
    """verify, bench, eval and run with torch and all that only an export needs made unimportable."""
    text = tmp_path / "t.txt"
    text.write_text("The harbour lights of the island were built between 1847 and 1902. " * 20)
    code = f"""
import sys
for name in ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub"):
    sys.modules[name] = None
import edgeq
assert edgeq.verify({str(package)!r}).passed
assert edgeq.evaluate({str(package)!r}, {str(text)!r}, ctx=64).tokens
assert edgeq.bench([{str(package)!r}], prompt_tokens=4, gen_tokens=4, repeat=1)
with edgeq.load({str(package)!r}) as session:
    assert session.generate("Hello", max_tokens=2).tokens
try:
    edgeq.export("demo", profile="laptop-cpu", dry_run=True)
except edgeq.EdgeqError as err:
    assert "pip install 'edgeq[export]'" in str(err), err
else:
    raise AssertionError("export without its libraries")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
