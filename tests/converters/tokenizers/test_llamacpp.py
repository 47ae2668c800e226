"""What llama.cpp makes of a vocabulary beyond what the file says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_tokenizers import Family, LlamaVocab, write_vocab

from edgeq.converters.tokenizers.gguf import read_gguf_tokenizer
from edgeq.converters.tokenizers.llamacpp import (
    _FILL_IN,
    ENDS_GENERATION,
    TokenType,
    effective_type,
    general_name,
    is_called_phi3,
    strips_behind,
)
from edgeq.errors import TokenizerError
from edgeq.gguf_file import read_header
from edgeq.model import Vocabulary

Make = Callable[[str], Family]


@pytest.fixture
def with_tokens(family: Make, tmp_path: Path) -> Callable[..., tuple[LlamaVocab, int, Path]]:
    """A vocabulary with one more token of some type, and its id."""

    def make(token: str, type: TokenType, name: str = "tiny", kind: str = "gpt2") -> tuple[LlamaVocab, int, Path]:
        old = family(kind).hf.vocabulary
        vocabulary = replace(
            old, tokens=(*old.tokens, token), types=(*old.types, type), scores=(*old.scores, -9999.0) if old.scores else ()
        )
        path = write_vocab(tmp_path / "v.gguf", vocabulary, name=name)
        return LlamaVocab(path), len(old.tokens), path

    return make


@pytest.mark.parametrize("token", sorted(ENDS_GENERATION - {"<|endoftext|>"}))
def test_ends_of_generation(with_tokens: Callable[..., tuple[LlamaVocab, int, Path]], token: str) -> None:
    llama, id, path = with_tokens(token, TokenType.NORMAL)
    assert llama.is_end(id)
    assert llama.tokenize(f"a{token}b", parse_special=True)[1] == id and id not in llama.tokenize(f"a{token}b")
    tokenizer = read_gguf_tokenizer(read_header(path))
    assert tokenizer.encode(f"a{token}b", parse_special=True)[1] == id and id not in tokenizer.encode(f"a{token}b")
    llama.close()


@pytest.mark.parametrize("token", sorted(_FILL_IN))
def test_fill_in_tokens(with_tokens: Callable[..., tuple[LlamaVocab, int, Path]], token: str) -> None:
    llama, id, path = with_tokens(token, TokenType.USER_DEFINED)
    tokenizer = read_gguf_tokenizer(read_header(path))
    for parse in (False, True):
        ids = llama.tokenize(f"a{token}b", parse_special=parse)
        assert (id in ids) == parse
        assert tokenizer.encode(f"a{token}b", parse_special=parse) == ids
    llama.close()


@pytest.mark.parametrize("token", ["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"])
def test_always_found(with_tokens: Callable[..., tuple[LlamaVocab, int, Path]], token: str) -> None:
    llama, id, path = with_tokens(token, TokenType.CONTROL)
    assert llama.tokenize(f"a{token}")[1] == id == read_gguf_tokenizer(read_header(path)).encode(f"a{token}")[1]
    llama.close()


def test_other_spellings_keep_their_type(with_tokens: Callable[..., tuple[LlamaVocab, int, Path]]) -> None:
    llama, id, _ = with_tokens("<|something|>", TokenType.NORMAL)
    assert id not in llama.tokenize("<|something|>", parse_special=True)
    llama.close()
    assert effective_type("<|something|>", TokenType.NORMAL) == TokenType.NORMAL
    assert effective_type("<unk>", TokenType.UNKNOWN) == TokenType.UNKNOWN


@pytest.mark.parametrize(("name", "strips"), [("Phi-3 mini", True), ("my PHI3.5", True), ("Phi 3 mini", False), ("Phi-4", False)])
def test_the_name_decides_about_white_space(with_tokens: Callable[..., tuple[LlamaVocab, int, Path]], name: str, strips: bool) -> None:
    llama, id, path = with_tokens("<|new|>", TokenType.CONTROL, name, "phi3")
    assert is_called_phi3(name) == strips
    ids = llama.tokenize("<|new|> \n a", parse_special=True)
    assert (ids == [id, *llama.tokenize("a")]) == strips and ids[0] == id
    assert read_gguf_tokenizer(read_header(path)).encode("<|new|> \n a", parse_special=True) == ids
    llama.close()
    assert strips_behind("<|new|>", TokenType.CONTROL) and not strips_behind("<s>", TokenType.CONTROL)
    assert not strips_behind("the", TokenType.NORMAL)


def test_a_model_called_phi3_has_to_have_its_tokens(family: Make, tmp_path: Path) -> None:
    """Why general_name takes the words apart for every other vocabulary."""
    vocabulary = family("gpt2").hf.vocabulary
    path = write_vocab(tmp_path / "v.gguf", vocabulary, name="my-phi-3-killer")
    with pytest.raises(AssertionError, match="does not load"):
        LlamaVocab(path)
    with pytest.raises(
        TokenizerError, match=r"v.gguf: the model is called Phi-3, .* without the tokens </s>, <s>, <unk>, <.*>. Change general"
    ):
        read_gguf_tokenizer(read_header(path))
    LlamaVocab(write_vocab(path, vocabulary, name=general_name(vocabulary, "my-phi-3-killer"))).close()


@pytest.mark.parametrize(
    ("name", "stripping", "plain"),
    [
        ("Phi 3 Mini 4k Instruct", "Phi-3 Mini 4k Instruct", "Phi 3 Mini 4k Instruct"),
        ("phi_3", "Phi-3", "phi_3"),
        ("Phi-3.5-mini", "Phi-3.5-mini", "Phi 3.5-mini"),
        ("PHI3 and phi-3", "PHI3 and phi-3", "PHI 3 and phi 3"),
        ("My Model", "My Model (Phi-3)", "My Model"),
        ("", " (Phi-3)", ""),
    ],
)
def test_general_name(name: str, stripping: str, plain: str) -> None:
    vocabulary = Vocabulary(kind="spm", pre="default", tokens=(), types=())
    assert general_name(vocabulary, name) == plain
    assert general_name(replace(vocabulary, strips_special=True), name) == stripping
    assert is_called_phi3(stripping) and not is_called_phi3(plain)
