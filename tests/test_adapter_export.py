"""Adapters through the export, the cut and every command: what llama.cpp computes, against PEFT and against arithmetic spelled out."""

from __future__ import annotations

import functools
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from peft_folders import lora_folder
from real_llama import all_logits
from safetensors.numpy import load_file, save_file
from tiny import edit_json, hf_folder, hf_model
from tiny_quantized import bnb4, compressed, quantize

import edgeq
from edgeq import ports
from edgeq.adapter_records import package_adapters
from edgeq.converters.adapters.open import open_adapter
from edgeq.converters.sources.gguf import read_gguf_model
from edgeq.converters.sources.resolve import open_model
from edgeq.deltas.merge import merged
from edgeq.elastic import steps_for_rate
from edgeq.elastic_files import read_elastic
from edgeq.errors import AdapterError, PackageError, SourceError, UnsupportedError, UsageError
from edgeq.package import read_package
from edgeq.reference import Reference
from edgeq.reference_scores import TorchScores

# A short text, so that sorting and calibration are quick.
export = functools.partial(edgeq.export, profile="laptop-cpu", calibration=Path(__file__).parent / "data" / "multilingual.txt")
PROFILE = "laptop-cpu"
# Whole KV groups of 64 columns and an MLP of ten blocks: every port can be cut in Q8_0 as in F16.
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 320}
IDS = np.random.default_rng(3).integers(3, 260, 60).tolist()
N_CTX = 256
# Of root mean squares of logits: what llama.cpp is off by, relative to what the adapter changes. F16 has 11 bits, Q8_0 has 7, activations
# are rounded alike; seen were 0.002 and 0.05.
SHARE = {"F16": 0.005, "Q8_0": 0.1}
TOLERANCE = 1e-3  # of logits in F32: what the order of sums makes of numbers of order 1


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> folder of a tiny model."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def model(name):
        if name not in made:
            sizes = {**SIZES, "head_dim": 32} if name == "llama" else {}
            made[name] = hf_folder(folder / name, name, **sizes)
        return made[name]

    return model


@pytest.fixture(scope="module")
def sql(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "sql"
    lora_folder(folder, models("llama"), rank=4, seed=1, gain=0.3)
    return folder


@pytest.fixture(scope="module")
def poems(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "poems"
    lora_folder(folder, models("llama"), rank=3, seed=2, gain=0.3, targets=("q_proj", "down_proj"))
    return folder


@pytest.fixture(scope="module")
def package(models, sql, poems, tmp_path_factory):
    """Two adapters kept beside an elastic llama in Q8_0, one of them at half its strength."""
    out = tmp_path_factory.mktemp("packages") / "kept"
    result = export(models("llama"), output=out, quant="Q8_0", adapters=[sql, f"{poems}=verse:0.5"])
    assert result.gate.failures == ()
    return out


def torch_logits(model):
    return TorchScores(Reference(model.spec, model.tensors), [IDS], n_ctx=N_CTX).logits(0)


def float_logits(folder, *adapters):
    """Of the float model with adapters (path, scale) in its weights."""
    model = open_model(folder)
    return torch_logits(merged(model, [(open_adapter(path, model, name=f"a{i}"), scale) for i, (path, scale) in enumerate(adapters)]))


def llama_logits(package, adapter=None):
    opened = read_package(package)
    beside = None if adapter is None else opened.folder / package_adapters(opened)[adapter].path
    return all_logits([opened.artifact_path()], IDS, n_ctx=N_CTX, adapters=[beside])[0]


def off(one, other):
    return float(np.abs(one - other).max())


def rms(values):
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def share(found, expected, base):
    """How far outputs are off, relative to what the adapter changes."""
    return rms(found - expected) / rms(expected - base)


def peft_merge(model_folder, adapter_folder):
    """Logits of PEFT's own merge."""
    import torch

    peft = pytest.importorskip("peft")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        whole = peft.PeftModel.from_pretrained(hf_model(model_folder), adapter_folder).merge_and_unload()
        return whole(torch.tensor([IDS])).logits[0].float().numpy()


@pytest.mark.parametrize("quant", ["F16", "Q8_0"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_merged_and_kept_compute_what_peft_merges(name, quant, models, tmp_path):
    model = models(name)
    lora_folder(tmp_path / "tuned", model, rank=3, seed=5, gain=0.3)
    expected = peft_merge(model, tmp_path / "tuned")
    base = float_logits(model)
    assert off(expected, base) > 0.5, "the adapter must change something"
    assert off(expected, float_logits(model, (tmp_path / "tuned", 1.0))) < 1e-4
    for mode in ("merge", "keep"):
        settings = {
            "quant": quant,
            "adapters": [tmp_path / "tuned"],
            "adapter_mode": mode,
            "verify": name == "llama",
            "elastic": None if mode == "keep" else False,
        }
        result = export(model, output=tmp_path / mode, **settings)
        assert result.gate is None or result.gate.failures == ()
        found = llama_logits(tmp_path / mode, "tuned" if mode == "keep" else None)
        assert share(found, expected, base) < SHARE[quant], mode
        if mode == "keep":
            assert rms(llama_logits(tmp_path / mode) - base) < SHARE[quant] * rms(expected - base)
            if (name, quant) == ("llama", "F16"):
                assert result.gate.adapters["tuned"].kl_mean <= 2e-4


def test_the_manifest_records_both_dispositions(package, models, sql, tmp_path):
    opened = read_package(package)
    entries = {entry["name"]: entry for entry in opened.manifest["adapters"]}
    assert list(entries) == ["sql", "verse"]
    assert entries["sql"]["disposition"] == "keep"
    assert (entries["sql"]["rank"], entries["verse"]["rank"]) == (4, 3)
    assert (entries["sql"]["scale"], entries["verse"]["scale"]) == (1.0, 0.5)
    assert entries["sql"]["trained_on"] == "someone/tiny"
    assert entries["sql"]["path"] == "adapters/sql.gguf"
    assert entries["sql"]["base_sha256"] == opened.artifacts[0].sha256
    assert entries["sql"]["lost_energy"] == 0
    assert [file["path"] for file in entries["sql"]["files"]] == ["adapter_config.json", "adapter_model.safetensors"]
    merged_package = tmp_path / "merged"
    export(models("llama"), output=merged_package, quant="F16", adapters=[sql], adapter_mode="merge", verify=False)
    (entry,) = read_package(merged_package).manifest["adapters"]
    assert entry["disposition"] == "merge"
    assert "path" not in entry
    assert package_adapters(read_package(merged_package)) == {}
    assert edgeq.inspect(merged_package)["adapters"][0]["disposition"] == "merge"


def test_several_adapters_merge_in_order_at_their_scales(models, sql, poems, tmp_path):
    export(
        models("llama"),
        output=tmp_path / "out",
        quant="F32",
        elastic=False,
        adapters=[f"{sql}:0.5", f"{poems}=verse:2"],
        adapter_mode="merge",
        verify=False,
    )
    expected = float_logits(models("llama"), (sql, 0.5), (poems, 2.0))
    assert off(llama_logits(tmp_path / "out"), expected) < TOLERANCE
    assert off(expected, float_logits(models("llama"), (sql, 1.0), (poems, 1.0))) > 0.1


def test_a_scale_is_part_of_a_kept_adapter(package, models, poems):
    expected = float_logits(models("llama"), (poems, 0.5))
    assert share(llama_logits(package, "verse"), expected, float_logits(models("llama"))) < SHARE["Q8_0"]


def test_a_cut_with_its_adapter_is_the_cut_of_the_merged_model(models, sql, tmp_path):
    """In F32, and with a sort that compensates nothing: what is left is the order of sums."""
    settings = {"quant": "F32", "sort": "uniql", "adapters": [sql], "adapter_mode": "keep", "verify": False}
    export(models("llama"), output=tmp_path / "p", **settings)
    elastic = read_elastic(read_package(tmp_path / "p"))
    base = open_model(models("llama"))
    whole = merged(base, [(open_adapter(sql, base), 1.0)])
    spec, tensors = ports.apply(whole.spec, whole.tensors, elastic.orders)
    for rate in (0.0, 0.15, 0.25):
        cut = edgeq.cut(tmp_path / "p", output=tmp_path / f"{rate}.gguf", rate=rate, adapter="sql")
        assert cut.adapter_path == tmp_path / f"{rate}-sql.lora.gguf"
        small, left = ports.cut(spec, tensors, elastic.ladder.kept(steps_for_rate(elastic.ladder, rate)))
        expected = TorchScores(Reference(small, left), [IDS], n_ctx=N_CTX).logits(0)
        found, alone = all_logits([cut.path, cut.path], IDS, n_ctx=N_CTX, adapters=[cut.adapter_path, None])
        assert off(found, alone) > 0.5
        assert off(found, expected) < TOLERANCE, rate


def test_a_compensated_cut_with_its_adapter_is_near_that_of_the_merged_model(models, sql, tmp_path):
    """Sorted by sensitivity, a cut's down projections make up for what they lose, and so does the adapter's, but for the constant of its
    estimate, for which a LoRA has no place: 0.017 of what the adapter changes."""
    export(models("llama"), output=tmp_path / "p", quant="F32", adapters=[sql], adapter_mode="keep", verify=False)
    elastic = read_elastic(read_package(tmp_path / "p"))
    for rate in (0.15, 0.25):
        with edgeq.load(tmp_path / "p", rate=rate, adapter="sql", threads=1) as session:
            found = session.score(IDS)
            session.set_adapter(None)
            alone = session.score(IDS)
        expected = _compensated(models("llama"), sql, elastic, elastic.ladder.kept(steps_for_rate(elastic.ladder, rate)))
        assert off(found, alone) > 0.5
        assert share(found, expected, alone) < 0.05, rate


def _compensated(folder, adapter, elastic, kept):
    """Scores of the merged model cut and compensated in float."""
    from edgeq.compensation import compensate
    from edgeq.tensors import from_values

    base = open_model(folder)
    whole = merged(base, [(open_adapter(adapter, base), 1.0)])
    spec, tensors = ports.apply(whole.spec, whole.tensors, elastic.orders)
    small, left = ports.cut(spec, tensors, kept)
    for block in small.mlps:
        name = f"layers.{block.layer}.down"
        columns, bias = compensate(tensors[f"{name}.weight"].decode(), elastic.hidden[block.layer], block.n_ff)
        left[f"{name}.weight"] = from_values(columns, origin=name)
        left[f"{name}.bias"] = from_values(bias, origin=name)
    from dataclasses import replace

    logits = TorchScores(Reference(replace(small, biases=small.biases | {"down"}), left), [IDS], n_ctx=N_CTX).logits(0).astype(np.float64)
    scores = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return scores[np.arange(len(IDS) - 1), IDS[1:]]


def test_nf4_and_a_lora_merge_to_float64_arithmetic_on_the_dequantized_base(tmp_path):
    model = hf_folder(tmp_path / "m", "llama")
    changes = lora_folder(tmp_path / "a", model, seed=4, targets=("q_proj", "v_proj", "down_proj"))
    decoded = quantize(model, bnb4("nf4", nested=True))
    settings = {"quant": "F32", "elastic": False, "adapters": [tmp_path / "a"], "adapter_mode": "merge", "verify": False}
    export(model, output=tmp_path / "out", **settings)
    tensors = read_gguf_model(read_package(tmp_path / "out").artifact_path()).tensors
    names = {"self_attn.q_proj": "wq", "self_attn.v_proj": "wv", "self_attn.k_proj": "wk", "mlp.down_proj": "down"}
    for name, values in decoded.items():
        layer, module = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
        if module not in names:
            continue
        expected = values + changes.get(name, 0.0)
        assert (name in changes) == (module != "self_attn.k_proj")
        np.testing.assert_allclose(tensors[f"layers.{layer}.{names[module]}.weight"].decode(), expected, rtol=0, atol=2e-7)


def test_auto_keeps_what_a_merge_would_round_away(tmp_path, run):
    """A 4-bit checkpoint on the grid of Q4_0: kept, its codes stay; merged, they are rounded again, by more than a weak one moves them."""
    model = hf_folder(tmp_path / "m", "llama", intermediate_size=192)
    lora_folder(tmp_path / "weak", model, seed=1, gain=0.01)
    lora_folder(tmp_path / "strong", model, seed=1, gain=2.0)
    plain = export(model, quant="Q4_0", dry_run=True, elastic=False, adapters=[tmp_path / "weak"]).plan.adapters[0]
    assert plain.disposition == "merge", "a float base is rounded either way"
    assert plain.merge.noise == pytest.approx(plain.keep.noise, rel=0.1)
    quantize(model, compressed())
    command = ("export", model, "--profile", PROFILE, "--quant", "Q4_0", "--fixed", "--dry-run")
    status, out, _ = run(*command, "--adapter", tmp_path / "weak")
    assert status == 0
    assert "weak: keep; a merge would add rounding noise of" in out
    for shown in ("merge", "keep", "rounding noise", "slower", "lost energy"):
        assert shown in out
    status, out, _ = run(*command, "--adapter", tmp_path / "strong", "--json")
    (plan,) = json.loads(out)["plan"]["adapters"]
    assert plan["disposition"] == "merge"
    assert plan["keep"]["noise"] == 0
    assert 0 < plan["merge"]["noise"] < 0.05
    assert plan["keep"]["adapter_bytes"] > 0
    assert plan["keep"]["slowdown"] > 0
    assert "keeping makes tokens" in plan["reason"]


def test_what_has_no_factors_is_merged_by_auto_and_kept_only_approximately(models, tmp_path, run):
    peft = pytest.importorskip("peft")
    import torch

    torch.manual_seed(0)
    config = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        whole = peft.get_peft_model(hf_model(models("llama")), config)
        for parameter in whole.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
        whole.save_pretrained(tmp_path / "ia3")
    settings = {"quant": "F16", "adapters": [tmp_path / "ia3"]}
    (plan,) = export(models("llama"), dry_run=True, **settings).plan.adapters
    assert plan.disposition == "merge"
    assert "it cannot be kept (adapter 'ia3' cannot be kept as it is: IA3 changes layers.0.wk.weight in full rank" in plan.reason
    with pytest.raises(UnsupportedError, match=r"in full rank\. Merge the adapter instead .*--approx-rank 32"):
        export(models("llama"), output=tmp_path / "no", adapter_mode="keep", **settings)
    assert not (tmp_path / "no").exists()
    result = export(models("llama"), output=tmp_path / "near", adapter_mode="keep", approx_rank=40, **settings)
    assert result.gate.failures == (), "the gate compares with the factors, whose loss is stated"
    (entry,) = read_package(tmp_path / "near").manifest["adapters"]
    assert entry["rank"] == 40
    assert 0 < entry["lost_energy"] < 0.2
    wish = ("--adapter", tmp_path / "ia3", "--adapters", "keep", "--approx-energy", 0.99)
    status, out, _ = run("export", models("llama"), "--profile", PROFILE, "--dry-run", "--json", *wish)
    (kept,) = json.loads(out)["plan"]["adapters"]
    assert status == 0
    assert 0 < kept["keep"]["lost_energy"] <= 0.01


def test_every_command_takes_a_kept_adapter(package, tmp_path, run):
    (tmp_path / "t.txt").write_text("The harbour lights of the island were built between 1847 and 1902. " * 40)
    status, out, _ = run("cut", package, "-o", tmp_path / "s.gguf", "--rate", 0.2, "--adapter", "sql", "--json")
    assert status == 0
    assert json.loads(out)["adapter_path"] == str(tmp_path / "s-sql.lora.gguf")
    status, out, _ = run("cut", package, "-o", tmp_path / "b.gguf", "--budget", "1MB", "--adapter", "verse")
    assert f"Wrote {tmp_path / 'b-verse.lora.gguf'}" in out
    scores = {}
    for name, arguments in {
        "alone": [package],
        "sql": [package, "--adapter", "sql"],
        "cut": [package, "--adapter", "sql", "--rate", 0.2],
        "files": [tmp_path / "s.gguf", "--adapter", tmp_path / "s-sql.lora.gguf"],
    }.items():
        status, out, err = run("eval", *arguments, "--text", tmp_path / "t.txt", "--ctx", 64, "--chunks", 2, "--json")
        assert status == 0, err
        scores[name] = json.loads(out)["nll_mean"]
    assert scores["cut"] == scores["files"]
    assert len({round(value, 3) for value in scores.values()}) == 3
    short = ("--prompt-tokens", 4, "--gen-tokens", 4, "--repeat", 1, "--json")
    status, out, _ = run("bench", package, "--adapter", "sql", "--rates", "0,0.2", *short)
    rows = json.loads(out)
    assert [(row["adapter"], row["rate"]) for row in rows] == [("sql", 0.0), ("sql", 0.2)]
    assert all(row["adapter_switch_ms"] >= 0 for row in rows)
    generate = ("run", package, "-p", "The quick", "--max-tokens", 8)
    assert run(*generate)[1] != run(*generate, "--adapter", "sql")[1]
    status, out, _ = run("inspect", package)
    assert "adapters/verse.gguf" in out
    status, out, _ = run("verify", package, "--json")
    assert json.loads(out)["files"] == 6
    status, out, err = run("run", package, "-p", "x", "--adapter", "code")
    assert (status, out) == (2, "")
    assert "no adapter is named 'code': " in err
    assert "has 'sql', 'verse'" in err


def test_verify_finds_a_damaged_or_a_foreign_adapter(package, tmp_path):
    shutil.copytree(package, tmp_path / "p")
    path = tmp_path / "p/adapters/sql.gguf"
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    with pytest.raises(PackageError, match=r"sql\.gguf does not match its hash"):
        edgeq.verify(tmp_path / "p")
    shutil.copytree(package, tmp_path / "q")
    foreign = hf_folder(tmp_path / "other", "llama")
    lora_folder(tmp_path / "a", foreign)
    settings = {"quant": "F16", "adapters": [f"{tmp_path / 'a'}=sql"], "adapter_mode": "keep", "verify": False}
    export(foreign, output=tmp_path / "o", **settings)
    shutil.copy(tmp_path / "o/adapters/sql.gguf", tmp_path / "q/adapters/sql.gguf")
    record = read_package(tmp_path / "o").manifest["adapters"][0]
    edit_json(tmp_path / "q/manifest.json", lambda m: m["adapters"][0].update(bytes=record["bytes"], sha256=record["sha256"]))
    with pytest.raises(AdapterError, match="goes from 64 to 96 values"):
        edgeq.verify(tmp_path / "q")


def test_an_adapter_of_a_sorted_model_is_not_taken_for_one_of_the_model_itself(models, tmp_path):
    """qwen3 keeps its architecture when it is sorted, so only the fingerprint tells."""
    lora_folder(tmp_path / "a", models("qwen3"))
    settings = {"quant": "F16", "adapters": [tmp_path / "a"], "adapter_mode": "keep", "verify": False}
    export(models("qwen3"), output=tmp_path / "p", **settings)
    with pytest.raises(SourceError, match="was made for other weights than those of qwen3"):
        export(models("qwen3"), dry_run=True, adapters=[tmp_path / "p/adapters/a.gguf"])


def _state(change):
    def edit(folder):
        path = folder / "adapter_model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path)

    return edit


def _drop_half(state):
    del state["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]


def _nan(state):
    state["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][0, 0] = np.nan


def _alien(state):
    state["base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight"] = np.ones(3, np.float32)


def _wrong_rank(state):
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    state[key] = np.ascontiguousarray(state[key][:2])


def _rank_0(state):
    for key in list(state):
        state[key] = np.ascontiguousarray(state[key][:0] if "lora_A" in key else state[key][:, :0])


def _config(**values):
    return lambda folder: edit_json(folder / "adapter_config.json", lambda c: c.update(values))


def _pickle(folder):
    import pickle

    class Evil:
        def __reduce__(self):
            return (print, ("owned",))

    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))


def _link(folder):
    weights = folder / "adapter_model.safetensors"
    weights.replace(folder.parent / "elsewhere")
    weights.symlink_to("../elsewhere")


BAD = {
    "half a pair": (_state(_drop_half), "q_proj"),
    "not finite": (_state(_nan), "NaN"),
    "alien keys": (_state(_alien), "lora_C"),
    "wrong rank": (_state(_wrong_rank), "q_proj"),
    "rank 0": (_state(_rank_0), r"lora_A.weight has shape \[0, 64\]"),
    "pickle": (_pickle, "adapter_model.bin"),
    "other layers": (_config(layers_to_transform=[0]), "has tensors for model.layers.1"),
    "path escape": (_link, "adapter_model"),
    "no adapter": (lambda folder: [path.unlink() for path in folder.iterdir()], "is no adapter: expected a folder with"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_adapter_ends_the_export_with_its_own_message(case, models, sql, tmp_path, run):
    import re

    shutil.copytree(sql, tmp_path / "bad")
    break_it, message = BAD[case]
    break_it(tmp_path / "bad")
    status, out, err = run("export", models("llama"), "--profile", PROFILE, "-o", tmp_path / "out", "--adapter", tmp_path / "bad")
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert re.search(message, err), err
    assert "owned" not in err
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model_is_refused_with_the_first_mismatch(models, tmp_path, run):
    lora_folder(tmp_path / "a", models("qwen2"))
    status, out, err = run("export", models("llama"), "--profile", PROFILE, "-o", tmp_path / "out", "--adapter", tmp_path / "a")
    assert (status, out) == (1, "")
    assert "q_proj" in err or "layers.0.wq" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapters", "keep"], "--adapters says what to do with adapters: give at least one"),
        (["--adapter-rank", "2"], "--adapter-rank says what to do with adapters"),
        (["--other-base"], "--other-base says what to do with adapters"),
        (["--adapter", "SQL", "--approx-rank", "2", "--approx-energy", "0.5"], "two ways to say the same"),
        (["--adapter", "SQL", "--adapters", "merge", "--approx-rank", "2"], "a merge is exact"),
        (["--adapter", "SQL=a/b"], "must consist of letters"),
        (["--adapter", "SQL:inf"], "the scale inf is no strength"),
        (["--adapter", "SQL", "--adapters", "keep", "--prune", "0.2"], "cannot be kept beside a pruned package"),
    ],
)
def test_options_that_contradict_themselves(arguments, message, models, sql, tmp_path, run):
    given = [argument.replace("SQL", str(sql)) for argument in arguments]
    status, out, err = run("export", models("llama"), "--profile", PROFILE, "-o", tmp_path / "out", *given)
    assert (status, out) == (2, "")
    assert message in err
    assert not (tmp_path / "out").exists()


def test_two_adapters_of_one_name(models, sql):
    with pytest.raises(SourceError, match=r"two adapters are named 'sql'\. Give one of them another name: --adapter .*sql=NAME"):
        export(models("llama"), dry_run=True, adapters=[sql, sql])
    plan = export(models("llama"), dry_run=True, adapters=[sql, f"{sql}=other"]).plan
    assert [(adapter.name, adapter.disposition) for adapter in plan.adapters] == [("sql", "keep"), ("other", "keep")]


def test_a_name_unfit_for_a_file_is_refused_when_kept(models, sql, tmp_path):
    shutil.copytree(sql, tmp_path / "my adapter")
    with pytest.raises(UsageError, match="'my adapter' cannot be kept under that name"):
        export(models("llama"), dry_run=True, adapters=[tmp_path / "my adapter"], adapter_mode="keep")


def test_a_cut_that_fails_leaves_no_adapter_behind(package, tmp_path):
    (tmp_path / "small.gguf").write_text("mine")
    with pytest.raises(edgeq.EdgeqError):
        edgeq.cut(package, output=tmp_path / "small.gguf", rate=0.2, adapter="sql")
    assert [path.name for path in tmp_path.iterdir()] == ["small.gguf"]


def test_an_elastic_export_says_which_codes_it_rounds_again(tmp_path):
    model = hf_folder(tmp_path / "m", "llama", **SIZES, head_dim=32)
    quantize(model, compressed())
    elastic, fixed = (" ".join(export(model, quant="Q4_0", dry_run=True, elastic=wish).plan.notes) for wish in (True, False))
    assert "codes are rounded once more, because sorting moves its columns; so for 4 tensors in all. --fixed copies them." in elastic
    assert "rounded once more" not in fixed
