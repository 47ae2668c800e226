"""Merging by score gives what merging by rank gives, and the other way round: on random vocabularies, with llama.cpp as the judge."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import LlamaVocab, write_vocab

from edgeq.converters.tokenizers.gguf import read_gguf_tokenizer
from edgeq.converters.tokenizers.hf import read_hf_tokenizer
from edgeq.converters.tokenizers.llamacpp import BYTE_TOKENS
from edgeq.converters.tokenizers.merging import ranked_pairs, token_scores
from edgeq.errors import TokenizerError
from edgeq.gguf_file import read_header
from edgeq.model import Vocabulary

FRONT = ("<unk>", "<s>", "</s>", *BYTE_TOKENS)


@st.composite
def random_pairs(draw: st.DrawFn) -> list[tuple[str, str]]:
    """Pairs over a, b, c in any order that lets each be made of what came before; several may make the same token."""
    tokens = ["a", "b", "c"]
    pairs: list[tuple[str, str]] = []
    for _ in range(draw(st.integers(1, 14))):
        pair = (draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens)))
        if pair not in pairs and len(pair[0] + pair[1]) < 9:
            pairs.append(pair)
            if pair[0] + pair[1] not in tokens:
                tokens.append(pair[0] + pair[1])
    return draw(st.permutations(pairs)) if draw(st.booleans()) else pairs


def write_folder(folder: Path, pairs: list[tuple[str, str]]) -> Path:
    tokens = dict.fromkeys([*FRONT, "a", "b", "c", *(left + right for left, right in pairs)])
    added = [
        {"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for i, t in enumerate(FRONT[:3])
    ]
    model = {"type": "BPE", "byte_fallback": True, "vocab": {t: i for i, t in enumerate(tokens)}, "merges": [list(pair) for pair in pairs]}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    whole = {"version": "1.0", "added_tokens": added, "normalizer": replace, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


ALL_TEXTS = ["".join(letters) for n in range(1, 5) for letters in product("abc", repeat=n)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture])
@given(pairs=random_pairs(), longer=st.lists(st.text("abc", min_size=6, max_size=30), max_size=10))
def test_ranks_become_scores(tmp_path: Path, pairs: list[tuple[str, str]], longer: list[str]) -> None:
    folder = write_folder(tmp_path, pairs)
    try:
        hf = read_hf_tokenizer(folder)
    except TokenizerError as refused:
        assert "is made by no merge" in str(refused)
        assume(False)
    file = write_vocab(folder / "vocab.gguf", hf.vocabulary)
    llama, back = LlamaVocab(file), read_gguf_tokenizer(read_header(file))
    for text in ALL_TEXTS + longer:
        assert hf.encode(text) == llama.tokenize(text) == back.encode(text), text
    llama.close()


def test_a_token_that_only_llama_cpp_would_make_is_refused_for_a_reason(tmp_path: Path) -> None:
    """abc is in the vocabulary, its only merge is (ab, c), and bc is always merged first: it is never made from ab and c."""
    pairs = [("b", "c"), ("a", "b"), ("ab", "c")]
    with pytest.raises(
        TokenizerError, match=r"tokenizer.json: token 'abc' is made by no merge, .* its parts \['a', 'bc'\] meet. Add the merge"
    ):
        read_hf_tokenizer(write_folder(tmp_path, pairs))
    tokens = (*FRONT, "a", "b", "c", "bc", "ab", "abc")
    library = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, pairs, byte_fallback=True))
    scores = tuple({"bc": -1.0, "ab": -2.0, "abc": -3.0}.get(token, 0.0) for token in tokens)
    types = (2, 3, 3, *[6] * 256, *[1] * 6)
    llama = LlamaVocab(
        write_vocab(
            tmp_path / "v.gguf", Vocabulary(kind="spm", pre="default", tokens=tokens, types=types, scores=scores, add_space_prefix=False)
        )
    )
    assert library.encode("abc").tokens == ["a", "bc"]
    assert [tokens[id] for id in llama.tokenize("abc")] == ["abc"]
    llama.close()


def test_a_special_token_that_llama_cpp_would_make_of_plain_text_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As soon as "s>" is a token, "<s>" consists of two neighbours."""
    write_folder(tmp_path, [("a", "b")])
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    whole["model"]["vocab"] |= {token: len(whole["model"]["vocab"]) + i for i, token in enumerate(("<", "s", ">", "s>"))}
    whole["model"]["merges"] = ["a b", "s >"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    hf = read_hf_tokenizer(tmp_path)
    assert hf.differs == ("plain text that spells <s> (llama.cpp takes it for the special token)",)
    assert "llama.cpp gives other token ids than the Hugging Face tokenizer for plain text that spells <s>" in caplog.text
    llama = LlamaVocab(write_vocab(tmp_path / "v.gguf", hf.vocabulary))
    assert llama.tokenize("<s>") == [1] != hf.encode("<s>")
    assert llama.tokenize("</s>abs>") == hf.encode("</s>abs>")
    llama.close()


def test_score_is_the_rank_of_the_last_merge() -> None:
    # abc is made by rank 1 or 3; alone it is made by 3, because bc goes first. Ranks 1 and 3 are not neighbours, so it matters.
    assert token_scores([("b", "c"), ("ab", "c"), ("a", "b"), ("a", "bc")]) == {"bc": 0.0, "abc": -3.0, "ab": -2.0}
    assert token_scores([("a", "a"), ("a", "aa"), ("aa", "a")])["aaa"] == -1.0


def test_pairs_follow_the_scores() -> None:
    scores = {"a": 0.0, "b": 0.0, "ab": -2.0, "ba": -1.0, "aba": -3.0}
    assert ranked_pairs(scores, ordinary=scores, where="x") == [("b", "a"), ("a", "b"), ("a", "ba"), ("ab", "a")]
    assert ranked_pairs(scores, ordinary=scores, never_made={"ba"}, where="x") == [("a", "b"), ("a", "ba"), ("ab", "a")]


def test_tied_runs_grow_from_the_left() -> None:
    runs = {"_" * n: -1e9 for n in range(1, 4)}
    assert ranked_pairs(runs, ordinary=runs, where="x") == [("_", "__"), ("__", "_"), ("_", "_")]


def test_tied_tokens_are_refused() -> None:
    scores = {"a": -1000.0, "b": -1000.0, "ab": -1000.0, "ba": -1000.0}
    with pytest.raises(
        TokenizerError, match=r"x: tokens 'ab' and 'ba' have the same score, .* convert it again, or use the Hugging Face folder"
    ):
        ranked_pairs(scores, ordinary=scores, where="x")
    assert len(ranked_pairs(scores, ordinary={"a", "b", "ab"}, where="x")) == 2
