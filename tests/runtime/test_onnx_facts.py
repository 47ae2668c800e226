"""What is read from a folder before it runs, and every folder that must not run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from onnx_folders import HEAD_DIM, N_CTX, copy_of, edit_graph, write_tiny_onnx
from tiny import N_VOCAB, edit_json

from edgeq.errors import EdgeqError, SourceError, UnsupportedError
from edgeq.runtime.onnx_context import OnnxContext
from edgeq.runtime.onnx_facts import read_onnx_facts
from edgeq.runtime.onnx_model import OnnxModel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx-facts") / "tiny"
    write_tiny_onnx(folder, n_layers=3)
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return copy_of(source, tmp_path / "model")


def model_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    edit_json(folder / "genai_config.json", lambda document: change(document["model"]))
    return folder / "model.onnx"


def test_sizes(source: Path) -> None:
    facts = read_onnx_facts(source / "model.onnx")
    assert (facts.arch, facts.n_layers, facts.n_vocab, facts.n_ctx_train, facts.n_positions) == ("llama", 3, N_VOCAB, N_CTX, N_CTX)
    assert (facts.bos, facts.ends, facts.kv_type, facts.float_type, facts.opset) == (1, (2, 0), "f32", "f32", 23)
    assert [cache.past for cache in facts.caches[:3]] == ["past_key_values.0.key", "past_key_values.0.value", "past_key_values.1.key"]
    assert {(cache.n_kv_heads, cache.length, cache.in_place) for cache in facts.caches} == {(2, HEAD_DIM, True)}
    assert facts.kv_bytes(100) == 3 * 2 * 100 * 2 * HEAD_DIM * 4


def test_caches_that_are_copied_take_twice_the_memory(tmp_path: Path) -> None:
    write_tiny_onnx(tmp_path / "m", attention="Attention")
    facts = read_onnx_facts(tmp_path / "m" / "model.onnx")
    assert not any(cache.in_place for cache in facts.caches)
    assert facts.kv_bytes(100) == 2 * (2 * 2 * 100 * 2 * HEAD_DIM * 4)
    assert facts.n_positions == N_CTX, "the table is an operand of RotaryEmbedding"


def test_rotary_tables_are_found_behind_a_gather(folder: Path) -> None:
    def change(proto: Any) -> None:
        import onnx

        for node in proto.graph.node:
            if node.op_type == "GroupQueryAttention":
                node.input[7] = "gathered"
        proto.graph.node.insert(0, onnx.helper.make_node("Gather", ["cos_cache", "input_ids"], ["gathered"]))

    assert read_onnx_facts(edit_graph(folder, change)).n_positions == N_CTX


def test_sizes_that_only_the_configuration_names(folder: Path) -> None:
    """onnxruntime-genai's builder writes symbolic head sizes."""

    def change(proto: Any) -> None:
        for value in proto.graph.input:
            if value.name.startswith("past_key_values"):
                value.type.tensor_type.shape.dim[1].dim_param = "heads"
                value.type.tensor_type.shape.dim[3].dim_param = "kv_cache_dim"
        for value in proto.graph.output:
            if value.name == "logits":
                value.type.tensor_type.shape.dim[2].dim_param = "vocabulary"

    facts = read_onnx_facts(edit_graph(folder, change))
    assert {(cache.n_kv_heads, cache.length) for cache in facts.caches} == {(2, HEAD_DIM)}
    assert facts.n_vocab == N_VOCAB


def test_names_come_from_the_configuration(folder: Path) -> None:
    def rename(proto: Any) -> None:
        names = {"input_ids": "tokens", "logits": "scores"}
        names |= {f"past_key_values.{i}.key": f"k_in_{i}" for i in range(3)} | {f"present.{i}.key": f"k_out_{i}" for i in range(3)}
        for value in [*proto.graph.input, *proto.graph.output]:
            value.name = names.get(value.name, value.name)
        for node in proto.graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]

    def tell(model: dict[str, Any]) -> None:
        model["decoder"]["inputs"] |= {"input_ids": "tokens", "past_key_names": "k_in_%d"}
        model["decoder"]["outputs"] |= {"logits": "scores", "present_key_names": "k_out_%d"}

    before = folder.with_name("before")
    copy_of(folder, before)
    edit_graph(folder, rename)
    found = []
    for path in (before / "model.onnx", model_config(folder, tell)):
        with OnnxModel.load(path, threads=1) as model, OnnxContext(model, n_ctx=16) as context:
            found.append(context.decode([1, 70, 80]).tolist())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: m.pop("type"), SourceError, r"genai_config\.json: model\.type is None; expected a name"),
        (lambda m: m.update(context_length=0), SourceError, r"model\.context_length is 0; expected a number of at least 1"),
        (lambda m: m.update(context_length=True), SourceError, r"model\.context_length is True; expected a number"),
        (lambda m: m.update(bos_token_id="<s>"), SourceError, r"model\.bos_token_id is '<s>'; expected the id of a token"),
        (
            lambda m: m.update(eos_token_id=[2, "x"]),
            SourceError,
            r"model\.eos_token_id is \[2, 'x'\]; expected the id of a token, or",
        ),
        (lambda m: m["decoder"].pop("num_hidden_layers"), SourceError, r"model\.decoder\.num_hidden_layers is None; expected a number"),
        (lambda m: m.pop("decoder"), SourceError, r"genai_config\.json: cannot be read \('decoder'\)"),
        (
            lambda m: m["decoder"]["inputs"].update(past_key_names="past.key"),
            SourceError,
            r"model\.decoder\.inputs\.past_key_names is 'past\.key'; expected a name with %d for the layer",
        ),
        (
            lambda m: m["decoder"]["inputs"].update(input_ids="tokens"),
            UnsupportedError,
            "the graph has no input 'tokens'. It is no",
        ),
        (lambda m: m["decoder"]["outputs"].update(logits="scores"), UnsupportedError, "the graph has no output 'scores'. It is no decoder"),
        (lambda m: m["decoder"].update(num_hidden_layers=2), UnsupportedError, "does not know what to feed the graph's input 'past_key"),
        (
            lambda m: m["decoder"]["inputs"].update(past_key_names="k.%d", past_value_names="v.%d"),
            UnsupportedError,
            "the graph has no keys and values among its inputs",
        ),
        (
            lambda m: m["decoder"]["outputs"].update(present_key_names="now.%d"),
            UnsupportedError,
            r"takes 'past_key_values\.0\.key' and gives no 'now\.0'",
        ),
    ],
)
def test_configurations_that_do_not_fit(folder: Path, change: Callable[[Any], Any], error: type[EdgeqError], message: str) -> None:
    with pytest.raises(error, match=message):
        read_onnx_facts(model_config(folder, change))


def test_tokens_that_are_not_named(folder: Path) -> None:
    facts = read_onnx_facts(model_config(folder, lambda m: m.update(bos_token_id=None, eos_token_id=None)))
    assert (facts.bos, facts.ends) == (None, ())
    facts = read_onnx_facts(model_config(folder, lambda m: m.update(bos_token_id=-1, eos_token_id=2)))
    assert (facts.bos, facts.ends) == (None, (2,))


def test_no_configuration_or_a_broken_one(folder: Path) -> None:
    config = folder / "genai_config.json"
    config.write_text(json.dumps([1]), encoding="utf-8")
    with pytest.raises(SourceError, match=r"genai_config\.json: cannot be read"):
        read_onnx_facts(folder / "model.onnx")
    config.write_text('{"model": ', encoding="utf-8")
    with pytest.raises(SourceError, match=r"genai_config\.json: cannot be read .* Copy or export the folder again"):
        read_onnx_facts(folder / "model.onnx")
    config.unlink()
    with pytest.raises(SourceError, match=r"genai_config\.json is missing: it names the tokens and sizes of model\.onnx"):
        read_onnx_facts(folder / "model.onnx")


def test_number_formats_without_a_runtime(folder: Path) -> None:
    def change(proto: Any) -> None:
        next(value for value in proto.graph.input if value.name == "past_key_values.0.key").type.tensor_type.elem_type = 3

    with pytest.raises(UnsupportedError, match=r"past_key_values\.0\.key has values of type 3; edgeq runs graphs in float32 or float16"):
        read_onnx_facts(edit_graph(folder, change))


def test_a_cache_of_other_dimensions(folder: Path) -> None:
    def change(proto: Any) -> None:
        shape = next(value for value in proto.graph.input if value.name == "past_key_values.0.key").type.tensor_type.shape
        del shape.dim[3]

    with pytest.raises(UnsupportedError, match=r"past_key_values\.0\.key has 3 dimensions; expected \(batch, heads, tokens, head size\)"):
        read_onnx_facts(edit_graph(folder, change))
