"""The main job end to end on tiny models: every family, every promise about what is left behind when something goes wrong.

Packages of one size, where being elastic is not the point; elastic ones are in test_elastic_export.
"""

import functools
import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.numpy import load_file, save_file
from tiny import TINY_FAMILIES, edit_json, hf_folder

import edgeq
from edgeq.errors import OutputError, PlanError, SourceError, UnsupportedError, UsageError
from edgeq.package import check_files, read_package

PROFILE = "laptop-cpu"
export = functools.partial(edgeq.export, elastic=False)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return hf_folder(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def package(llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("packages") / "q8"
    export(llama, profile=PROFILE, output=out, quant="Q8_0")
    return out


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_every_family_exports_in_f16_and_passes_its_gate(name, tmp_path):
    result = export(hf_folder(tmp_path / "model", name), profile=PROFILE, output=tmp_path / "out", quant="F16")
    assert result.gate.failures == ()
    assert result.gate.top1_agreement == 1.0
    assert result.gate.tokenizer_equal and result.gate.chat_template_equal
    assert result.gate.tokens > 500
    package = read_package(tmp_path / "out")
    check_files(package)
    assert package.status == "passed"
    assert edgeq.verify(tmp_path / "out").passed


def test_the_file_is_as_large_as_planned_and_readable_by_others(llama, package):
    plan = export(llama, profile=PROFILE, quant="Q8_0", dry_run=True).plan
    artifact = read_package(package).artifact_path()
    assert plan.file_bytes == artifact.stat().st_size
    stored = {t.name: t.tensor_type.name for t in GGUFReader(artifact).tensors}
    assert stored == {t.name: t.grid.name for t in plan.tensors}


def test_the_same_inputs_give_the_same_bytes(llama, package, tmp_path):
    export(llama, profile=PROFILE, output=tmp_path / "again", quant="Q8_0")
    for path in sorted(package.iterdir()):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_nothing_in_the_manifest_is_absolute(package):
    text = (package / "manifest.json").read_text()
    assert str(package.parent) not in text
    manifest = json.loads(text)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file["path"] for file in manifest["source"]["files"]}
    assert manifest["export"]["calibration"]["name"] == "edgeq default"


def test_gguf_to_gguf_without_regridding_copies_bytes(package, tmp_path):
    source = read_package(package).artifact_path()
    export(source, profile=PROFILE, output=tmp_path / "copy", quant="Q8_0")
    assert read_package(tmp_path / "copy").artifact_path().read_bytes() == source.read_bytes()


def test_importance_is_used_only_where_something_is_encoded_in_blocks(llama, package, tmp_path):
    export(llama, profile=PROFILE, output=tmp_path / "f32", quant="F32", verify=False)
    assert read_package(tmp_path / "f32").manifest["export"]["calibration"] is None
    assert read_package(tmp_path / "f32").status == "unverified"
    assert read_package(package).manifest["export"]["calibration"]["tokens"] > 1000


def test_the_calibration_text_changes_the_result(llama, tmp_path):
    prose, code = "The tide table of the old pier, in metres above chart datum.\n", "for (int i = 0; i < n; i++) { sum += a[i]; }\n"
    texts = {"a": prose * 200, "b": code * 200}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
        export(llama, profile=PROFILE, output=tmp_path / name, quant="Q4_0", calibration=tmp_path / f"{name}.txt", verify=False)
    a, b = (read_package(tmp_path / name).artifact_path().read_bytes() for name in texts)
    assert len(a) == len(b)
    assert a != b
    assert read_package(tmp_path / "a").manifest["export"]["calibration"]["name"] == "a.txt"


def test_a_failed_gate_marks_the_package(llama, tmp_path, monkeypatch):
    from edgeq import gate

    strict = gate.Thresholds(grid="Q2_K", kl_mean=0.0, kl_p99=0.0, top1_agreement=1.0)
    monkeypatch.setattr(gate, "thresholds_for", lambda grids, copied=(): strict)
    result = export(llama, profile=PROFILE, output=tmp_path / "out", quant="Q4_0")
    assert not result.gate.passed
    package = read_package(tmp_path / "out")
    assert package.status == "failed"
    check_files(package)
    verification = edgeq.verify(tmp_path / "out")
    assert not verification.passed
    assert "its gate failed when it was exported" in verification.failures


def test_a_tensor_lost_in_rounding_fails_the_gate_even_where_logits_hide_it(tmp_path):
    """Values far below what a half-precision block scale can hold become zeros; so small a projection hardly moves the logits."""
    model = hf_folder(tmp_path / "model", "llama")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1e-9
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    result = export(model, profile=PROFILE, output=tmp_path / "out", quant="Q8_0")
    assert result.gate.kl_mean < result.gate.thresholds.kl_mean
    assert result.gate.failures == ("blk.1.ffn_down.weight: rounding to Q8_0 lost 100% of it (squared error relative to its values)",)
    assert read_package(tmp_path / "out").status == "failed"


def test_a_session_has_the_context_and_cache_the_package_was_planned_for(package, tmp_path):
    import shutil

    shutil.copytree(package, tmp_path / "p")
    with edgeq.load(tmp_path / "p") as session:
        planned, n_ctx = session.memory().kv_bytes, session.n_ctx
    assert n_ctx == read_package(package).manifest["export"]["n_ctx"]
    assert planned == read_package(package).manifest["plan"]["memory"]["kv_bytes"]
    edit_json(tmp_path / "p" / "manifest.json", lambda m: m["export"].update(kv_type="f32"))
    with edgeq.load(tmp_path / "p") as session:
        assert session.memory().kv_bytes == 2 * planned


def test_verify_finds_a_changed_artifact(package, tmp_path):
    import shutil

    from edgeq.errors import PackageError

    shutil.copytree(package, tmp_path / "p")
    artifact = read_package(tmp_path / "p").artifact_path()
    data = bytearray(artifact.read_bytes())
    data[-1] ^= 1
    artifact.write_bytes(data)
    with pytest.raises(PackageError, match="does not match its hash"):
        edgeq.verify(tmp_path / "p")


# Bad input: a message that names the thing, and nothing left behind.


def refused(tmp_path, error, match, model, **settings):
    with pytest.raises(error, match=match):
        export(model, output=tmp_path / "out", **{"profile": PROFILE, **settings})
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_nan_weights_are_named(tmp_path):
    model = hf_folder(tmp_path / "model", "llama")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, SourceError, r"layers\.1\.mlp\.down_proj", model, quant="F16", verify=False)
    refused(tmp_path, SourceError, r"NaN", model, quant="Q4_0")


def test_a_truncated_checkpoint_and_a_contradicting_config(tmp_path):
    model = hf_folder(tmp_path / "model", "llama")
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:-10])
    refused(tmp_path, SourceError, r"model\.safetensors", model)
    (model / "model.safetensors").write_bytes(whole)
    edit_json(model / "config.json", lambda c: c.update(intermediate_size=192))
    refused(tmp_path, SourceError, r"shape", model)


def test_unknown_names(llama, tmp_path):
    refused(tmp_path, UnsupportedError, r"unknown quantization 'Q9'", llama, quant="Q9")
    refused(tmp_path, edgeq.EdgeqError, r"laptop-cpuu.*laptop-cpu", llama, profile="laptop-cpuu")
    refused(tmp_path, SourceError, r"no-such", tmp_path / "no-such")


def test_a_calibration_text_must_be_text(llama, tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path, SourceError, r"t\.txt: not UTF-8", llama, calibration=tmp_path / "t.txt")
    (tmp_path / "t.txt").write_text("too short")
    refused(tmp_path, UsageError, r"two windows", llama, calibration=tmp_path / "t.txt", quant="Q4_0")


def test_what_cannot_fit_is_refused_before_any_work(llama, tmp_path):
    from importlib import resources

    small = resources.files("edgeq.device_profiles").joinpath("laptop-cpu.toml").read_text()
    assert "budget_mib = 8192" in small
    (tmp_path / "small.toml").write_text(small.replace("laptop-cpu", "small").replace("budget_mib = 8192", "budget_mib = 20"))
    refused(tmp_path, PlanError, r"budget", llama, profile=tmp_path / "small.toml")


def test_an_existing_output_is_kept(llama, package, tmp_path):
    before = sorted((path.name, path.read_bytes()) for path in package.iterdir())
    with pytest.raises(OutputError, match="exists and is kept"):
        export(llama, profile=PROFILE, output=package, quant="F16")
    assert sorted((path.name, path.read_bytes()) for path in package.iterdir()) == before
    with pytest.raises(OutputError, match="would replace the input"):
        export(llama, profile=PROFILE, output=llama, quant="F16", force=True)
    assert (llama / "config.json").exists()


def test_a_full_disk_leaves_nothing(llama, tmp_path):
    code = (
        "import resource, edgeq\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"edgeq.export({str(llama)!r}, elastic=False, profile={PROFILE!r}, output={str(tmp_path / 'out')!r}, quant='F32', verify=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "OutputError" in done.stderr and "llama-F32.gguf" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_export_leaves_no_half_file(sent, llama, tmp_path):
    """Killed at random points, output is absent or whole; leftovers of SIGKILL are removed by the next run."""
    generator = random.Random(int(sent))
    options = ["--profile", PROFILE, "--quant", "Q4_0", "--fixed", "-o", str(tmp_path / "out"), "--force"]
    command = [sys.executable, "-m", "edgeq.cli", "export", str(llama), *options]
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while process.poll() is None and not list(tmp_path.glob(".out.partial-*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(generator.random() * 2)
        process.send_signal(sent)
        process.communicate(timeout=60)
        if (tmp_path / "out").exists():
            check_files(read_package(tmp_path / "out"))
        if sent != signal.SIGKILL:
            assert not list(tmp_path.glob(".out.*"))
    export(llama, profile=PROFILE, output=tmp_path / "out", quant="Q4_0", force=True, verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_1b_model_exports_within_4_gib(tmp_path):
    """Random weights in the shape of Llama 3.2 1B, in bf16 (2.5 GB of safetensors)."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
    model = hf_folder(tmp_path / "model", "llama3", dtype="bfloat16", shards=3, head_dim=64, vocab_size=128256, **sizes)
    code = (
        "import json, edgeq\n"
        f"result = edgeq.export({str(model)!r}, elastic=False, profile={PROFILE!r}, output={str(tmp_path / 'out')!r}, quant='Q4_K_M')\n"
        "print(json.dumps(result.to_json()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["peak_rss_bytes"] < 4 << 30
    print(f"peak {result['peak_rss_bytes'] / 2**30:.2f} GiB, {result['seconds']:.0f} s")  # VmHWM of the exporting process
    check_files(read_package(tmp_path / "out"))
