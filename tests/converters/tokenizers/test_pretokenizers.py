"""Rows of cuts: each is what llama.cpp does under that name, and what is no row is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from tiny_tokenizers import TEXT, LlamaVocab, tiny_tokenizer, write_vocab

from edgeq.converters.tokenizers.gguf import read_gguf_tokenizer, tokenizer_json
from edgeq.converters.tokenizers.hf import read_hf_tokenizer
from edgeq.converters.tokenizers.pretokenizers import (
    BYTE_LEVEL_ROWS,
    LLAMA3,
    QWEN2,
    SPACE_ROWS,
    ByteLevelRow,
    byte_level_row_named,
    byte_level_rows,
    metaspace_splits,
    normalizer_steps,
    pre_tokenizer_json,
    pre_tokenizer_steps,
    space_row,
)
from edgeq.errors import TokenizerError
from edgeq.gguf_file import read_header
from edgeq.model import Vocabulary

NAMES = [name for row in BYTE_LEVEL_ROWS for name in (row.name, *row.aliases)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """A byte-level vocabulary that fits any cut."""
    return read_hf_tokenizer(tiny_tokenizer(tmp_path_factory.mktemp("gpt2"), "gpt2", 700)).vocabulary


def test_names_are_distinct() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert len({row.steps for row in SPACE_ROWS}) == len(SPACE_ROWS)


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_cuts_as_the_row_says(tmp_path: Path, plain: Vocabulary, name: str) -> None:
    file = write_vocab(tmp_path / "v.gguf", replace(plain, pre=name, add_bos=None, special_ids={**plain.special_ids, "bos": 3}))
    tokenizer, llama = read_gguf_tokenizer(read_header(file)), LlamaVocab(file)
    for text in (TEXT, "aŁA ПриветМир helloWorld McDonald'S १२३४५६", "  x\n\n  y \r\n z12345'LL"):
        assert tokenizer.encode(text, add_special=True) == llama.tokenize(text, add_special=True), text
    llama.close()


def test_rows_cut_differently(plain: Vocabulary) -> None:
    """The check above could fail: no two cuts are the same on this text."""
    cuts = set()
    for name in ("smollm", "gpt-2", "llama-bpe", "qwen2", "gpt-4o", "granite-embed-multi-97m", "tekken"):
        library = tokenizers.Tokenizer.from_str(tokenizer_json(replace(plain, pre=name)))
        cuts.add(tuple(word for word, _ in library.pre_tokenizer.pre_tokenize_str("I'LL 12 1234 helloWorld হায়া ?/\n")))
    assert len(cuts) == 7


@pytest.mark.parametrize("row", BYTE_LEVEL_ROWS, ids=lambda row: row.name)
def test_written_cuts_read_back(row: ByteLevelRow) -> None:
    assert pre_tokenizer_steps(pre_tokenizer_json(row), where="x") == (*(row.llama_cpp or row.steps), ("byte level",))


def split(regex: str, behavior: str, invert: bool) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def test_spellings_of_the_same_cut() -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    wanted = (("split", LLAMA3), ("byte level",))
    for first in (split(LLAMA3, "Isolated", False), split(LLAMA3, "Removed", True)):
        part = {"type": "Sequence", "pretokenizers": [{"type": "Sequence", "pretokenizers": [first]}, byte_level]}
        assert pre_tokenizer_steps(part, where="x") == wanted
    assert pre_tokenizer_steps({"type": "Metaspace", "replacement": "▁", "add_prefix_space": False}, where="x") == (("metaspace", "never"),)
    assert pre_tokenizer_steps({"type": "Metaspace", "replacement": "▁"}, where="x") == (("metaspace", "always"),)
    assert metaspace_splits({"type": "Metaspace", "replacement": "▁"}) and not metaspace_splits({"type": "Metaspace", "split": False})
    assert normalizer_steps(None, where="x") == pre_tokenizer_steps(None, where="x") == ()


@pytest.mark.parametrize(
    "part",
    [
        {"type": "ByteLevel", "add_prefix_space": True},
        {"type": "Digits", "individual_digits": False},
        split(QWEN2, "Removed", False),
        {"type": "Whitespace"},
        {"type": "Metaspace", "replacement": "_"},
    ],
)
def test_unknown_cut(part: dict[str, object]) -> None:
    with pytest.raises(
        TokenizerError, match=r"f.json: pre_tokenizer step \{.*\} is not one edgeq can carry to llama.cpp. Known: ByteLevel without"
    ):
        pre_tokenizer_steps(part, where="f.json")


def test_unknown_normalizer() -> None:
    with pytest.raises(TokenizerError, match=r"f.json: normalizer step \{'type': 'NFKC'\} is not .* Known: NFC, Prepend and Replace"):
        normalizer_steps({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}, where="f.json")


def test_known_steps_in_an_unknown_order() -> None:
    with pytest.raises(
        TokenizerError,
        match=r"f.json: pre_tokenizer \[digits, split by \(\?i:.*\] is not one .* Known are those of smollm, gpt-2, llama-bpe",
    ):
        byte_level_rows((("digits",), ("split", QWEN2)), where="f.json")
    with pytest.raises(
        TokenizerError, match=r"f.json: normalizer and pre_tokenizer \[prepend '▁'\] are not .* Known: prepend and replace ="
    ):
        space_row((("prepend", "▁"),), where="f.json")
    with pytest.raises(TokenizerError, match=r"f.gguf: tokenizer.ggml.pre 'chatglm-bpe' is not .* Known: smollm, starcoder, "):
        byte_level_row_named("chatglm-bpe", where="f.gguf")
