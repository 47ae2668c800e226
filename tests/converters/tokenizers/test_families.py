"""Every family's token ids: the `tokenizers` library, the same rebuilt from GGUF, and llama.cpp agree."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHATML, KINDS, TEXT, Family

Make = Callable[[str], Family]

# The library and llama.cpp agree on these for all input, apart from what a test below pins down.
EXACT = ("smollm2", "gpt2", "llama3", "qwen2", "phi4", "llama2", "phi3", "gemma3")
SWITCHES = [(add, parse) for add in (False, True) for parse in (False, True)]

# Code points that this Python knows: a newer Unicode version may call an unassigned one a letter in one of the libraries.
_ASSIGNED = st.characters(exclude_categories=("Cs", "Cn", "Co"))
_SPELLED = ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>", "<bos>", "<b>", "<tool_call>", "<0x0A>", "[INST]", "[PAD7]")
_LETTERS = ("'s", "'LL", "'d", "1234", "²", "the", " the", "The", "XyZ", "e\u0301", "ि", "👍🏽", "🇩🇪", "\u200d")
_SPACES = (" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t")
_PIECES = st.sampled_from(_SPELLED + _LETTERS + _SPACES)
STRINGS = st.lists(st.one_of(st.text(_ASSIGNED, max_size=6), st.sampled_from(TEXT), _PIECES), max_size=12).map("".join)


def without_capitals_inside(text: str) -> str:
    """No capital straight behind a letter or mark, where llama.cpp's o200k cut goes wrong outside ASCII."""
    out = ""
    for char in text:
        inside = bool(out) and unicodedata.category(out[-1])[0] in "LM"
        out += "_" + char if inside and unicodedata.category(char) in ("Lu", "Lt") else char
    return out


@pytest.mark.parametrize(("add", "parse"), SWITCHES)
@pytest.mark.parametrize("kind", EXACT)
def test_ids_on_the_multilingual_text(family: Make, kind: str, add: bool, parse: bool) -> None:
    one = family(kind)
    texts = [one.readable(text) for text in (TEXT, *TEXT.split("\n"))]
    if kind == "gemma3":
        texts = [text for text in texts if "▁" not in text] + [texts[0].replace("▁", "_")]
    for text in texts:
        ids = one.hf.encode(text, add_special=add, parse_special=parse)
        assert ids == one.llama.tokenize(text, add_special=add, parse_special=parse), text
        assert ids == one.gguf.encode(text, add_special=add, parse_special=parse), text


@pytest.mark.parametrize("kind", sorted(KINDS))
@settings(max_examples=150, deadline=None)
@given(text=STRINGS, parse=st.booleans())
@example(text="", parse=True)
@example(text="\x00", parse=False)
def test_ids_on_any_string(family: Make, kind: str, text: str, parse: bool) -> None:
    one = family(kind)
    ids = one.llama.tokenize(text, parse_special=parse)
    if kind != "phi3" or not parse:  # see test_white_space_behind_special_tokens
        assert one.gguf.encode(text, parse_special=parse) == ids
        if kind in EXACT:
            text = one.readable(text.replace("▁", "_") if kind == "gemma3" else without_capitals_inside(text) if kind == "phi4" else text)
            assert one.hf.encode(text, parse_special=parse) == one.llama.tokenize(text, parse_special=parse)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_decoding_gives_the_text_back(family: Make, kind: str) -> None:
    one = family(kind)
    text = one.readable(TEXT).replace("▁", "_")  # the mark of a space is a space afterwards
    ids = one.gguf.encode(text)
    assert one.gguf.decode(ids) == text
    if kind not in ("smollm2", "gpt2", "llama3"):  # for those llama.cpp tidies spaces in front of punctuation
        assert one.llama.detokenize(ids) == text
    assert one.hf.decode(one.hf.encode(text)) == text


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_special_tokens_are_text_unless_parsed(family: Make, kind: str) -> None:
    one = family(kind)
    for token in KINDS[kind].special:
        id = one.hf.vocabulary.tokens.index(token)
        assert one.hf.encode(token, parse_special=True) == [id]
        assert id not in one.hf.encode(token)
        assert one.hf.decode(one.hf.encode(token)) == token
    assert one.hf.vocabulary.chat_template == CHATML


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_bos_and_eos(family: Make, kind: str) -> None:
    one, tiny = family(kind), KINDS[kind]
    bos = [one.hf.vocabulary.tokens.index(tiny.bos)] if tiny.add_bos and tiny.bos else []
    assert one.hf.encode("The", add_special=True) == bos + one.hf.encode("The")
    assert one.hf.encode("", add_special=True) == bos == one.llama.tokenize("", add_special=True)
    assert one.llama.is_end(one.hf.vocabulary.tokens.index(tiny.eos))


# --- what llama.cpp does otherwise; the same words are in `differs`


def test_qwen2_text_that_is_not_composed(family: Make) -> None:
    one = family("qwen2")
    assert one.hf.differs == ("text that is not in Unicode normal form C (llama.cpp does not normalize)",)
    assert one.hf.encode("e\u0301") == one.hf.encode("é") == one.llama.tokenize("é")
    assert one.llama.tokenize("e\u0301") != one.hf.encode("e\u0301")
    assert one.gguf.encode("e\u0301") == one.llama.tokenize("e\u0301")


@pytest.mark.parametrize(("kind", "other"), [("phi4", ["aŁA"]), ("tekken", ["aŁA", "হায়া", "Z̧͑a"])])
def test_cuts_by_case_and_marks(family: Make, kind: str, other: list[str]) -> None:
    one = family(kind)
    assert "words in which a capital follows a small letter and one of the letters is not ASCII" in one.hf.differs[0]
    assert ("combining marks" in one.hf.differs[0]) == (kind == "tekken")
    same = ["helloWorld HTTPServer", "ПРИВЕТ мир Ελλάδα", "schöner Tag", *(["বিড়াল Z̧͑a ไทย שָׁלוֹם"] if kind == "phi4" else [])]
    for text in same:
        assert one.hf.encode(text) == one.llama.tokenize(text), text
    differing = [text for text in other if one.hf.encode(text) != one.llama.tokenize(text)]
    assert differing
    for text in same + other:
        assert one.gguf.encode(text) == one.llama.tokenize(text), text


def test_metaspace_first(family: Make) -> None:
    one = family("mistral3")
    assert one.hf.differs == (
        "text that starts with a space (the library adds no second one) and "
        "text right behind a special token (the library adds no space there)",
    )
    assert one.hf.encode("The  end ") == one.llama.tokenize("The  end ")
    assert one.hf.encode(" The") != one.llama.tokenize(" The")
    assert one.hf.encode("[INST] The", parse_special=True) != one.llama.tokenize("[INST] The", parse_special=True)
    for text in (TEXT, *TEXT.split("\n")):
        if not text.startswith(" "):
            assert one.hf.encode(text, add_special=True) == one.llama.tokenize(text, add_special=True)


def test_gemma_space_mark_itself(family: Make) -> None:
    one = family("gemma3")
    assert one.hf.differs == ("text that holds ▁ itself next to another or to spaces",)
    assert one.hf.encode("a ▁▁ b") != one.llama.tokenize("a ▁▁ b")
    assert one.hf.encode("a    b") == one.llama.tokenize("a    b")
    runs = [id for id, token in enumerate(one.hf.vocabulary.tokens) if set(token) == {"▁"}]
    assert one.llama.detokenize(runs[:2]) == " " * sum(len(one.hf.vocabulary.tokens[id]) for id in runs[:2])


def test_white_space_behind_special_tokens(family: Make) -> None:
    """Phi-3: it belongs to the token, in llama.cpp too, as long as the model is called Phi-3 and the white space is ASCII."""
    one = family("phi3")
    assert one.hf.vocabulary.strips_special and one.hf.differs == ()
    for text in ("<|user|>\n\t The<|end|>\n<|assistant|>\n", "<s>  The</s> \n<|endoftext|> x", "<|end|>  <|end|>  "):
        ids = one.hf.encode(text, parse_special=True)
        assert ids == one.llama.tokenize(text, parse_special=True) == one.gguf.encode(text, parse_special=True)
    newline = one.hf.vocabulary.tokens.index("<0x0A>")
    assert newline not in one.hf.encode("<|user|>\n", parse_special=True)
    assert one.llama.tokenize("<|user|>\u3000", parse_special=True) != one.hf.encode("<|user|>\u3000", parse_special=True)
