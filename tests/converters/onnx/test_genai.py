"""genai_config.json, against llama.cpp's idea of where a generation ends and against onnxruntime-genai itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tiny_tokenizers import KINDS, open_family, tiny_tokenizer

from edgeq.converters.onnx.builder import MS, Builder
from edgeq.converters.onnx.genai import ends_of_generation, genai_config, shares_buffer, to_bytes
from edgeq.converters.onnx.tokenizer_files import tokenizer_files
from edgeq.converters.tokenizers.hf import read_hf_tokenizer
from edgeq.model import Vocabulary
from edgeq.rope import RopeSpec
from edgeq.spec import Attention, Mlp, ModelSpec

SPEC = ModelSpec(
    family="llama",
    n_embd=64,
    n_vocab=600,
    n_ctx=256,
    blocks=(
        Attention(layer=0, n_heads=4, n_kv_heads=2, head_dim=24),
        Mlp(layer=0, n_ff=160),
        Attention(layer=1, n_heads=2, n_kv_heads=1, head_dim=16),
        Mlp(layer=1, n_ff=96),
    ),
    rope=RopeSpec(dim=16, base=10000.0),
    norm_eps=1e-5,
    tied=False,
    attn_scale=24**-0.5,
)


def vocabulary(*tokens: str, **changes: Any) -> Vocabulary:
    return replace(
        Vocabulary(kind="bpe", pre="gpt-2", tokens=tokens, types=(1,) * len(tokens), merges=("a b",), special_ids={"eos": 1}), **changes
    )


def config(vocabulary: Vocabulary, **changes: Any) -> dict[str, Any]:
    return genai_config(SPEC, vocabulary, **{"filename": "model.onnx", "n_ctx": 256, "max_length": 128, "share_buffer": True, **changes})


def test_sizes_and_names() -> None:
    made = config(vocabulary("a", "</s>", "<s>", special_ids={"eos": 1, "bos": 2}))
    assert {key: value for key, value in made["model"].items() if key != "decoder"} == {
        "bos_token_id": 2,
        "eos_token_id": [1],
        "pad_token_id": 1,
        "context_length": 256,
        "type": "decoder",
        "vocab_size": 600,
    }
    decoder = made["model"]["decoder"]
    sizes = ("head_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "filename")
    assert tuple(decoder[name] for name in sizes) == (24, 64, 4, 2, 2, "model.onnx")
    assert decoder["inputs"]["past_key_names"] % 1 == "past_key_values.1.key"
    assert decoder["outputs"]["present_value_names"] % 0 == "present.0.value"
    assert decoder["session_options"]["provider_options"] == []
    assert "position_ids" not in decoder["inputs"]


def test_room_for_what_was_planned_and_no_more() -> None:
    assert config(vocabulary("a", "b"))["search"]["max_length"] == 128
    assert config(vocabulary("a", "b"), max_length=4096)["search"]["max_length"] == 256
    assert [config(vocabulary("a", "b"), share_buffer=on)["search"]["past_present_share_buffer"] for on in (True, False)] == [True, False]


def test_a_model_for_cuda_names_it() -> None:
    assert config(vocabulary("a", "b"), provider="cuda")["model"]["decoder"]["session_options"]["provider_options"] == [{"cuda": {}}]


def test_ids_that_a_model_does_not_have_are_left_out() -> None:
    made = config(vocabulary("a", "b", special_ids={}))
    assert not {"bos_token_id", "eos_token_id", "pad_token_id"} & made["model"].keys()


def test_every_end_is_named_once_and_eos_first() -> None:
    tokens = ("x", "<|endoftext|>", "<|im_end|>", "y", "stop")
    made = vocabulary(*tokens, types=(1, 3, 3, 1, 3), special_ids={"eos": 2, "eot": 4, "eom": 2})
    assert ends_of_generation(made) == [2, 4, 1]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_generations_end_where_llama_cpp_ends_them(tmp_path: Path, kind: str) -> None:
    one = open_family(tmp_path, kind)
    ids = range(len(one.hf.vocabulary.tokens))
    assert sorted(ends_of_generation(one.hf.vocabulary)) == [id for id in ids if one.llama.is_end(id)]
    one.llama.close()


@pytest.mark.parametrize("kind", ["smollm2", "llama3", "qwen2"])
def test_onnxruntime_genai_reads_it(tmp_path: Path, kind: str) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    hf = read_hf_tokenizer(tiny_tokenizer(tmp_path / "source", kind))
    folder = tmp_path / "onnx"
    folder.mkdir()
    tokenizer_files(hf, n_ctx=256).write(folder)
    made = config(hf.vocabulary)
    (folder / "genai_config.json").write_bytes(to_bytes(made))
    tokenizer = og.Tokenizer(str(folder))
    assert list(tokenizer.eos_token_ids) == made["model"]["eos_token_id"]
    assert tokenizer.pad_token_id == made["model"]["pad_token_id"]
    if "bos_token_id" in made["model"]:
        assert tokenizer.bos_token_id == made["model"]["bos_token_id"]


def test_the_document_is_text_that_does_not_change() -> None:
    made = config(vocabulary("a", "b"))
    assert to_bytes(made) == to_bytes(json.loads(to_bytes(made)))


@pytest.mark.parametrize(("op", "domain", "shared"), [("GroupQueryAttention", MS, True), ("Attention", "", False)])
def test_who_writes_in_place(op: str, domain: str, shared: bool) -> None:
    """As of onnxruntime 1.32: `ai.onnx` Attention copies keys and values."""
    g = Builder("decoder", float_type=ir.DataType.FLOAT)
    for i, (name, where) in enumerate((("GroupQueryAttention", MS), (op, domain))):
        x = g.constant(f"x{i}", np.zeros((1, 1, 8), dtype=np.float32))
        past = g.input(f"past_key_values.{i}.key", ir.DataType.FLOAT, ["batch_size", 1, "past_sequence_length", 8])
        y = g.node(name, [x, x, x, past, past], path=f"/model/layers.{i}/attn/{name}", domain=where, shape=[1, 1, 8])
        g.output(y, f"y{i}", ir.DataType.FLOAT, [1, 1, 8])
    assert shares_buffer(g.model()) is shared
