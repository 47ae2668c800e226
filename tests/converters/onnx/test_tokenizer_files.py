"""Tokenizer files of an ONNX folder, read by the `tokenizers` library, transformers and onnxruntime-genai."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import edit_json
from tiny_tokenizers import CHATML, KINDS, TEXT, tiny_tokenizer, write_vocab

from edgeq.converters.onnx.tokenizer_files import TokenizerFiles, tokenizer_files
from edgeq.converters.tokenizers.gguf import read_gguf_tokenizer
from edgeq.converters.tokenizers.hf import read_hf_tokenizer
from edgeq.converters.tokenizers.library import LibraryTokenizer
from edgeq.converters.tokenizers.llamacpp import general_name
from edgeq.errors import TokenizerError
from edgeq.gate_prompts import gate_prompts
from edgeq.gguf_file import read_header

N_CTX = 256
TEXTS = [text.text for text in gate_prompts().texts] + TEXT.split("\n")
SWITCHES = [(add, parse) for add in (False, True) for parse in (False, True)]
# The least that onnxruntime-genai wants to see before it opens a tokenizer.
GENAI = {
    "model": {
        "type": "decoder",
        "context_length": N_CTX,
        "vocab_size": 600,
        "bos_token_id": 0,
        "eos_token_id": [0],
        "pad_token_id": 0,
        "decoder": {
            **{"filename": "model.onnx", "head_size": 8, "hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1},
            **{"num_key_value_heads": 1, "inputs": {"input_ids": "input_ids"}, "outputs": {"logits": "logits"}},
        },
    },
    "search": {"max_length": N_CTX},
}


def written(folder: Path, files: TokenizerFiles) -> Path:
    folder.mkdir()
    assert [path.name for path in files.write(folder)] == list(files.files)
    return folder


def source(tmp_path: Path, kind: str) -> LibraryTokenizer:
    return read_hf_tokenizer(tiny_tokenizer(tmp_path / "source", kind))


def from_gguf(tmp_path: Path, hf: LibraryTokenizer) -> LibraryTokenizer:
    name = general_name(hf.vocabulary, "tiny")
    return read_gguf_tokenizer(read_header(write_vocab(tmp_path / "vocab.gguf", hf.vocabulary, name=name)))


def library_ids(folder: Path, text: str, *, add: bool, parse: bool) -> list[int]:
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.encode_special_tokens = not parse
    return library.encode(text, add_special_tokens=add).ids


def genai_tokenizer(folder: Path, **options: str) -> Any:
    og = pytest.importorskip("onnxruntime_genai")
    (folder / "genai_config.json").write_text(json.dumps(GENAI))
    tokenizer = og.Tokenizer(str(folder))
    if options:
        tokenizer.update_options(**options)
    return tokenizer


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_ids_are_those_of_the_source(tmp_path: Path, kind: str) -> None:
    hf = source(tmp_path, kind)
    files = tokenizer_files(hf, n_ctx=N_CTX)
    folder = written(tmp_path / "onnx", files)
    for add, parse in SWITCHES:
        for text in (TEXT, "", " ", "a\x04b"):
            ids = hf.encode(text, add_special=add, parse_special=parse)
            assert library_ids(folder, text, add=add, parse=parse) == ids
            assert files.tokenizer.encode(text, add_special=add, parse_special=parse) == ids


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"qwen2", "mistral3"}))
def test_a_vocabulary_alone_makes_files_of_the_same_ids(tmp_path: Path, kind: str) -> None:
    """As `demo` has it. For o200k and tekken, llama.cpp's way to cut is left behind: the ids are those of the model's own files."""
    hf = source(tmp_path, kind)
    gguf = from_gguf(tmp_path, hf)
    assert gguf.folder is None
    folder = written(tmp_path / "onnx", tokenizer_files(gguf, n_ctx=N_CTX))
    for add, parse in SWITCHES:
        for text in TEXTS:
            text = text.replace("▁", "_")
            assert library_ids(folder, text, add=add, parse=parse) == hf.encode(text, add_special=add, parse_special=parse), text


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_onnxruntime_genai_gives_the_same_ids(tmp_path: Path, kind: str, made: bool) -> None:
    hf = source(tmp_path, kind)
    files = tokenizer_files(from_gguf(tmp_path, hf) if made else hf, n_ctx=N_CTX)
    folder = written(tmp_path / "onnx", files)
    genai = genai_tokenizer(folder)
    different = [text for text in TEXTS if genai.encode(text).tolist() != files.tokenizer.encode(text, parse_special=True)]
    if not different:
        return
    reasons = " ".join(files.differs)
    assert len(different) <= (45 if "runs of spaces" in reasons else 3)
    for text in different:
        not_ascii = any(char.isnumeric() and not char.isascii() for char in text)
        known = {"digits outside ASCII": not_ascii, "normal form C": "\u0301" in text or "\u0303" in text, "runs of spaces": True}
        assert any(applies and reason in reasons for reason, applies in known.items()), text


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("smollm2", "-9 ٣٤", "digits outside ASCII"),
        ("qwen2", "e\u0301", "normal form C"),
        ("mistral3", "a  b", "runs of spaces"),
    ],
)
def test_where_onnxruntime_genai_differs_is_said(tmp_path: Path, kind: str, text: str, reason: str) -> None:
    files = tokenizer_files(source(tmp_path, kind), n_ctx=N_CTX)
    genai = genai_tokenizer(written(tmp_path / "onnx", files))
    assert genai.encode(text).tolist() != files.tokenizer.encode(text)
    assert [reason in sentence for sentence in files.differs] == [True]


def test_bytes_that_no_token_has_are_told(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path / "source", "gpt2")
    edit_json(folder / "tokenizer.json", lambda parts: parts["model"]["vocab"].pop("Ą"))  # byte 4
    hf = read_hf_tokenizer(folder)
    files = tokenizer_files(hf, n_ctx=N_CTX)
    assert files.differs == ("bytes that no token has (1 of 256), which are left out and get the id -1 in onnxruntime-genai",)
    ids = hf.encode("ab")
    assert hf.encode("a\x04b") == files.tokenizer.encode("a\x04b") == ids
    assert genai_tokenizer(written(tmp_path / "onnx", files)).encode("a\x04b").tolist() == [ids[0], -1, ids[1]]


@pytest.mark.parametrize("kind", ["smollm2", "llama3", "llama2", "gemma3"])
def test_bos_comes_when_it_is_asked_for(tmp_path: Path, kind: str) -> None:
    """onnxruntime-genai leaves it to the chat template, unless it is told."""
    hf = source(tmp_path, kind)
    folder = written(tmp_path / "onnx", tokenizer_files(hf, n_ctx=N_CTX))
    expected = hf.encode("Hello", add_special=True)
    assert genai_tokenizer(folder).encode("Hello").tolist() == hf.encode("Hello")
    assert genai_tokenizer(folder, add_special_tokens="true").encode("Hello").tolist() == expected
    assert (expected != hf.encode("Hello")) == KINDS[kind].add_bos


def test_a_switch_in_the_configuration_becomes_a_post_processor(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path / "source", "llama2")
    edit_json(folder / "tokenizer.json", lambda parts: parts.update(post_processor=None))
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(add_bos_token=True))
    hf = read_hf_tokenizer(folder)
    onnx = written(tmp_path / "onnx", tokenizer_files(hf, n_ctx=N_CTX))
    assert library_ids(onnx, "Hello", add=True, parse=False) == hf.encode("Hello", add_special=True) == [1, *hf.encode("Hello")]


@pytest.mark.parametrize("kind", ["smollm2", "llama2", "gemma3"])
@pytest.mark.parametrize("made", [False, True])
def test_transformers_reads_the_folder(tmp_path: Path, kind: str, made: bool) -> None:
    from transformers import AutoTokenizer

    hf = source(tmp_path, kind)
    folder = written(tmp_path / "onnx", tokenizer_files(from_gguf(tmp_path, hf) if made else hf, n_ctx=N_CTX))
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in (text.replace("▁", "_") for text in TEXTS):
        assert theirs.encode(text) == hf.encode(text, add_special=True, parse_special=True)
    assert theirs.eos_token == KINDS[kind].eos
    assert theirs.bos_token == KINDS[kind].bos
    assert theirs.model_max_length == N_CTX or not made
    conversation = [{"role": "user", "content": "Hi"}]
    assert theirs.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_untouched_files_are_copied(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path / "source", "gpt2")
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(tokenizer_class="GPT2Tokenizer"))
    (folder / "special_tokens_map.json").write_text('{"eos_token":  "<|endoftext|>"}')
    files = tokenizer_files(read_hf_tokenizer(folder), n_ctx=N_CTX).files
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert files[name] == (folder / name).read_bytes()
    assert files["chat_template.jinja"].decode() == CHATML
    assert list(files) == ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]


def test_a_model_without_a_chat_template_has_no_file_of_it(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path / "source", "gpt2")
    edit_json(folder / "tokenizer_config.json", lambda config: config.pop("chat_template"))
    assert "chat_template.jinja" not in tokenizer_files(read_hf_tokenizer(folder), n_ctx=N_CTX).files


@pytest.mark.parametrize(
    ("given", "written_as"), [("GPT2TokenizerFast", "GPT2TokenizerFast"), ("Qwen3Tokenizer", "PreTrainedTokenizerFast")]
)
def test_tokenizer_classes_that_genai_does_not_know(tmp_path: Path, given: str, written_as: str) -> None:
    folder = tiny_tokenizer(tmp_path / "source", "qwen2")
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(tokenizer_class=given))
    files = tokenizer_files(read_hf_tokenizer(folder), n_ctx=N_CTX)
    config = json.loads(files.files["tokenizer_config.json"])
    assert config == {**json.loads((folder / "tokenizer_config.json").read_text()), "tokenizer_class": written_as}
    genai_tokenizer(written(tmp_path / "onnx", files))


def test_a_folder_without_a_configuration_gets_one(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path / "source", "gpt2")
    (folder / "tokenizer_config.json").rename(folder / "special_tokens_map.json")
    files = tokenizer_files(read_hf_tokenizer(folder), n_ctx=N_CTX)
    config = json.loads(files.files["tokenizer_config.json"])
    assert config["eos_token"] == "<|endoftext|>"
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    genai_tokenizer(written(tmp_path / "onnx", files))


def test_a_source_that_went_away(tmp_path: Path) -> None:
    hf = source(tmp_path, "gpt2")
    (tmp_path / "source" / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"there is no tokenizer\.json"):
        tokenizer_files(hf, n_ctx=N_CTX)
