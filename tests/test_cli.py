"""The command line's contract: fields, streams, exit statuses, and what it loads."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from tiny import hf_folder
from tiny_elastic import write_tiny_elastic

import edgeq
from edgeq.package import record_files

PROFILE = "laptop-cpu"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return hf_folder(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def package(llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("packages") / "p"
    edgeq.export(llama, profile=PROFILE, output=out, quant="Q4_0")
    return out


def test_export_json(run, llama, tmp_path):
    status, out, err = run(
        "export", llama, "--profile", PROFILE, "--quant", "Q8_0", "--fixed", "--sort", "none", "-o", tmp_path / "o", "--json"
    )
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert document.keys() == {"package", "artifacts", "plan", "regrid", "gate", "seconds", "peak_rss_bytes", "adapters"}
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
    assert json.loads(results.read_text()) == {"edgeq_results": 2, "kind": "bench", "rows": [row]}
    fields = "artifact runtime device rate adapter load_s ttft_ms prefill_tok_s decode_tok_s itl_ms peak_rss_bytes model_bytes kv_bytes"
    assert row.keys() >= {*fields.split(), "vram_bytes", "energy_j_per_token", "adapter_switch_ms", "samples", "environment"}
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


def test_cut(run, tmp_path):
    package = write_tiny_elastic(tmp_path / "p")
    whole = (package / "tiny.gguf").stat().st_size
    small = tmp_path / "small.gguf"
    status, out, err = run("cut", package, "-o", small, "--rate", "0.2", "--json")
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert document.keys() == {"path", "bytes", "rate", "removed_fraction", "seconds", "adapter_path"}
    assert (document["path"], document["rate"], document["bytes"]) == (str(small), 0.2, small.stat().st_size)
    assert 0.2 <= document["removed_fraction"] < 0.25
    assert document["seconds"] > 0
    budget = whole * 9 // 10
    status, out, _ = run("cut", package, "-o", small, "--budget", f"{budget}B", "--force", "--json")
    document = json.loads(out)
    assert (status, document["bytes"]) == (0, small.stat().st_size)
    assert whole * 8 // 10 < document["bytes"] <= budget
    assert document["rate"] == document["removed_fraction"] > 0
    status, out, err = run("cut", package, "-o", small, "--budget", "1GB", "--force")
    assert (status, err) == (0, "")
    assert out.startswith(f"Wrote {small}  ") and "0.0% of block parameters removed" in out
    assert small.read_bytes() == (package / "tiny.gguf").read_bytes()


def test_bad_input_to_cut_leaves_everything_as_it_was(run, tmp_path):
    package = write_tiny_elastic(tmp_path / "p")
    before = {path: path.read_bytes() for path in package.iterdir()}
    there, new = tmp_path / "there.gguf", tmp_path / "new.gguf"
    there.write_text("mine")
    for status, message, arguments in (
        (2, "needs either a rate or a budget: give one of --rate and --budget", (package, "-o", new)),
        (2, "needs either a rate or a budget", (package, "-o", new, "--rate", "0.1", "--budget", "1MB")),
        (2, "'lots' is not a size. Give a positive number of bytes, or one with a unit: 70MB", (package, "-o", new, "--budget", "lots")),
        (2, "'0MB' is not a size", (package, "-o", new, "--budget", "0MB")),
        (2, "a cut is a GGUF file; give a name that ends in .gguf", (package, "-o", tmp_path / "new", "--rate", "0.1")),
        (2, "Missing option '-o'", (package, "--rate", "0.1")),
        (2, "'x' is not a valid float", (package, "-o", new, "--rate", "x")),
        (1, "rate 0.4 is outside 0 to 0.35", (package, "-o", new, "--rate", "0.4")),
        (1, "rate -0.1 is outside 0 to 0.35", (package, "-o", new, "--rate", "-0.1")),
        (1, "is below the smallest cut of this package", (package, "-o", new, "--budget", "1kB")),
        (1, "tiny.gguf is a single file", (package / "tiny.gguf", "-o", new, "--rate", "0.1")),
        (1, "is not a folder", (tmp_path / "nothing", "-o", new, "--rate", "0.1")),
        (1, "it is not an edgeq package", (tmp_path, "-o", new, "--rate", "0.1")),
        (1, "exists and is kept", (package, "-o", there, "--rate", "0.1")),
        (1, "the output is the same file as an input", (package, "-o", package / "tiny.gguf", "--rate", "0.1", "--force")),
    ):
        found, out, err = run("cut", *arguments)
        assert (found, out) == (status, ""), arguments
        assert message in err
    assert {path: path.read_bytes() for path in package.iterdir()} == before
    assert there.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p", "there.gguf"]


def test_cut_says_when_the_disk_is_full(run, tmp_path, monkeypatch):
    package = write_tiny_elastic(tmp_path / "p")
    monkeypatch.setattr("edgeq.output.shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    status, out, err = run("cut", package, "-o", tmp_path / "new.gguf", "--rate", "0.2")
    assert (status, out) == (1, "")
    assert "bytes, but only 1,000 are free on that disk. Free some space or choose another output" in err
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_rates_of_eval_run_and_bench(run, package, tmp_path):
    elastic = write_tiny_elastic(tmp_path / "p")
    text = tmp_path / "t.txt"
    text.write_text("The harbour lights of the island were built between 1847 and 1902. " * 20)
    found = {}
    for rate in ("0", "0.2"):
        run("cut", elastic, "-o", tmp_path / f"{rate}.gguf", "--rate", rate)
        status, out, _ = run("eval", elastic, "--text", text, "--ctx", "64", "--chunks", "2", "--rate", rate, "--json")
        assert status == 0
        found[rate] = json.loads(out)
        _, out, _ = run("eval", tmp_path / f"{rate}.gguf", "--text", text, "--ctx", "64", "--chunks", "2", "--json")
        assert json.loads(out) == found[rate]
    assert found["0"] != found["0.2"]

    options = ("--prompt-tokens", "8", "--gen-tokens", "4", "--repeat", "2")
    status, out, _ = run("bench", elastic, *options, "--rates", "0,0.2", "--json")
    rows = json.loads(out)
    assert status == 0
    assert [(row["artifact"], row["rate"]) for row in rows] == [(str(elastic), 0.0), (str(elastic), 0.2)]
    assert rows[0]["model_bytes"] > rows[1]["model_bytes"]
    status, out, _ = run("bench", elastic, *options, "--rates", "0,0.2")
    assert status == 0 and "rate" in out

    answers = {}
    for rate in ("0", "0.3", "auto"):
        status, out, _ = run("run", elastic, "-p", "Hello", "--max-tokens", "8", "--rate", rate, "--json")
        assert status == 0
        answers[rate] = json.loads(out)["tokens"]
    assert answers["0"] == answers["auto"] != answers["0.3"]

    for status, message, arguments in (
        (2, "'a,b' is not a list of rates like 0,0.15,0.25", ("bench", elastic, "--rates", "a,b")),
        (2, "'' is not a list of rates", ("bench", elastic, "--rates", "")),
        (2, "rates to measure are 0, 0.5. Give different numbers from 0 to 0.35", ("bench", elastic, "--rates", "0,0.5")),
        (2, "rates to measure are 0.1, 0.1", ("bench", elastic, "--rates", "0.1,0.1")),
        (1, "is a single file", ("bench", tmp_path / "0.gguf", "--rates", "0,0.1")),
        (2, "'most' is neither a number nor auto", ("run", elastic, "-p", "a", "--rate", "most")),
        (1, "rate 0.9 is outside 0 to 0.35", ("run", elastic, "-p", "a", "--rate", "0.9")),
        (1, "rate 0.9 is outside 0 to 0.35", ("eval", elastic, "--text", text, "--rate", "0.9")),
        (1, "is a single file", ("eval", tmp_path / "0.gguf", "--text", text, "--rate", "0.1")),
    ):
        found_status, out, err = run(*arguments)
        assert (found_status, out) == (status, ""), arguments
        assert message in err


def test_an_exported_package_is_cut_verified_and_run(run, llama, tmp_path):
    package, small = tmp_path / "p", tmp_path / "small.gguf"
    status, _, err = run("export", llama, "--profile", PROFILE, "--quant", "Q8_0", "--elastic", "-o", package)
    assert status == 0, err
    status, out, _ = run("verify", package, "--json")
    assert (status, json.loads(out)["passed"]) == (0, True)
    status, out, _ = run("cut", package, "-o", small, "--rate", "0.25", "--json")
    assert status == 0
    cut = json.loads(out)
    stated = next(size for size in json.loads((package / "manifest.json").read_text())["elastic"]["sizes"] if size["rate"] == 0.25)
    assert (cut["bytes"], cut["removed_fraction"]) == (stated["bytes"], stated["removed_fraction"])
    answers = []
    for arguments in ((package, "--rate", "0.25"), (small,)):
        status, out, _ = run("run", *arguments, "-p", "Hello", "--max-tokens", "8", "--ctx", "64", "--json")
        assert status == 0
        answers.append(json.loads(out)["tokens"])
    assert answers[0] == answers[1]


def test_verify_finds_side_files_of_another_package(run, tmp_path):
    package = write_tiny_elastic(tmp_path / "p")
    assert run("verify", package)[0] == 0
    path = package / "elastic.json"
    path.write_text(path.read_text().replace('"n_kv":[2,2,2]', '"n_kv":[3,2,2]'))
    manifest = json.loads((package / "manifest.json").read_text())
    manifest["side_files"] = [r.to_json() for r in record_files(package, [path, package / "elastic.npz"])]
    (package / "manifest.json").write_text(json.dumps(manifest))
    status, _, err = run("verify", package)
    assert status == 1
    assert "The package is mixed up; export it again" in err


CUT_WITHOUT = ("torch", "gguf", "rich", "psutil", "jinja2", "tokenizers", "safetensors", "fastapi", "uvicorn", "pydantic", "matplotlib")


def test_cutting_loads_little(tmp_path):
    """What a device pays before the first byte is cut: click, numpy and a few modules of ours."""
    package = write_tiny_elastic(tmp_path / "p", quant="Q8_0")
    code = f"""
import sys
for name in {CUT_WITHOUT!r}:
    sys.modules[name] = None
sys.argv = ["edgeq", "cut", {str(package)!r}, "-o", {str(tmp_path / "small.gguf")!r}, "--rate", "0.2"]
import edgeq.cli
try:
    edgeq.cli.main()
except SystemExit as end:
    assert end.code == 0
assert "llama_cpp" not in sys.modules
loaded = [name for name in sys.modules if name.startswith("edgeq.")]
assert not any(part in name for name in loaded for part in ("converters", "display", "planning", "session", "runtime.bench")), loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "small.gguf").stat().st_size


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


HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "llama_cpp", "tokenizers", "safetensors", "matplotlib")


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


def test_the_program_ends_with_the_status_and_runs_what_waits_for_the_end():
    code = "import atexit, sys; atexit.register(print, 'the end'); sys.argv = ['edgeq', {}]; import edgeq.cli; edgeq.cli.program()"
    for argument, status, said in (("--version", 0, "edgeq"), ("--nonsense", 2, "No such option")):
        run = subprocess.run([sys.executable, "-c", code.format(repr(argument))], capture_output=True, text=True, check=False)
        assert run.returncode == status
        assert said in run.stdout + run.stderr
        assert run.stdout.endswith("the end\n")


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
