"""`edgeq adapters`: inspect, convert and squeeze, and their files in llama.cpp and PEFT."""

from __future__ import annotations

import json
import shutil
import warnings

import numpy as np
import pytest
from peft_folders import lora_folder
from real_llama import all_logits
from tiny import hf_folder, hf_model

import edgeq
from edgeq.converters.adapters.open import open_adapter
from edgeq.converters.sources.resolve import open_model
from edgeq.deltas.merge import merged
from edgeq.package import read_package
from edgeq.reference import Reference
from edgeq.reference_scores import TorchScores

IDS = np.random.default_rng(3).integers(3, 260, 40).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return hf_folder(tmp_path_factory.mktemp("models") / "phi3", "phi3")


@pytest.fixture(scope="module")
def sql(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "sql"
    lora_folder(folder, model, rank=8, seed=1, gain=0.3)
    return folder


def float_logits(model, adapter):
    base = open_model(model)
    whole = base if adapter is None else merged(base, [(open_adapter(adapter, base), 1.0)])
    return TorchScores(Reference(whole.spec, whole.tensors), [IDS], n_ctx=256).logits(0)


def test_inspect_tells_what_each_way_would_do(model, sql, run):
    status, out, err = run("adapters", "inspect", sql, "--base", model, "--json")
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert (document["kind"], document["base"], document["ranks"]) == ("LORA", "someone/tiny", {"8": 14})
    assert document["merge"]["how"] == document["keep"]["how"] == document["squeeze"]["how"] == "exact"
    assert document["base_fingerprint"].startswith("1:")
    status, out, _ = run("adapters", "inspect", sql, "--base", model)
    assert "wq.weight" in out and "someone/tiny" in out
    status, out, err = run("adapters", "inspect", sql, "--base", model.parent / "nothing")
    assert status == 1


def test_inspect_without_a_base_tells_what_the_files_say(model, sql, run, tmp_path):
    status, out, _ = run("adapters", "inspect", sql, "--json")
    document = json.loads(out)
    assert (status, document["kind"], document["config"]["r"]) == (0, "LORA", 8)
    assert {"name": "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight", "shape": [8, 160]} in document["tensors"]
    assert "Name the model with --base" in run("adapters", "inspect", sql)[1]
    run("adapters", "convert", sql, "--base", model, "-o", tmp_path / "sql.gguf")
    document = json.loads(run("adapters", "inspect", tmp_path / "sql.gguf", "--json")[1])
    assert (document["architecture"], document["alpha"]) == ("phi3", 8.0)
    assert {"name": "blk.0.ffn_down.weight", "shape": [96, 160], "rank": 8} in document["tensors"]
    status, _, err = run("adapters", "inspect", tmp_path)
    assert status == 1
    assert "only PEFT folders and .gguf files describe themselves. Name its model with --base." in err


def test_a_converted_adapter_runs_in_llama_cpp_and_in_peft(model, sql, run, tmp_path):
    edgeq.export(model, profile="laptop-cpu", output=tmp_path / "p", quant="F32", elastic=False, verify=False)
    status, out, _ = run("adapters", "convert", sql, "--base", model, "-o", tmp_path / "sql.gguf", "--format", "F32")
    assert status == 0
    assert "rank 8 before, 8 now" in out
    base = read_package(tmp_path / "p").artifact_path()
    found, plain = all_logits([base, base], IDS, n_ctx=256, adapters=[tmp_path / "sql.gguf", None])
    expected = float_logits(model, sql)
    assert np.abs(found - plain).max() > 0.5
    assert np.abs(found - expected).max() < 1e-3
    assert run("adapters", "convert", tmp_path / "sql.gguf", "--base", model, "-o", tmp_path / "folder")[0] == 0
    np.testing.assert_allclose(peft_logits(model, tmp_path / "folder"), expected, atol=1e-3)
    status, _, err = run("adapters", "convert", sql, "--base", model, "-o", tmp_path / "sql.gguf")
    assert status == 1
    assert "exists and is kept" in err


def peft_logits(model, adapter):
    import torch

    peft = pytest.importorskip("peft")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        whole = peft.PeftModel.from_pretrained(hf_model(model), adapter)
        return whole(torch.tensor([IDS])).logits[0].float().numpy()


def test_squeezing_keeps_less_and_says_what_is_lost(model, sql, run, tmp_path):
    squeeze = ("adapters", "squeeze", sql, "--base", model)
    document = json.loads(run(*squeeze, "-o", tmp_path / "r2", "--rank", 2, "--json")[1])
    assert {module["rank"] for module in document["modules"].values()} == {2.0}
    assert "model.layers.0.self_attn.qkv_proj" in document["modules"]
    assert 0 < document["lost_energy"] < 0.9
    weak, whole, base = peft_logits(model, tmp_path / "r2"), float_logits(model, sql), float_logits(model, None)
    assert 0.05 < np.linalg.norm(weak - whole) / np.linalg.norm(whole - base) < 1
    document = json.loads(run(*squeeze, "-o", tmp_path / "e", "--energy", 0.9, "--json")[1])
    assert document["lost_energy"] <= 0.1001
    document = json.loads(run(*squeeze, "-o", tmp_path / "b.gguf", "--budget", "12kB", "--json")[1])
    assert document["bytes"] < 18_000
    assert run(*squeeze, "-o", tmp_path / "q.gguf", "--bits", 8)[0] == 0
    document = json.loads(run(*squeeze, "-o", tmp_path / "codes", "--bits", 4, "--json")[1])
    assert 0 < document["lost_energy"] < 0.1
    assert run("adapters", "convert", tmp_path / "codes", "--base", model, "-o", tmp_path / "floats")[0] == 0
    np.testing.assert_allclose(peft_logits(model, tmp_path / "floats"), float_logits(model, tmp_path / "codes"), atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["squeeze", "SQL", "--base", "MODEL", "-o", "OUT", "--rank", "2", "--energy", "0.5"], 2, "three ways to say how much to keep"),
        (["squeeze", "SQL", "--base", "MODEL", "-o", "OUT.gguf", "--bits", "4"], 2, "llama.cpp has no adapters of 4 bits"),
        (["squeeze", "SQL", "--base", "MODEL", "-o", "OUT", "--budget", "10"], 1, "keeps nothing"),
        (["convert", "SQL", "--base", "MODEL", "-o", "OUT", "--approx-rank", "2", "--approx-energy", "0.5"], 2, "two ways to say the same"),
        (["convert", "SQL", "--base", "MODEL", "-o", "OUT", "--adapter-rank", "99"], 1, "rank 99 was asked of an adapter of rank 8."),
    ],
)
def test_requests_that_make_no_sense(arguments, status, message, model, sql, tmp_path, run):
    named = {"SQL": sql, "MODEL": model, "OUT": tmp_path / "out", "OUT.gguf": tmp_path / "out.gguf"}
    found, out, err = run("adapters", *(named.get(argument, argument) for argument in arguments))
    assert (found, out) == (status, "")
    assert message in err
    assert not list(tmp_path.iterdir())


def test_an_adapter_for_other_weights_needs_other_base(model, sql, run, tmp_path):
    run("adapters", "convert", sql, "--base", model, "-o", tmp_path / "sql.gguf")
    other = hf_folder(tmp_path / "other", "phi3", seed=7)
    shutil.copy(tmp_path / "sql.gguf", tmp_path / "copy.gguf")
    convert = ("adapters", "convert", tmp_path / "copy.gguf", "--base", other, "-o", tmp_path / "again.gguf")
    status, _, err = run(*convert)
    assert status == 1
    assert "was made for other weights than those of other, though its shapes fit. Use its own base model, or --other-base" in err
    assert run(*convert, "--other-base")[0] == 0
