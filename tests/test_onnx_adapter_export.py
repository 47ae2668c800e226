"""Adapters kept beside ONNX graphs, through the export and every command: against arithmetic spelled out, and in other loaders."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from onnx_folders import genai_tokens
from peft_folders import lora_folder
from tiny import hf_folder

import edgeq
from edgeq import ports
from edgeq.adapter_records import package_adapters
from edgeq.compensation import compensate
from edgeq.converters.adapters.open import open_adapter
from edgeq.converters.onnx.read import read_weights
from edgeq.converters.sources.resolve import open_model
from edgeq.deltas.merge import merged
from edgeq.elastic import steps_for_rate
from edgeq.elastic_files import read_elastic
from edgeq.errors import AdapterError, PackageError, RuntimeFailure, UsageError
from edgeq.model import Model
from edgeq.onnx_adapter_file import read_onnx_adapter
from edgeq.package import read_package
from edgeq.reference import Reference
from edgeq.reference_scores import TorchScores
from edgeq.runtime.onnx_adapters import OnnxAdapter
from edgeq.runtime.onnx_context import OnnxContext
from edgeq.runtime.onnx_facts import facts_of
from edgeq.runtime.onnx_file import read_onnx
from edgeq.runtime.onnx_model import OnnxModel
from edgeq.runtime.onnx_places import without_places
from edgeq.tensors import from_values

export = functools.partial(
    edgeq.export, profile="laptop-cpu", format="onnx", calibration=Path(__file__).parent / "data" / "multilingual.txt", n_ctx=128
)
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 320,
    "head_dim": 32,
}
IDS = np.random.default_rng(3).integers(3, 260, 60).tolist()
TOLERANCE = 1e-4  # of logits of order 1 in fp32
PROMPT = "the quick brown fox"

Scores = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_folder(tmp_path_factory.mktemp("models") / "llama", "llama", **SIZES)


@pytest.fixture(scope="module")
def sql(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("adapters") / "sql"
    lora_folder(folder, llama, rank=4, seed=1, gain=0.3)
    return folder


@pytest.fixture(scope="module")
def poems(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("adapters") / "poems"
    lora_folder(folder, llama, rank=3, seed=2, gain=0.3, targets=("q_proj", "down_proj"))
    return folder


@pytest.fixture(scope="module")
def package(llama: Path, sql: Path, poems: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of different ranks beside an elastic graph in fp32, one of them at half its strength."""
    out: Path = tmp_path_factory.mktemp("packages") / "kept"
    result = export(llama, output=out, quant="fp32", adapters=[sql, f"{poems}=verse:0.5"], adapter_mode="keep")
    assert result.gate is not None
    assert result.gate.failures == ()
    assert set(result.gate.adapters) == {"sql", "verse"}
    return out


def float_scores(model: Model) -> Scores:
    logits = TorchScores(Reference(model.spec, model.tensors), [IDS], n_ctx=128).logits(0).astype(np.float64)
    scores = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    found: Scores = scores[np.arange(len(IDS) - 1), IDS[1:]]
    return found


def with_adapters(folder: Path, *adapters: tuple[Path, float]) -> Model:
    """The float model with adapters in its weights."""
    model = open_model(folder)
    return merged(model, [(open_adapter(path, model, name=f"a{i}"), scale) for i, (path, scale) in enumerate(adapters)])


def off(one: Scores, other: Scores) -> float:
    return float(np.abs(one - other).max())


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "qwen3", "phi3-longrope", "gemma3", "smollm3"])
def test_every_family_computes_what_a_merge_computes(name: str, tmp_path: Path) -> None:
    model = hf_folder(tmp_path / "model", name)
    lora_folder(tmp_path / "tuned", model, rank=3, seed=5, gain=0.3)
    result = export(model, output=tmp_path / "out", quant="fp32", elastic=False, adapters=[tmp_path / "tuned"], adapter_mode="keep")
    assert result.gate is not None
    assert result.gate.failures == ()
    expected, base = float_scores(with_adapters(model, (tmp_path / "tuned", 1.0))), float_scores(open_model(model))
    assert off(expected, base) > 0.3, "the adapter must change something"
    with edgeq.load(tmp_path / "out", adapter="tuned", threads=1) as session:
        assert off(session.score(IDS), expected) < TOLERANCE
        session.set_adapter(None)
        assert off(session.score(IDS), base) < TOLERANCE


@pytest.mark.parametrize(("quant", "tolerance"), [("int8", 0.02), ("int4", 0.1), ("fp16", 0.02)])
def test_beside_codes_an_adapter_adds_what_it_adds_beside_floats(
    quant: str, tolerance: float, llama: Path, sql: Path, tmp_path: Path
) -> None:
    """As the float model with the graph's own weights: what is left is rounding of activations. Relative to what the adapter changes."""
    export(llama, output=tmp_path / "out", quant=quant, elastic=False, adapters=[sql], adapter_mode="keep")
    model = open_model(llama)
    decoded = read_weights(read_package(tmp_path / "out").artifact_path(), model.spec)
    base = dataclasses.replace(model, tensors=decoded)
    expected, alone = float_scores(merged(base, [(open_adapter(sql, model, name="sql"), 1.0)])), float_scores(base)
    with edgeq.load(tmp_path / "out", adapter="sql", threads=1) as session:
        found = session.score(IDS)
    change = float(np.sqrt(np.mean((expected - alone) ** 2)))
    assert float(np.sqrt(np.mean((found - expected) ** 2))) < tolerance * change


def test_adapters_are_switched_mixed_and_left_out(package: Path, llama: Path, sql: Path, poems: Path) -> None:
    choices: list[tuple[Any, list[tuple[Path, float]]]] = [
        ("sql", [(sql, 1.0)]),
        ("verse", [(poems, 0.5)]),
        ({"sql": 0.5, "verse": 2.0}, [(sql, 0.5), (poems, 1.0)]),
        (None, []),
        ("sql", [(sql, 1.0)]),
    ]
    with edgeq.load(package, threads=1) as session:
        for choice, adapters in choices:
            session.set_adapter(choice)
            assert off(session.score(IDS), float_scores(with_adapters(llama, *adapters))) < TOLERANCE, choice
        session.set_adapter(None)
        plain = session.generate(PROMPT, max_tokens=16).tokens
        session.set_adapter("sql")
        tuned = session.generate(PROMPT, max_tokens=16).tokens
    assert plain != tuned
    with edgeq.load(package, adapter="sql", threads=1) as session:
        assert session.generate(PROMPT, max_tokens=16).tokens == tuned


def test_a_small_budget_serves_adapters_one_after_another(package: Path) -> None:
    largest = max(record.bytes for record in package_adapters(read_package(package)).values())
    with edgeq.load(package, adapter_budget=largest, threads=1) as session:
        for _ in range(2):
            for name in ("sql", "verse"):
                session.set_adapter(name)
                session.generate(PROMPT, max_tokens=2)
        assert session._active.pool.stats.peak_bytes <= largest
        assert session._active.pool.stats.evictions >= 2
        with pytest.raises(AdapterError, match="budget"):
            session.set_adapter({"sql": 1.0, "verse": 1.0})


def test_onnxruntime_itself_takes_the_file(package: Path, llama: Path, sql: Path) -> None:
    """By its own LoraAdapter, given with a run."""
    opened = read_package(package)
    graph = opened.artifact_path()
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    feed: dict[str, Any] = {"input_ids": np.array([IDS]), "attention_mask": np.ones((1, len(IDS)), dtype=np.int64)}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            feed[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), dtype=np.float32)
    adapter = ort.LoraAdapter()
    adapter.Load(str(package / package_adapters(opened)["sql"].path))
    run = ort.RunOptions()
    run.add_active_adapter(adapter)
    logits = session.run(["logits"], feed, run)[0][0].astype(np.float64)
    scores = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert off(scores[np.arange(len(IDS) - 1), IDS[1:]], float_scores(with_adapters(llama, (sql, 1.0)))) < TOLERANCE


def test_onnxruntime_genai_takes_the_file(package: Path) -> None:
    opened = read_package(package)
    folder = opened.artifact_path().parent
    with edgeq.load(package, threads=1) as session:
        ids = session.model.tokenize(PROMPT, add_special=True)
        plain = session.generate(ids, max_tokens=12).tokens
        session.set_adapter("sql")
        tuned = session.generate(ids, max_tokens=12).tokens
    assert plain != tuned
    assert genai_tokens(folder, ids, 12) == list(plain)
    assert genai_tokens(folder, ids, 12, adapter=package / package_adapters(opened)["sql"].path) == list(tuned)


def test_a_cut_with_its_adapter_is_the_cut_of_the_merged_model(llama: Path, sql: Path, tmp_path: Path) -> None:
    """In fp32, and with a sort that compensates nothing: what is left is the order of sums."""
    export(llama, output=tmp_path / "p", quant="fp32", sort="uniql", adapters=[sql], adapter_mode="keep", verify=False)
    elastic = read_elastic(read_package(tmp_path / "p"))
    whole = with_adapters(llama, (sql, 1.0))
    spec, tensors = ports.apply(whole.spec, whole.tensors, elastic.orders)
    for rate in (0.0, 0.15, 0.25):
        cut = edgeq.cut(tmp_path / "p", output=tmp_path / f"{rate}", rate=rate, adapter="sql")
        assert cut.adapter_path == tmp_path / f"{rate}-sql.onnx_adapter"
        small, left = ports.cut(spec, tensors, elastic.ladder.kept(steps_for_rate(elastic.ladder, rate)))
        expected = float_scores(dataclasses.replace(whole, spec=small, tensors=left))
        with edgeq.load(tmp_path / f"{rate}", threads=1) as session:
            alone = session.score(IDS)
            session.set_adapter(session.load_adapter(cut.adapter_path))
            found = session.score(IDS)
        assert off(found, alone) > 0.3
        assert off(found, expected) < TOLERANCE, rate
        with edgeq.load(tmp_path / "p", rate=rate, adapter="sql", threads=1) as session:
            assert off(session.score(IDS), found) < 1e-6


def test_a_compensated_cut_with_its_adapter_is_near_that_of_the_merged_model(package: Path, llama: Path, sql: Path) -> None:
    """But for the constant of the estimate of what is lost, for which a LoRA has no place."""
    elastic = read_elastic(read_package(package))
    whole = with_adapters(llama, (sql, 1.0))
    spec, tensors = ports.apply(whole.spec, whole.tensors, elastic.orders)
    with edgeq.load(package, adapter="sql", threads=1) as session:
        for rate in (0.15, 0.25):
            session.set_rate(rate)
            session.set_adapter("sql")
            found = session.score(IDS)
            session.set_adapter(None)
            alone = session.score(IDS)
            small, left = ports.cut(spec, tensors, elastic.ladder.kept(steps_for_rate(elastic.ladder, rate)))
            for block in small.mlps:
                name = f"layers.{block.layer}.down"
                columns, bias = compensate(tensors[f"{name}.weight"].decode(), elastic.hidden[block.layer], block.n_ff)
                left |= {f"{name}.weight": from_values(columns, origin=name), f"{name}.bias": from_values(bias, origin=name)}
            biased = dataclasses.replace(small, biases=small.biases | {"down"})
            expected = float_scores(dataclasses.replace(whole, spec=biased, tensors=left))
            assert off(found, alone) > 0.3
            change = np.sqrt(np.mean((expected - alone) ** 2))
            assert np.sqrt(np.mean((found - expected) ** 2)) < 0.05 * change, rate


def test_wrong_adapters_are_refused(package: Path, llama: Path, sql: Path, tmp_path: Path) -> None:
    beside = package / package_adapters(read_package(package))["sql"].path
    edgeq.cut(package, output=tmp_path / "small", rate=0.25, adapter="sql")
    with edgeq.load(tmp_path / "small", threads=1) as session, pytest.raises(AdapterError, match="For a cut model that is an adapter cut"):
        session.load_adapter(beside)
    with edgeq.load(package, threads=1) as session, pytest.raises(AdapterError, match=r"goes from \d+ to \d+ values"):
        session.load_adapter(tmp_path / "small-sql.onnx_adapter")
    damaged = tmp_path / "damaged.onnx_adapter"
    content = bytearray(beside.read_bytes())
    content[-100] ^= 1
    damaged.write_bytes(content)
    with edgeq.load(package, threads=1) as session, pytest.raises(AdapterError, match="not those that it was written with"):
        session.load_adapter(damaged)
    export(llama, output=tmp_path / "plain", quant="fp32", elastic=False, verify=False)
    with edgeq.load(tmp_path / "plain", threads=1) as session, pytest.raises(AdapterError, match="has no place for adapters"):
        session.load_adapter(beside)


def test_verify_finds_a_damaged_adapter(llama: Path, sql: Path, tmp_path: Path) -> None:
    export(llama, output=tmp_path / "p", quant="int4", elastic=False, adapters=[sql], adapter_mode="keep")
    assert edgeq.verify(tmp_path / "p").passed
    path = tmp_path / "p" / "adapters" / "sql.onnx_adapter"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(PackageError, match=r"sql\.onnx_adapter"):
        edgeq.verify(tmp_path / "p")


def test_bench_and_eval_take_adapters(package: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    plain = edgeq.evaluate(package, text, ctx=32, chunks=2, threads=1)
    tuned = edgeq.evaluate(package, text, ctx=32, chunks=2, adapter="sql", threads=1)
    cut = edgeq.evaluate(package, text, ctx=32, chunks=2, adapter="sql", rate=0.25, threads=1)
    assert len({plain.perplexity, tuned.perplexity, cut.perplexity}) == 3
    (row,) = edgeq.bench([package], prompt_tokens=8, gen_tokens=4, repeat=1, threads=1, rates=[0.25], adapter="sql")
    assert row.adapter == "sql"
    assert row.adapter_switch_ms is not None


def test_what_the_file_says(package: Path) -> None:
    adapter = read_onnx_adapter(package / package_adapters(read_package(package))["verse"].path)
    shapes = {name: values.shape for name, values in adapter.parameters.items()}
    assert shapes["model.layers.0.self_attn.q_proj.lora_A.weight"] == (64, 3)
    assert shapes["model.layers.0.self_attn.q_proj.lora_B.weight"] == (3, 128)
    assert shapes["model.layers.1.mlp.down_proj.lora_A.weight"] == (320, 3)


def test_a_cut_of_an_unknown_adapter_is_an_error(package: Path, tmp_path: Path) -> None:
    with pytest.raises((UsageError, AdapterError), match="nothing"):
        edgeq.cut(package, output=tmp_path / "small", rate=0.2, adapter="nothing")
    assert not (tmp_path / "small").exists()


def n_places(model: Any) -> int:
    """Inputs for adapters that the model's session has now."""
    return sum(".lora_" in value.name for value in model.session.get_overridable_initializers())


def test_places_are_left_out_until_an_adapter_acts(package: Path) -> None:
    """And again when the last one has gone. What is cached stays, and so do the answers."""
    with edgeq.load(package, n_ctx=96, threads=1) as session, edgeq.load(package, n_ctx=96, threads=1, adapter="sql") as other:
        plain, tuned = (list(one.score(IDS)) for one in (session, other))
        assert n_places(session.model) == 0
        assert n_places(other.model) > 0
        assert np.abs(np.subtract(plain, tuned)).max() > 0.01
        session.load_adapter(package / "adapters" / "sql.onnx_adapter", "one")
        np.testing.assert_array_equal(session.score(IDS), plain)
        assert n_places(session.model) == 0, "none has acted yet"
        session.set_adapter("one")
        np.testing.assert_allclose(session.score(IDS), tuned, atol=1e-6)
        assert n_places(session.model) == n_places(other.model)
        session.set_adapter(None)
        np.testing.assert_allclose(session.score(IDS), plain, atol=TOLERANCE)
        assert n_places(session.model) > 0, "one is in memory, and may be wanted back"
        session.unload_adapter("one")
        np.testing.assert_array_equal(session.score(IDS), plain)
        assert n_places(session.model) == 0


def test_contexts_follow_when_another_one_sets_an_adapter(package: Path) -> None:
    with OnnxModel.load(read_package(package).artifact_path(), threads=1) as model:
        plain, tuned = OnnxContext(model, n_ctx=96), OnnxContext(model, n_ctx=96)
        before = plain.decode(IDS[:40]).copy()
        adapter = OnnxAdapter.load(model, package / "adapters" / "sql.onnx_adapter")
        tuned.set_adapters({adapter: 1.0})
        plain.truncate(20)
        np.testing.assert_allclose(plain.decode(IDS[20:40]), before, atol=TOLERANCE)
        assert np.abs(tuned.decode(IDS[:40]) - before).max() > 0.01


def test_a_folder_that_has_changed_is_not_read_again(package: Path, tmp_path: Path) -> None:
    shutil.copytree(package, tmp_path / "copy")
    with edgeq.load(tmp_path / "copy", n_ctx=96, threads=1) as session:
        first = session.generate(PROMPT, max_tokens=4).tokens
        data = read_package(tmp_path / "copy").artifact_path().with_name("model.onnx.data")
        os.utime(data, (1, 1))
        session.set_adapter("sql")
        with pytest.raises(RuntimeFailure, match=r"model\.onnx: has changed since it was loaded\. Load it again\."):
            session.generate(PROMPT, max_tokens=4)
        session.set_adapter(None)
        assert session.generate(PROMPT, max_tokens=4).tokens == first


def test_a_graph_that_runs_is_kept_when_its_folder_has_changed(package: Path, tmp_path: Path) -> None:
    shutil.copytree(package, tmp_path / "copy")
    with edgeq.load(package, n_ctx=96, threads=1) as plain, edgeq.load(tmp_path / "copy", n_ctx=96, threads=1, adapter="sql") as session:
        assert n_places(session.model) > 0, "loaded once, with them"
        os.utime(read_package(tmp_path / "copy").artifact_path().with_name("model.onnx.data"), (1, 1))
        session.set_adapter(None)
        session.unload_adapter("sql")
        np.testing.assert_allclose(session.score(IDS), plain.score(IDS), atol=TOLERANCE)
        assert n_places(session.model) > 0


def test_what_does_more_than_add_nothing_stays(package: Path) -> None:
    file = read_onnx(read_package(package).artifact_path())
    inputs = [name for place in facts_of(file).places.values() for name in (place.a, place.b)]
    bare = without_places(file.proto, inputs)
    assert bare is not None
    assert not any("lora" in node.name for node in bare.graph.node) and any("lora" in node.name for node in file.proto.graph.node)
    assert without_places(file.proto, []) is None
    ranked = type(file.proto).FromString(file.proto.SerializeToString())
    next(tensor for tensor in ranked.graph.initializer if tensor.name == inputs[0]).dims[1] = 1
    assert without_places(ranked, inputs) is None
    other = type(file.proto).FromString(file.proto.SerializeToString())
    next(node for node in other.graph.node if node.name.endswith("lora_B/MatMul")).op_type = "Exp"
    assert without_places(other, inputs) is None
