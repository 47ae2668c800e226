"""Exports to ONNX end to end on tiny models: packages that pass their gate, and folders that onnxruntime-genai runs as we do."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_folders import genai_tokens
from peft_folders import lora_folder
from tiny import TINY_FAMILIES, hf_folder
from tiny_gguf import write_tiny_gguf
from tiny_quantized import awq, bnb4, gptq, quantize

import edgeq
from edgeq.converters.onnx.read import read_weights
from edgeq.converters.sources.resolve import open_model
from edgeq.errors import PackageError, PlanError, UnsupportedError
from edgeq.package import check_files, read_package
from edgeq.runtime.onnx_context import OnnxContext
from edgeq.runtime.onnx_model import OnnxModel

PROFILE = "laptop-cpu"
export = functools.partial(edgeq.export, profile=PROFILE, format="onnx", elastic=False)
PROMPT = "the quick brown fox"
HEAD_32: dict[str, Any] = {"head_dim": 32}  # GroupQueryAttention rotates heads of 32


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_folder(tmp_path_factory.mktemp("models") / "llama", "llama", **HEAD_32)


@pytest.fixture(scope="module")
def package(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packages") / "int4"
    export(llama, output=out, quant="int4")
    return out


def folder_of(package: Path) -> Path:
    return read_package(package).artifact_path().parent


def our_tokens(folder: Path, ids: Sequence[int], n: int) -> list[int]:
    """Greedy continuation by our own session over onnxruntime, up to the first end of generation."""
    tokens: list[int] = []
    with OnnxModel.load(folder / "model.onnx", threads=1) as model, OnnxContext(model, n_ctx=len(ids) + n) as context:
        logits = context.decode(ids)[-1]
        while len(tokens) < n:
            token = int(np.argmax(logits))
            if model.is_eog(token):
                break
            tokens.append(token)
            logits = context.decode([token])[-1]
    return tokens


def assert_same_greedy_tokens(package: Path, n: int = 24) -> None:
    pytest.importorskip("onnxruntime_genai")
    folder = folder_of(package)
    with OnnxModel.load(folder / "model.onnx", threads=1) as model:
        prompts = [model.tokenize(text) for text in (PROMPT, "def main(args):", "1234567890")]
    found = [our_tokens(folder, ids, n) for ids in prompts]
    assert found == [genai_tokens(folder, ids, n) for ids in prompts]
    assert any(len(tokens) > 4 for tokens in found)


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_every_family_exports_in_fp32_and_passes_its_gate(name: str, tmp_path: Path) -> None:
    result = export(hf_folder(tmp_path / "model", name), output=tmp_path / "out", quant="fp32")
    assert result.gate is not None
    assert result.gate.failures == ()
    assert result.gate.kl_mean is not None and result.gate.kl_mean < 1e-7
    assert result.gate.tokenizer_equal and result.gate.chat_template_equal
    package = read_package(tmp_path / "out")
    check_files(package)
    assert package.status == "passed"
    assert package.manifest["export"]["format"] == "onnx"
    assert edgeq.verify(tmp_path / "out").passed
    assert_same_greedy_tokens(tmp_path / "out", 12)


@pytest.mark.parametrize(
    "quant",
    ["fp16", "int8", "int8-asym-b64", "int4", "int4-asym", "int4-b64", "int4-b128", "int4-full", "w8", "w8a8-dynamic", "w8a8-static"],
)
def test_every_quant_passes_its_gate(llama: Path, quant: str, tmp_path: Path) -> None:
    result = export(llama, output=tmp_path / "out", quant=quant)
    assert result.gate is not None
    assert result.gate.failures == ()
    if quant != "fp16":
        assert result.gate.fidelity is not None and result.gate.fidelity.kl_mean < 0.01
        assert result.regrid["total"]["relative"] > 0
    assert result.plan.file_bytes == sum(artifact.bytes for artifact in result.artifacts)


def test_what_is_in_the_package(package: Path) -> None:
    opened = read_package(package)
    assert [(Path(record.path).name, record.format) for record in opened.artifacts] == [("model.onnx", "onnx"), ("model.onnx.data", "onnx")]
    listed = {record.path for record in (*opened.artifacts, *opened.side_files)}
    there = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    assert listed == there - {"manifest.json"}
    assert {Path(path).name for path in listed} == {
        *("model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        "reference.npz",
    }
    assert folder_of(package).name == "llama-int4"
    config = json.loads((folder_of(package) / "genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == [2, 0]
    assert config["search"] == {**config["search"], "max_length": 256, "past_present_share_buffer": True}
    assert opened.manifest["tools"].keys() >= {"onnx", "onnx-ir"}
    assert str(package.parent) not in (package / "manifest.json").read_text()


def test_greedy_tokens_of_onnxruntime_genai_are_ours(package: Path) -> None:
    assert_same_greedy_tokens(package)


def test_the_session_runs_the_package(package: Path) -> None:
    with edgeq.load(package) as session:
        text = session.generate(PROMPT, max_tokens=8).text
    with OnnxModel.load(folder_of(package) / "model.onnx", threads=1) as model:
        assert text == model.detokenize(our_tokens(folder_of(package), model.tokenize(PROMPT, add_special=True), 8))


def test_the_dry_run_foretells_the_bytes(llama: Path, package: Path) -> None:
    plan = export(llama, quant="int4", dry_run=True).plan
    assert plan.file_bytes == sum((package / record.path).stat().st_size for record in read_package(package).artifacts)
    by_role = {tensor.role: tensor for tensor in plan.tensors}
    assert (by_role["wqkv"].grid.name, by_role["embed"].grid.name, by_role["head"].grid.name) == ("Q4_0", "Q8_0", "Q8_0")
    assert by_role["wqkv"].shape == (128 + 2 * 64, 64)
    assert by_role["wqkv"].nbytes == 256 * 64 // 2 + 2 * 256 * 2  # codes, and a float16 scale for each block of 32
    assert sum(tensor.nbytes for tensor in plan.tensors) < plan.file_bytes
    assert plan.memory.kv_type == "f32"
    assert plan.memory.kv_bytes == 2 * 2 * 2 * 32 * 256 * 4


def test_the_same_inputs_give_the_same_bytes(llama: Path, package: Path, tmp_path: Path) -> None:
    export(llama, output=tmp_path / "again", quant="int4")
    for path in sorted(p for p in package.rglob("*") if p.is_file()):
        assert (tmp_path / "again" / path.relative_to(package)).read_bytes() == path.read_bytes(), path.name


def test_both_formats_hold_the_same_integers(llama: Path, package: Path, tmp_path: Path) -> None:
    """And so both runtimes compute nearly the same: see the cross-runtime benchmark for a real model."""
    edgeq.export(llama, profile=PROFILE, output=tmp_path / "gguf", quant="Q4_0", elastic=False, verify=False)
    gguf = open_model(read_package(tmp_path / "gguf").artifact_path())
    onnx = read_weights(read_package(package).artifact_path(), gguf.spec)
    compared = 0
    for name, tensor in gguf.tensors.items():
        if tensor.grid.name == "Q4_0" and name.startswith("layers."):
            np.testing.assert_array_equal(onnx[name].decode(), tensor.decode())
            compared += 1
    assert compared >= 12


@pytest.mark.parametrize(
    ("method", "grid"), [(gptq(bits=4), "4-bit"), (awq(32), "4-bit"), (bnb4("nf4"), "nf4")], ids=["gptq", "awq", "nf4"]
)
def test_codes_of_a_quantized_source_are_kept(method: Any, grid: str, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "model", "llama", **HEAD_32)
    quantize(folder, method)
    result = export(folder, output=tmp_path / "out")
    assert result.plan.quant == "source"
    assert result.gate is not None
    assert result.gate.failures == ()
    actions = {tensor.role: tensor.action for tensor in result.plan.tensors}
    assert (actions["wqkv"], actions["down"], actions["head"]) == ("copy", "copy", "encode")
    source = open_model(folder)
    held = read_weights(read_package(tmp_path / "out").artifact_path(), source.spec)
    for name in ("layers.0.wq.weight", "layers.1.down.weight"):
        np.testing.assert_allclose(held[name].decode(), source.tensors[name].decode(), rtol=2e-6, atol=1e-9)


def test_a_gguf_source(tmp_path: Path) -> None:
    result = export(write_tiny_gguf(tmp_path / "m.gguf", gain=1.0), output=tmp_path / "out", quant="int8")
    assert result.gate is not None
    assert result.gate.failures == ()
    assert_same_greedy_tokens(tmp_path / "out")


@pytest.mark.parametrize("rate", [0.15, 0.3])
def test_a_pruned_package_has_sizes_of_its_own_in_each_layer(llama: Path, rate: float, tmp_path: Path) -> None:
    result = edgeq.export(llama, profile=PROFILE, format="onnx", output=tmp_path / "out", quant="fp32", prune=rate)
    assert result.gate is not None
    assert result.gate.failures == ()
    assert result.plan.file_bytes == sum(artifact.bytes for artifact in result.artifacts)
    package = read_package(tmp_path / "out")
    assert package.manifest["export"]["removed_fraction"] >= rate
    assert folder_of(tmp_path / "out").name == f"llama-fp32-pruned{round(100 * rate)}"
    shapes = {(t.layer, t.role): t.shape for t in result.plan.tensors}
    assert sum(shapes[layer, "down"][1] + shapes[layer, "wo"][1] for layer in (0, 1)) < 2 * (160 + 128)
    assert_same_greedy_tokens(tmp_path / "out", 12)


@pytest.mark.parametrize(("name", "quant"), [("llama", "fp32"), ("llama", "int4"), ("phi3", "fp32"), ("smollm3", "fp32")])
def test_a_pruned_package_has_heads_of_its_own_in_each_layer(
    name: str, quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Head sizes by layer, and pairs of each KV head: what no GGUF file can say. onnxruntime-genai runs it as we do."""
    monkeypatch.setattr("edgeq.sorting._HEAD_COST", 0.5)  # so that heads of a model of noise go before its channels
    model = hf_folder(tmp_path / "model", name)
    result = edgeq.export(model, profile=PROFILE, format="onnx", output=tmp_path / "out", quant=quant, prune=0.3)
    assert result.gate is not None
    assert result.gate.failures == ()
    wo = [t.shape[1] for t in result.plan.tensors if t.role == "wo"]
    assert min(wo) < max(wo)
    assert any("KV heads turn pairs of their own" in note for note in result.plan.notes)
    assert read_package(tmp_path / "out").manifest["export"]["removed_fraction"] >= 0.3
    assert_same_greedy_tokens(tmp_path / "out", 12)


def test_heads_that_are_normalised_stay_whole(tmp_path: Path) -> None:
    model = hf_folder(tmp_path / "model", "qwen3")
    result = edgeq.export(model, profile=PROFILE, format="onnx", output=tmp_path / "out", quant="fp32", prune=0.3)
    assert {(t.shape[1] // 24) % 2 for t in result.plan.tensors if t.role == "wo"} == {0}
    dry = edgeq.export(model, profile=PROFILE, format="onnx", quant="fp32", prune=0.3, dry_run=True)
    assert any("cutting head, vo, qk: no; qwen3 normalises queries and keys over the whole head" in note for note in dry.plan.notes)


def test_adapters_are_merged(llama: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "sql"
    lora_folder(adapter, llama, seed=1)
    result = export(llama, output=tmp_path / "out", quant="fp32", adapters=[adapter])
    assert result.gate is not None
    assert result.gate.failures == ()
    (entry,) = read_package(tmp_path / "out").manifest["adapters"]
    assert (entry["name"], entry["disposition"]) == ("sql", "merge")
    plain = export(llama, output=tmp_path / "plain", quant="fp32", verify=False)
    assert plain.artifacts[1].sha256 != result.artifacts[1].sha256


def test_quants_of_gguf_are_unknown_to_onnx(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="unknown quantization 'Q4_K_M' for ONNX; known: fp32, fp16, int8"):
        export(llama, output=tmp_path / "out", quant="Q4_K_M")
    with pytest.raises(UnsupportedError, match="unknown quantization 'int4'; known: F32"):
        edgeq.export(llama, profile=PROFILE, output=tmp_path / "out", format="gguf", quant="int4")


def test_the_profile_chooses_the_format(llama: Path, tmp_path: Path) -> None:
    from edgeq.profiles import profile_names

    shipped = Path(edgeq.__file__).parent.parent / "device_profiles" / f"{PROFILE}.toml"
    assert PROFILE in profile_names()
    text = shipped.read_text(encoding="utf-8")
    (tmp_path / "mine.toml").write_text(text.replace('name = "llama.cpp"', 'name = "onnxruntime"'), encoding="utf-8")
    result = edgeq.export(llama, profile=tmp_path / "mine.toml", output=tmp_path / "out", elastic=False, verify=False)
    assert [artifact.format for artifact in result.artifacts] == ["onnx", "onnx"]
    assert result.plan.quant == "int4"
    again = edgeq.export(llama, profile=tmp_path / "mine.toml", format="gguf", dry_run=True, elastic=False)
    assert again.plan.quant == "Q4_0"


def test_a_model_that_does_not_fit_says_what_does(llama: Path, tmp_path: Path) -> None:
    text = (Path(edgeq.__file__).parent.parent / "device_profiles" / f"{PROFILE}.toml").read_text(encoding="utf-8")
    (tmp_path / "small.toml").write_text(text.replace("budget_mib = 8192", "budget_mib = 70"), encoding="utf-8")
    with pytest.raises(PlanError, match=r"int8 does not fit laptop-cpu: it needs .* the budget is 70 MiB .*No format in the profile's"):
        edgeq.export(llama, profile=tmp_path / "small.toml", format="onnx", quant="int8", dry_run=True)
    with pytest.raises(PlanError, match=r"int4 does not fit"):
        edgeq.export(llama, profile=tmp_path / "small.toml", format="onnx", dry_run=True)


def test_graphs_for_cuda_compute_in_float16(llama: Path) -> None:
    plan = edgeq.export(llama, profile="server-h100", format="onnx", quant="int4", dry_run=True).plan
    assert plan.memory.kv_type == "f16"
    assert {tensor.grid.name for tensor in plan.tensors if len(tensor.shape) == 1} == {"F16"}
    assert plan.memory.host_bytes > 0


def test_inspect_shows_the_package(package: Path, run: Any) -> None:
    status, out, _ = run("inspect", package, "--json")
    described = json.loads(out)
    assert status == 0
    assert described["export"]["format"] == "onnx"
    formats = {row["format"]: row for row in described["formats"]}
    assert formats.keys() == {"Q4_0", "Q8_0", "F32"}
    assert formats["Q4_0"]["bits_per_weight"] == 4.5
    folder = edgeq.inspect(folder_of(package))
    assert folder["kind"] == "onnx"
    assert folder["metadata"]["edgeq.quant"] == "int4"
    assert {row["format"] for row in folder["formats"]} == {"4 bits in blocks of 32", "8 bits in blocks of 32", "vectors and tables"}
    assert folder["sizes"]["computes_in"] == "f32"


def test_damaged_packages_are_refused(llama: Path, package: Path, tmp_path: Path) -> None:
    import shutil

    broken = shutil.copytree(package, tmp_path / "broken")
    data = next(broken.rglob("model.onnx.data"))
    values = bytearray(data.read_bytes())
    values[100] ^= 1
    data.write_bytes(values)
    with pytest.raises(PackageError, match=r"model\.onnx\.data does not match its hash"):
        edgeq.verify(broken)
    with pytest.raises(PackageError, match=r"model\.onnx\.data does not match its hash"):
        edgeq.load(broken)
