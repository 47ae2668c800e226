"""Elastic exports end to end on tiny models: what is written at rate 0, what a cut of it computes, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
from gguf import GGUFReader
from tiny import hf_folder

import edgeq
from edgeq.converters.sources.gguf import read_gguf_model
from edgeq.elastic import MAX_RATE
from edgeq.elastic_files import read_elastic
from edgeq.errors import UnsupportedError, UsageError
from edgeq.gguf_file import read_header
from edgeq.package import check_files, read_package

PROFILE = "laptop-cpu"
# Whole KV groups of 64 columns and an MLP of ten blocks: every port of a family can be cut in Q8_0 as in F16.
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 320}
LAYERED, ALIKE = ("llama", "qwen2", "phi3"), ("qwen3", "gemma3", "smollm3")


def exported(tmp_path, name, quant, **settings):
    model = hf_folder(tmp_path / "model", name, **settings.pop("sizes", {}))
    result = edgeq.export(model, profile=PROFILE, output=tmp_path / "out", quant=quant, **settings)
    return result, read_package(tmp_path / "out")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return hf_folder(tmp_path_factory.mktemp("models") / "llama", "llama", **SIZES, head_dim=32)


@pytest.fixture(scope="module")
def package(llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("packages") / "q8"
    edgeq.export(llama, profile=PROFILE, output=out, quant="Q8_0")
    return out


@pytest.mark.parametrize("name", LAYERED + ALIKE)
def test_every_family_is_elastic_and_its_cut_computes_what_it_holds(name, tmp_path):
    """In F16 the gate allows a mean KL of 0.0002 from the source at rate 0, and from the cut's own weights at a quarter."""
    result, package = exported(tmp_path, name, "F16")
    assert result.gate.failures == ()
    assert result.gate.cut_rate == 0.25
    assert result.gate.cut.thresholds.kl_mean <= 2e-4
    assert result.gate.cut.tokens > 200
    manifest = package.manifest
    assert manifest["export"]["elastic"] is True
    assert manifest["export"]["sort"] == "edgeq"
    assert manifest["model"]["architecture"] == ("deci" if name in LAYERED else name)
    expected = "per layer" if name in LAYERED else "all layers alike"
    assert {port: manifest["elastic"]["cuttable"][port]["freedom"] for port in ("ffn", "kv_group")} == dict.fromkeys(
        ("ffn", "kv_group"), expected
    )
    sizes = manifest["elastic"]["sizes"]
    assert [size["rate"] for size in sizes] == [0.05, 0.15, 0.25, 0.35]
    assert all(size["removed_fraction"] >= size["rate"] for size in sizes)
    assert [size["bytes"] for size in sizes] == sorted((size["bytes"] for size in sizes), reverse=True)
    assert sizes[0]["bytes"] < package.artifacts[0].bytes
    check_files(package)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_large_heads_are_cut_as_well_and_the_file_is_as_planned(name, tmp_path):
    """Heads of 128 may become 96 or 64 in blocks of 32. Their pairs are sorted, which takes rotary divisors that a plan cannot know of."""
    sizes = {"head_dim": 128} if name == "llama" else {"hidden_size": 512, "intermediate_size": 96}
    result, package = exported(tmp_path, name, "Q8_0", sizes=sizes)
    assert result.gate.failures == ()
    ladder = read_elastic(package).ladder
    heads = [step for step in ladder.steps if step.port == "head"]
    assert heads
    assert {step.stop for step in heads} <= {96, 64}
    assert package.manifest["elastic"]["cuttable"]["head"]["freedom"] == "all layers alike"
    assert result.plan.file_bytes == package.artifacts[0].bytes
    steps = ladder.steps.index(heads[0]) + 1
    edgeq.cut(package.folder, output=tmp_path / "cut.gguf", rate=min(MAX_RATE, ladder.removed_fraction(steps)))
    cut = read_gguf_model(tmp_path / "cut.gguf")
    assert cut.spec.attention[0].head_dim == heads[0].stop


def test_the_sizes_in_the_manifest_are_those_of_cuts(package, tmp_path):
    for size in read_package(package).manifest["elastic"]["sizes"]:
        target = tmp_path / f"{size['rate']}.gguf"
        edgeq.cut(package, output=target, rate=size["rate"])
        assert target.stat().st_size == size["bytes"]


def test_at_rate_0_an_elastic_file_holds_the_weights_of_a_fixed_one_in_another_order(llama, tmp_path):
    """In F32, so that encoding changes nothing: every matrix has the same values, and columns or rows of it have moved together."""
    for name, elastic in (("elastic", True), ("fixed", False)):
        edgeq.export(llama, profile=PROFILE, output=tmp_path / name, quant="F32", elastic=elastic, verify=False)
    moved, plain = (read_gguf_model(read_package(tmp_path / name).artifact_path()).tensors for name in ("elastic", "fixed"))
    assert moved.keys() == plain.keys()
    changed = {name for name in moved if not np.array_equal(moved[name].decode(), plain[name].decode())}
    assert {"layers.0.down.weight", "layers.1.up.weight"} <= changed
    assert all(name.split(".")[2] in ("wq", "wk", "wv", "wo", "gate", "up", "down") for name in changed)
    order = read_elastic(read_package(tmp_path / "elastic")).orders[1]
    np.testing.assert_array_equal(moved["layers.0.down.weight"].decode(), plain["layers.0.down.weight"].decode()[:, order])
    np.testing.assert_array_equal(moved["layers.0.gate.weight"].decode(), plain["layers.0.gate.weight"].decode()[order])


def test_sort_none_keeps_the_order_of_the_source(llama, tmp_path):
    for name, settings in (("natural", {"elastic": True, "sort": "none"}), ("fixed", {"elastic": False})):
        edgeq.export(llama, profile=PROFILE, output=tmp_path / name, quant="F16", verify=False, **settings)
    natural, fixed = (GGUFReader(read_package(tmp_path / name).artifact_path()).tensors for name in ("natural", "fixed"))
    for a, b in zip(natural, fixed, strict=True):
        assert a.name == b.name
        np.testing.assert_array_equal(a.data, b.data)
    manifest = read_package(tmp_path / "natural").manifest
    assert manifest["export"]["sort"] == "none"
    assert manifest["elastic"]["sizes"][3]["removed_fraction"] >= MAX_RATE


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_sort_uniql_cuts_widths_alone_and_compensates_nothing(name, tmp_path):
    result, package = exported(tmp_path, name, "Q8_0", sort="uniql")
    assert result.gate.passed
    elastic = read_elastic(package)
    assert {step.port for step in elastic.ladder.steps} == {"ffn"}
    assert not elastic.hidden
    order = elastic.orders[1]
    assert sorted(order.tolist()) == list(range(160))
    assert order.tolist() != list(range(160))
    edgeq.cut(package.folder, output=tmp_path / "cut.gguf", rate=0.3)
    assert "blk.0.ffn_down.bias" not in read_header(tmp_path / "cut.gguf").tensors


def test_the_same_inputs_give_the_same_bytes(llama, package, tmp_path):
    edgeq.export(llama, profile=PROFILE, output=tmp_path / "again", quant="Q8_0")
    names = sorted(path.name for path in package.iterdir())
    assert {"elastic.json", "elastic.npz", "manifest.json"} <= set(names)
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (package / name).read_bytes(), name


def test_a_dry_run_foretells_the_file_exactly_and_its_cuts_nearly(llama, package):
    """Before sorting, all parts are taken to matter the same: what is left of a size then differs by which matrices went."""
    plan = edgeq.export(llama, profile=PROFILE, quant="Q8_0", dry_run=True).plan
    found = read_package(package)
    assert plan.file_bytes == found.artifacts[0].bytes
    real = found.manifest["elastic"]["sizes"]
    assert [size.rate for size in plan.cut_sizes] == [size["rate"] for size in real]
    for guess, size in zip(plan.cut_sizes, real, strict=True):
        assert guess.bytes == pytest.approx(size["bytes"], rel=0.06)
    assert edgeq.export(llama, profile=PROFILE, quant="Q8_0", elastic=False, dry_run=True).plan.cut_sizes == ()


def test_a_source_in_the_same_grid_is_encoded_again_only_where_columns_move(llama, package, tmp_path):
    """Its other matrices move in whole rows, as bytes."""
    edgeq.export(llama, profile=PROFILE, output=tmp_path / "fixed", quant="Q8_0", elastic=False, verify=False)
    source = read_package(tmp_path / "fixed").artifact_path()
    result = edgeq.export(source, profile=PROFILE, output=tmp_path / "out", quant="Q8_0")
    assert result.gate.passed
    assert {tensor.role for tensor in result.plan.tensors if tensor.action == "encode"} == {"wo", "down"}
    assert {tensor.source_grid.name for tensor in result.plan.tensors if tensor.role == "down"} == {"Q8_0"}


def test_output_projections_get_smaller_blocks_where_a_kv_head_does_not_divide(tmp_path):
    """Two query heads of 64 read 128 columns of a projection that Q4_K packs in blocks of 256."""
    model = hf_folder(
        tmp_path / "m", "llama", hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=1024
    )
    plan = edgeq.export(model, profile=PROFILE, quant="Q4_K", dry_run=True).plan
    grids = {tensor.role: tensor.grid.name for tensor in plan.tensors}
    assert (grids["wo"], grids["wq"], grids["down"]) == ("Q5_0", "Q4_K", "Q4_K")
    assert any("blk.0.attn_output.weight: Q5_0 in place of Q4_K" in note for note in plan.notes)
    assert not any(note.startswith("cutting kv_group") for note in plan.notes)
    fixed = edgeq.export(model, profile=PROFILE, quant="Q4_K", elastic=False, dry_run=True).plan
    assert {tensor.grid.name for tensor in fixed.tensors if tensor.role == "wo"} == {"Q4_K"}


def test_a_kv_head_that_fits_no_blocks_stays_and_the_plan_says_so(tmp_path):
    plan = edgeq.export(hf_folder(tmp_path / "m", "llama"), profile=PROFILE, quant="Q8_0", dry_run=True).plan
    [note] = [note for note in plan.notes if "kv_group" in note]
    assert note == (
        "cutting kv_group: no; the query heads of one kv head read 48 columns of blk.0.attn_output.weight, which do not divide into Q8_0 "
        "blocks of 32."
    )


def test_a_model_of_two_wide_blocks_becomes_one_of_one_size_unless_elastic_is_asked_for(tmp_path):
    """In Q4_K an MLP of 256 channels is one block: nothing of it can go."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64, "intermediate_size": 256}
    model = hf_folder(tmp_path / "m", "qwen3", **sizes)
    plan = edgeq.export(model, profile=PROFILE, quant="Q4_K", dry_run=True).plan
    assert plan.cut_sizes == ()
    assert any(note.startswith("a package of one size, because it cannot be cut: ") for note in plan.notes)
    for settings in ({"elastic": True}, {"prune": 0.1}, {"sort": "edgeq"}):
        with pytest.raises(UnsupportedError, match=r"m cannot be cut in this form: .*Export this model with --fixed"):
            edgeq.export(model, profile=PROFILE, quant="Q4_K", dry_run=True, **settings)


def test_contradicting_wishes_are_usage_errors(llama):
    for settings, message in (
        ({"prune": 0.2, "elastic": True}, "give --elastic or --prune, not both"),
        ({"prune": 0.4}, r"a rate of 0.4 to prune is outside 0 to 0.35"),
        ({"prune": -0.1}, r"a rate of -0.1 to prune is outside"),
        ({"elastic": False, "sort": "edgeq"}, r"--sort edgeq orders what is cut: leave it out with --fixed"),
    ):
        with pytest.raises(UsageError, match=message):
            edgeq.export(llama, profile=PROFILE, dry_run=True, **settings)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_pruned_package_is_cut_and_compensated_before_it_is_rounded(name, tmp_path):
    result, package = exported(tmp_path, name, "F16", prune=0.2)
    assert result.gate.failures == ()
    assert result.gate.cut is None
    export = package.manifest["export"]
    assert (export["elastic"], export["rate"], export["sort"]) == (False, 0.2, "edgeq")
    assert export["removed_fraction"] >= 0.2
    assert "elastic" not in package.manifest
    assert package.artifacts[0].path.endswith("-F16-pruned20.gguf")
    whole = edgeq.export(tmp_path / "model", profile=PROFILE, quant="F16", elastic=False, dry_run=True).plan
    assert result.plan.file_bytes == package.artifacts[0].bytes < 0.9 * whole.file_bytes
    names = read_header(package.artifact_path()).tensors
    assert ("blk.0.ffn_down.bias" in names) == (name != "qwen3"), "what lost channels do on average, where the architecture has a place"
    with edgeq.load(package.folder) as session:
        assert np.isfinite(session.score(list(range(3, 40)))).all()


def test_pruning_in_float_equals_the_cut_of_an_elastic_file_in_float(llama, tmp_path):
    """The same order, the same channels and the same compensation, computed on both sides in float32."""
    edgeq.export(llama, profile=PROFILE, output=tmp_path / "pruned", quant="F32", prune=0.25, verify=False)
    edgeq.export(llama, profile=PROFILE, output=tmp_path / "elastic", quant="F32", verify=False)
    edgeq.cut(tmp_path / "elastic", output=tmp_path / "cut.gguf", rate=0.25)
    pruned, cut = (read_gguf_model(path) for path in (read_package(tmp_path / "pruned").artifact_path(), tmp_path / "cut.gguf"))
    assert replace(pruned.spec, biases=cut.spec.biases) == cut.spec
    for name in cut.tensors:
        # Side files hold factors in half precision.
        np.testing.assert_allclose(pruned.tensors[name].decode(), cut.tensors[name].decode(), atol=2e-3, err_msg=name)


def test_inspect_tells_what_can_be_cut(llama, package):
    described = edgeq.inspect(package)
    assert [row["rate"] for row in described["cuts"]] == [0.05, 0.15, 0.25, 0.35]
    assert {row["port"]: row["cut"] for row in described["cuttable"]}["ffn"] == "per layer"
    for path in (llama, read_package(package).artifact_path()):
        ports = {row["port"]: row for row in edgeq.inspect(path)["cuttable"]}
        assert ports["kv_group"]["cut"] == "per layer"
        assert ports["head"]["cut"] == "no"
        assert "flash attention" in ports["head"]["reason"]
    assert json.dumps(described)


def test_a_cut_of_other_sizes_than_its_ladder_says_fails_the_gate(llama, tmp_path, monkeypatch):
    """Set up once the plan is made, so that only the gate expects other sizes."""

    def expect_the_whole(plan):
        monkeypatch.setattr("edgeq.ports.with_sizes", lambda spec, kept: spec)

    result = edgeq.export(llama, profile=PROFILE, output=tmp_path / "out", quant="F16", on_plan=expect_the_whole)
    assert result.gate.failures == ("cut by 25%: it has other sizes than its ladder says",)
    assert read_package(tmp_path / "out").status == "failed"
