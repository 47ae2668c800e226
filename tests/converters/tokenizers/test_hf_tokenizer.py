"""Reading Hugging Face folders: which file says what, which token plays which role, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tiny_tokenizers import CHATML, KINDS, LlamaVocab, tiny_tokenizer, write_vocab

from edgeq.converters.tokenizers.gguf import read_gguf_tokenizer
from edgeq.converters.tokenizers.hf import read_hf_tokenizer
from edgeq.converters.tokenizers.llamacpp import TokenType
from edgeq.errors import TokenizerError
from edgeq.gguf_file import read_header

Edit = Callable[[dict[str, Any]], None]


def edit(folder: Path, name: str, change: Edit) -> None:
    path = folder / name
    value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture(params=["smollm2"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return tiny_tokenizer(tmp_path / "model", request.param, 400)


byte_level = pytest.mark.parametrize("folder", ["smollm2"], indirect=True)
spaces = pytest.mark.parametrize("folder", ["llama2"], indirect=True)


# --- what llama.cpp's converter would write


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_roles_are_those_of_llama_cpps_converter(tmp_path: Path, kind: str) -> None:
    folder = tiny_tokenizer(tmp_path, kind, 600)
    vocabulary = read_hf_tokenizer(folder).vocabulary
    theirs = gguf.SpecialVocab(folder, load_merges=vocabulary.kind == "bpe", n_vocab=len(vocabulary.tokens))
    names = {"unk": "unknown", "pad": "padding", "sep": "seperator"}
    assert list(vocabulary.special_ids.items()) == [(names.get(role, role), id) for role, id in theirs.special_token_ids.items()]
    assert list(vocabulary.merges) == theirs.merges
    # It leaves out what it does not know, and llama.cpp then assumes things; we always say.
    for role, added in (("bos", vocabulary.add_bos), ("eos", vocabulary.add_eos)):
        assert added == theirs.add_special_token.get(role, False)
    assert vocabulary.chat_template == theirs.chat_template == CHATML


def test_types(tmp_path: Path) -> None:
    vocabulary = read_hf_tokenizer(tiny_tokenizer(tmp_path, "phi3", 600)).vocabulary
    kinds = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert kinds["<unk>"] == TokenType.UNKNOWN
    assert kinds["<s>"] == kinds["<|end|>"] == TokenType.CONTROL
    assert kinds["</s>"] == TokenType.CONTROL  # not special in the file, but llama.cpp ends a generation there
    assert kinds["<0x41>"] == TokenType.BYTE and kinds["e"] == TokenType.NORMAL
    assert vocabulary.kind == "spm" and vocabulary.pre == "default" and vocabulary.add_space_prefix is True
    gemma = read_hf_tokenizer(tiny_tokenizer(tmp_path / "gemma", "gemma3", 600)).vocabulary
    kinds = dict(zip(gemma.tokens, gemma.types, strict=True))
    assert kinds["<b>"] == kinds["\n\n"] == TokenType.USER_DEFINED
    assert kinds["<unused0>"] == TokenType.CONTROL and kinds["▁▁"] == TokenType.NORMAL
    assert gemma.add_space_prefix is False


# --- sizes


def test_holes_are_filled(folder: Path) -> None:
    edit(folder, "config.json", lambda c: c.update(vocab_size=403))
    vocabulary = read_hf_tokenizer(folder).vocabulary
    assert vocabulary.tokens[399:] == ("<repo_name>", "[PAD400]", "[PAD401]", "[PAD402]")
    assert vocabulary.types[400:] == (TokenType.UNUSED,) * 3
    assert len(read_hf_tokenizer(folder, n_vocab=410).vocabulary.tokens) == 410
    edit(folder, "config.json", lambda c: c.update(text_config={"vocab_size": c.pop("vocab_size")}))
    assert len(read_hf_tokenizer(folder).vocabulary.tokens) == 403


@spaces
def test_holes_do_not_change_ids(folder: Path, tmp_path: Path) -> None:
    """Unused tokens have scores and no merges: nothing merges to them, in either reading."""
    tokenizer = read_hf_tokenizer(folder, n_vocab=420)
    llama = LlamaVocab(write_vocab(tmp_path / "v.gguf", tokenizer.vocabulary))
    text = "[PAD410] [PAD41 PAD410] the\n"
    assert tokenizer.encode(text, parse_special=True) == llama.tokenize(text, parse_special=True)
    llama.close()


def test_more_tokens_than_rows(folder: Path) -> None:
    with pytest.raises(
        TokenizerError, match=r"tokenizer.json: 4 tokens lie beyond the embedding, which has 396 rows; the first is '<\|endo"
    ):
        read_hf_tokenizer(folder, n_vocab=396)


@spaces
def test_gemmas_image_token_beyond_the_embedding(folder: Path) -> None:
    n = len(read_hf_tokenizer(folder).vocabulary.tokens)
    image = {"content": "<image_soft_token>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    edit(folder, "tokenizer.json", lambda t: t["added_tokens"].append({"id": n, **image}))
    tokenizer = read_hf_tokenizer(folder, n_vocab=n)
    assert len(tokenizer.vocabulary.tokens) == n
    assert max(tokenizer.encode("<image_soft_token>", parse_special=True)) < n
    assert len(read_hf_tokenizer(folder).vocabulary.tokens) == n + 1


# --- files


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ([], r"model: there is no tokenizer.json, nor another tokenizer file. Save it with transformers"),
        (["tokenizer.model"], r"there is no tokenizer.json, only tokenizer.model, which edgeq does not read. Save it with transformers"),
    ],
)
def test_no_tokenizer_json(folder: Path, others: list[str], says: str) -> None:
    (folder / "tokenizer.json").unlink()
    for name in others:
        (folder / name).touch()
    with pytest.raises(TokenizerError, match=says):
        read_hf_tokenizer(folder)


def test_broken_files(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text("{")
    with pytest.raises(TokenizerError, match=r"generation_config.json: cannot be read as JSON: .*Fetch the file again"):
        read_hf_tokenizer(folder)
    path.write_text("[]")
    with pytest.raises(TokenizerError, match=r"generation_config.json: holds a list, expected an object"):
        read_hf_tokenizer(folder)
    path.unlink()
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"chat_template.jinja: cannot be read as UTF-8 text"):
        read_hf_tokenizer(folder)


def post(*before: str, behind: tuple[str, ...] = ()) -> dict[str, Any]:
    def special(tokens: tuple[str, ...]) -> list[Any]:
        return [{"SpecialToken": {"id": token, "type_id": 0}} for token in tokens]

    single = [*special(before), {"Sequence": {"id": "A", "type_id": 0}}, *special(behind)]
    known = {token: {"id": token, "ids": [0], "tokens": [token]} for token in before + behind}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": known}


def swap(key: str, value: Any) -> Edit:
    return lambda tokenizer: tokenizer.update({key: value})


def in_model(key: str, value: Any) -> Edit:
    return lambda tokenizer: tokenizer["model"].update({key: value})


BROKEN: list[tuple[Edit, str]] = [
    (in_model("type", "Unigram"), r"model is of type 'Unigram'; edgeq can carry only BPE"),
    (swap("model", None), r"model is of type None"),
    (in_model("vocab", {}), r"model.vocab is empty or broken; expected an id for every token"),
    (in_model("vocab", {"a": "b"}), r"model.vocab is empty or broken"),
    (swap("added_tokens", {"a": 1}), r"added_tokens is a dict, expected a list"),
    (in_model("dropout", 0.1), r"model.dropout is 0.1; llama.cpp has nothing like it"),
    (in_model("end_of_word_suffix", "</w>"), r"model.end_of_word_suffix is '</w>'"),
    (in_model("merges", ["a b c"]), r"cannot load it: .*Fetch the file again"),
    (in_model("merges", [["e", "zzz"]]), r"cannot load it: Token `zzz` out of vocabulary"),
    (in_model("merges", []), r"there are no merges, which llama.cpp needs"),
    (swap("normalizer", {"type": "Lowercase"}), r"normalizer step \{'type': 'Lowercase'\} is not one edgeq can carry"),
    (
        swap("normalizer", {"type": "Prepend", "prepend": "▁"}),
        r"expects no normalizer but NFC and a pre_tokenizer that ends in ByteLevel; found normalizer \[prepend '▁'\] and pre_tokenizer "
        r"\[digits, gpt2, byte level\]",
    ),
    (
        swap("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}),
        r"pre_tokenizer \[\] is not one edgeq",
    ),
    (
        swap("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}),
        r"decoder 'WordPiece' is not one edgeq can carry to llama.cpp. Known: ByteLevel",
    ),
    (
        swap("post_processor", {"type": "BertProcessing", "sep": ["!", 0], "cls": ["!", 0]}),
        r"post_processor 'BertProcessing' is not one .* Known: ByteLevel and Template",
    ),
    (
        swap("post_processor", post("<|im_start|>", "<|im_end|>")),
        r"adds \['<\|im_start\|>', '<\|im_end\|>'\] before a text and \[\] behind",
    ),
    (swap("post_processor", post("<|im_end|>")), r"begins texts with '<\|im_end\|>', but bos_token is '<\|im_start\|>'. Name the same"),
    (swap("post_processor", post("<nowhere>")), r"the post_processor adds '<nowhere>', which is not in the vocabulary"),
    (lambda t: t["added_tokens"].append({"content": "x"}), r"added_tokens\[4\] has no content and id: \{'content': 'x'\}"),
    (lambda t: t["added_tokens"][0].update(id=5), r"id 5 is both '.' and '<\|endoftext\|>'"),
]


@pytest.mark.parametrize(("change", "says"), BROKEN, ids=[says for _, says in BROKEN])
def test_what_no_row_describes_is_refused(folder: Path, change: Edit, says: str) -> None:
    read_hf_tokenizer(folder)
    edit(folder, "tokenizer.json", change)
    with pytest.raises(TokenizerError, match=r"model.tokenizer\.json: .*" + says):
        read_hf_tokenizer(folder)


@spaces
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            swap("normalizer", None),
            r"normalizer and pre_tokenizer \[\] are not ones edgeq knows for merges with byte fallback. Known: prepend and",
        ),
        (
            swap("decoder", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}),
            r"decoder 'ByteLevel' is not one .* Known: ByteFallback, Fuse, Metaspace, Replace, Strip",
        ),
        (
            lambda t: t["model"]["vocab"].update({"<0x41 >": t["model"]["vocab"].pop("<0x41>")}),
            r"1 of the 256 byte tokens are missing \(<0x41> ",
        ),
        (
            lambda t: t.update(normalizer=None, pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"}),
            r"Metaspace cuts in front of every space, so token '▁▁' is never made; llama.cpp does not cut there",
        ),
    ],
)
def test_what_no_row_describes_is_refused_with_marked_spaces(folder: Path, change: Edit, says: str) -> None:
    read_hf_tokenizer(folder)
    edit(folder, "tokenizer.json", change)
    with pytest.raises(TokenizerError, match=r"model.tokenizer\.json: .*" + says):
        read_hf_tokenizer(folder)


@byte_level
def test_merges_in_the_older_spelling(folder: Path) -> None:
    newer = read_hf_tokenizer(folder).vocabulary
    edit(folder, "tokenizer.json", lambda t: t["model"].update(merges=[" ".join(merge) for merge in t["model"]["merges"]]))
    assert read_hf_tokenizer(folder).vocabulary == newer


@byte_level
def test_merges_with_spaces_do_nothing(folder: Path, tmp_path: Path) -> None:
    """A byte-level text has no spaces left, and GGUF could not spell the pair."""
    before = read_hf_tokenizer(folder)

    def with_space(tokenizer: dict[str, Any]) -> None:
        n = max(tokenizer["model"]["vocab"].values())
        tokenizer["added_tokens"] = [{**token, "id": token["id"] + 2} for token in tokenizer["added_tokens"]]
        tokenizer["model"]["vocab"] |= {" ": n + 1, " e": n + 2}
        tokenizer["model"]["merges"].append([" ", "e"])

    edit(folder, "tokenizer.json", with_space)
    after = read_hf_tokenizer(folder)
    assert after.vocabulary.merges == before.vocabulary.merges
    llama = LlamaVocab(write_vocab(tmp_path / "v.gguf", after.vocabulary))
    assert after.encode("the  end e") == before.encode("the  end e") == llama.tokenize("the  end e")
    llama.close()


# --- whole words


def test_ignore_merges_must_not_matter_or_agree(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path / "model", "llama3", 400)
    assert read_hf_tokenizer(folder).vocabulary.pre == "llama-bpe"
    edit(folder, "tokenizer.json", in_model("ignore_merges", False))
    assert read_hf_tokenizer(folder).vocabulary.pre == "llama-bpe"  # merges make every token, so nothing is cut short

    def without_last_merge(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"]["merges"].pop()

    edit(folder, "tokenizer.json", without_last_merge)
    assert read_hf_tokenizer(folder).vocabulary.pre == "dbrx"  # the same cut, without taking words whole
    folder = tiny_tokenizer(tmp_path / "qwen", "qwen2", 400)
    edit(folder, "tokenizer.json", without_last_merge)
    edit(folder, "tokenizer.json", in_model("ignore_merges", True))
    with pytest.raises(
        TokenizerError, match=r"model.ignore_merges is true, which llama.cpp has the other way round for 'qwen2', .* for token '"
    ):
        read_hf_tokenizer(folder)
    folder = tiny_tokenizer(tmp_path / "phi", "phi4", 400)
    edit(folder, "tokenizer.json", without_last_merge)
    assert read_hf_tokenizer(folder).vocabulary.pre == "gpt-4o"


@byte_level
def test_bytes_that_the_vocabulary_lacks(folder: Path, tmp_path: Path) -> None:
    """SmolLM2 has no letter for some control characters. Both leave them out, llama.cpp after merging."""

    def without_bell(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"]["vocab"]["unbelled"] = tokenizer["model"]["vocab"].pop("ć")  # byte 07

    edit(folder, "tokenizer.json", without_bell)
    hf = read_hf_tokenizer(folder)
    assert hf.differs == ("text with UTF-8 bytes that the vocabulary lacks (07; llama.cpp leaves them out after merging)",)
    file = write_vocab(tmp_path / "v.gguf", hf.vocabulary)
    llama, back = LlamaVocab(file), read_gguf_tokenizer(read_header(file))
    left, right = next(merge.split() for merge in hf.vocabulary.merges if len(merge) == 3 and not merge[0].isalnum() and merge[0].isascii())
    for text in ("th\x07e", "\x07", f"{left}\x07\x07{right}"):
        assert back.encode(text) == llama.tokenize(text)
    assert hf.encode(f"{left}\x07{right}") == hf.encode(left + right) != llama.tokenize(f"{left}\x07{right}")
    llama.close()


# --- roles


def roles(folder: Path) -> dict[str, int]:
    return dict(read_hf_tokenizer(folder).vocabulary.special_ids)


@byte_level
def test_where_roles_come_from(folder: Path) -> None:
    ids = {token: 396 + i for i, token in enumerate(KINDS["smollm2"].special)}
    assert roles(folder) == {"bos": 397, "eos": 398, "unknown": 396, "padding": 398}
    edit(folder, "tokenizer_config.json", lambda c: [c.pop(f"{role}_token") for role in ("bos", "unk", "pad")])
    edit(folder, "special_tokens_map.json", lambda m: m.update(pad_token={"content": "<repo_name>"}, eos_token="<|endoftext|>"))
    edit(folder, "config.json", lambda c: c.update(bos_token_id=396, pad_token_id=397, sep_token_id=3, mask_token_id=4000))
    assert roles(folder) == {"bos": 396, "eos": ids["<|im_end|>"], "seperator": 3, "padding": ids["<repo_name>"]}


@byte_level
def test_everything_that_ends_a_generation(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(folder, "generation_config.json", lambda g: g.update(eos_token_id=[398, 396, 399, 9999]))
    assert roles(folder) == {"bos": 397, "eos": 398, "unknown": 396, "padding": 398, "eot": 399}  # <|endoftext|> ends it by its name
    llama = LlamaVocab(write_vocab(tmp_path / "v.gguf", read_hf_tokenizer(folder).vocabulary))
    assert [id for id in range(400) if llama.is_end(id)] == [396, 398, 399]
    llama.close()
    edit(folder, "generation_config.json", lambda g: g.update(eos_token_id=[398, 399, 5, 6]))
    assert roles(folder)["eom"] == 5
    assert (
        "tokenizer.json: '\\'' ends a generation too, but GGUF has no place left" in caplog.text or "ends a generation too" in caplog.text
    )
    edit(folder, "tokenizer_config.json", lambda c: c.pop("eos_token"))
    edit(folder, "generation_config.json", lambda g: g.update(eos_token_id=396))
    assert roles(folder)["eos"] == 396
    (folder / "generation_config.json").unlink()
    with pytest.raises(TokenizerError, match=r"no EOS token is named, and llama.cpp would take an arbitrary one. Name eos_token in"):
        read_hf_tokenizer(folder)


@byte_level
@pytest.mark.parametrize(
    ("processor", "switches", "expected"),
    [
        (None, {}, (False, False)),
        (None, {"add_bos_token": True, "add_eos_token": True}, (True, True)),
        ({"type": "ByteLevel"}, {"add_bos_token": True}, (False, False)),
        (post("<|im_start|>"), {"add_bos_token": False}, (True, False)),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, post("<|im_start|>", behind=("<|im_end|>",))]}, {}, (True, True)),
        (post(), {"add_bos_token": True}, (True, False)),
    ],
)
def test_what_is_put_around_a_text(
    folder: Path, tmp_path: Path, processor: Any, switches: dict[str, bool], expected: tuple[bool, bool]
) -> None:
    if processor is not None and processor["type"] == "ByteLevel":
        processor = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    elif processor is not None and "processors" in processor:
        processor["processors"][0] |= {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    edit(folder, "tokenizer.json", swap("post_processor", processor))
    edit(folder, "tokenizer_config.json", lambda c: c.update(switches))
    tokenizer = read_hf_tokenizer(folder)
    vocabulary = tokenizer.vocabulary
    assert (vocabulary.add_bos, vocabulary.add_eos) == expected
    around = ([397] if expected[0] else [], [398] if expected[1] else [])
    llama = LlamaVocab(write_vocab(tmp_path / "v.gguf", vocabulary))
    plain = tokenizer.encode("The end")
    assert tokenizer.encode("The end", add_special=True) == around[0] + plain + around[1] == llama.tokenize("The end", add_special=True)
    llama.close()


@byte_level
def test_a_text_closed_by_another_token_than_eos(folder: Path) -> None:
    edit(folder, "tokenizer.json", swap("post_processor", post(behind=("<|endoftext|>",))))
    vocabulary = read_hf_tokenizer(folder).vocabulary
    assert vocabulary.special_ids["eos"] == 396 and vocabulary.special_ids["eot"] == 398
    theirs = gguf.SpecialVocab(folder, load_merges=True)
    assert theirs.special_token_ids["eos"] == 396 and theirs.special_token_ids["eot"] == 398


@byte_level
def test_bos_is_to_be_added_but_there_is_none(folder: Path) -> None:
    edit(folder, "tokenizer.json", swap("post_processor", None))
    edit(folder, "tokenizer_config.json", lambda c: c.update(add_bos_token=True, bos_token=None))
    with pytest.raises(TokenizerError, match=r"texts are to begin with a BOS token, but none is named. Name bos_token in tokenizer_config"):
        read_hf_tokenizer(folder)


# --- added tokens


@byte_level
def test_flags_of_the_config_win(folder: Path) -> None:
    assert 399 not in read_hf_tokenizer(folder).encode("<repo_name>")
    flags = {"399": {"content": "<repo_name>", "special": False}, "396": {"content": "something else", "special": False}}
    edit(folder, "tokenizer_config.json", lambda c: c.update(added_tokens_decoder=flags))
    tokenizer = read_hf_tokenizer(folder)
    assert tokenizer.vocabulary.types[396:] == (3, 3, 3, TokenType.USER_DEFINED)
    assert tokenizer.encode("a<repo_name>b")[1] == 399


@byte_level
def test_what_llama_cpp_finds_by_its_spelling(folder: Path, tmp_path: Path) -> None:
    """Tokens that are not special here and cannot be anything else there; and the other way round."""

    def rename(tokenizer: dict[str, Any]) -> None:
        for entry, (token, special) in zip(
            tokenizer["added_tokens"], [("<EOT>", False), ("<|call me|>", False), ("</s>", True), ("<|start|>", True)], strict=True
        ):
            entry.update(content=token, special=special)

    edit(folder, "tokenizer.json", rename)
    edit(folder, "tokenizer_config.json", lambda c: (c.clear(), c.update(eos_token="</s>")))
    tokenizer = read_hf_tokenizer(folder)
    assert tokenizer.vocabulary.types[396:] == (3, 3, 3, TokenType.USER_DEFINED)
    llama = LlamaVocab(write_vocab(tmp_path / "v.gguf", tokenizer.vocabulary))
    for parse in (False, True):
        text = "a<EOT>b<|call me|>c</s>d<|start|>e"
        assert tokenizer.encode(text, parse_special=parse) == llama.tokenize(text, parse_special=parse)
        assert len(tokenizer.encode(text, parse_special=parse)) == (9 if parse else len(tokenizer.encode("a<EOT>b<|call me|>c</s>d")) + 2)
    llama.close()


@byte_level
def test_an_ordinary_token_with_a_special_spelling(folder: Path) -> None:
    edit(folder, "tokenizer.json", lambda t: t["added_tokens"].pop(0))
    edit(folder, "tokenizer.json", lambda t: t["model"]["vocab"].update({"<PRE>": 396}))
    edit(folder, "tokenizer_config.json", lambda c: c.pop("unk_token"))
    differs = "text that spells <PRE> while special tokens are parsed (ordinary tokens for the library)"
    assert read_hf_tokenizer(folder).differs == (differs,)


@byte_level
def test_white_space_around_tokens_outside_phi3(folder: Path, tmp_path: Path) -> None:
    edit(folder, "tokenizer.json", lambda t: t["added_tokens"][1].update(rstrip=True))
    edit(folder, "tokenizer.json", lambda t: t["added_tokens"][2].update(lstrip=True))
    tokenizer = read_hf_tokenizer(folder)
    assert not tokenizer.vocabulary.strips_special
    assert tokenizer.differs == (
        "text with white space or letters right next to <|im_end|>, <|im_start|>, which the library treats in its own way",
    )
    llama = LlamaVocab(write_vocab(tmp_path / "v.gguf", tokenizer.vocabulary))
    assert tokenizer.encode("<|im_start|> The", parse_special=True) != llama.tokenize("<|im_start|> The", parse_special=True)
    assert tokenizer.encode("<|im_start|>The", parse_special=True) == llama.tokenize("<|im_start|>The", parse_special=True)
    llama.close()


@spaces
def test_added_tokens_marked_normalized(folder: Path, tmp_path: Path) -> None:
    n = len(read_hf_tokenizer(folder).vocabulary.tokens)
    token = {
        "id": n,
        "content": "<|im_start|>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": True,
        "special": True,
    }
    edit(folder, "tokenizer.json", lambda t: t["added_tokens"].append(token))
    tokenizer = read_hf_tokenizer(folder)
    assert tokenizer.differs == ("added tokens marked normalized (<|im_start|>), which the library finds only behind a space",)
    llama = LlamaVocab(write_vocab(tmp_path / "v.gguf", tokenizer.vocabulary))
    assert n in llama.tokenize("a<|im_start|>", parse_special=True)
    assert n not in tokenizer.encode("a<|im_start|>", parse_special=True)
    llama.close()


# --- chat templates


@byte_level
def test_chat_template_places(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def template() -> str | None:
        return read_hf_tokenizer(folder).vocabulary.chat_template

    assert template() == CHATML
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    edit(folder, "tokenizer_config.json", lambda c: c.update(chat_template=named))
    assert template() == "plain"
    edit(folder, "tokenizer_config.json", lambda c: c.update(chat_template=named[:1]))
    assert template() is None
    assert "no chat template is called default, only tool_use" in caplog.text
    edit(folder, "tokenizer_config.json", lambda c: c.pop("chat_template"))
    assert template() is None
    edit(folder, "chat_template.json", lambda c: c.update(chat_template="beside"))
    assert template() == "beside"
    (folder / "chat_template.jinja").write_text("own file\r\n", newline="")
    assert template() == "own file\n"
