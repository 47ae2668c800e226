"""Text to ids and back, as the tokenizers library and llama.cpp do it for the same vocabulary."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import CHAT_TEMPLATE, N_VOCAB, SPECIAL_TOKENS, edit_json, tiny_tokenizer, write_tokenizer
from tiny_gguf import write_tiny_gguf

from edgeq.errors import MissingDependency, TokenizerError
from edgeq.runtime.llama import LlamaModel
from edgeq.runtime.onnx_tokenizer import OnnxTokenizer

TEXTS = ["the quick brown fox", " two  spaces", "Größe 12\n", "<|im_start|>user\nhi<|im_end|>", "a😀你好 é\u0301", "", "<|im_end"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


def opened(folder: Path, *, bos: int | None = 1, eos: int | None = 2) -> OnnxTokenizer:
    return OnnxTokenizer(folder, bos=bos, eos=eos)


def sentencepiece(folder: Path) -> None:
    """A vocabulary as Llama 2's: spaces are U+2581, bytes without a token are <0xE4>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    model = models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_vocabularies_agree_with_llama_cpp(folder: Path, text: str) -> None:
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(add_bos_token=True))
    tokenizer = opened(folder)
    assert tokenizer.n_tokens == N_VOCAB
    with LlamaModel.load(write_tiny_gguf(folder / "tiny.gguf"), vocab_only=True) as llama:
        for add in (False, True):
            for parse in (False, True):
                ids = tokenizer.encode(text, add_special=add, parse_special=parse)
                assert ids == llama.tokenize(text, add_special=add, parse_special=parse)
                for special in (False, True):
                    pieces = [tokenizer.piece(id, special=special) for id in ids]
                    assert pieces == [llama.token_to_piece(id, special=special) for id in ids]
                    assert tokenizer.decode(ids, special=special) == llama.detokenize(ids, special=special)
                assert [tokenizer.text(id) for id in ids] == [llama.token_text(id) for id in ids]


def test_every_byte_has_a_piece(folder: Path) -> None:
    tokenizer = opened(folder)
    pieces = {tokenizer.piece(id, special=False) for id in range(N_VOCAB)}
    assert {bytes([byte]) for byte in range(256)} <= pieces


def test_sentencepiece_like_vocabularies(tmp_path: Path) -> None:
    sentencepiece(tmp_path)
    tokenizer = opened(tmp_path)
    ids = tokenizer.encode("ab aä", add_special=False, parse_special=False)
    assert [tokenizer.text(id) for id in ids] == ["▁ab", "▁a", "<0xC3>", "<0xA4>"]
    assert [tokenizer.piece(id, special=False) for id in ids] == [b" ab", b" a", b"\xc3", b"\xa4"]
    assert tokenizer.decode(ids, special=False) == "ab aä"
    assert tokenizer.piece(1, special=False) == b"" and tokenizer.piece(1, special=True) == b"<s>"


def test_the_post_processor_goes_before_the_switches(folder: Path) -> None:
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="<|im_end|> $A", special_tokens=[("<|im_end|>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(add_bos_token=True, add_eos_token=True))
    plain = opened(folder).encode("the", add_special=False, parse_special=False)
    assert opened(folder).encode("the", add_special=True, parse_special=False) == [2, *plain]


def test_switches_without_a_post_processor(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(add_bos_token=True, add_eos_token=True))
    plain = opened(folder).encode("the", add_special=False, parse_special=False)
    assert opened(folder).encode("the", add_special=True, parse_special=False) == [1, *plain, 2]
    assert opened(folder, bos=None, eos=None).encode("the", add_special=True, parse_special=False) == plain


def test_truncation_and_padding_of_the_file_are_not_used(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert len(opened(folder).encode("the quick brown fox", add_special=False, parse_special=False)) > 9


def test_ids_beyond_the_vocabulary_are_padding(folder: Path) -> None:
    tokenizer = opened(folder)
    assert (tokenizer.text(400), tokenizer.piece(400, special=True)) == ("[PAD400]", b"")


def test_added_tokens_that_are_not_special_are_text(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    found = opened(folder)
    assert found.encode("<think>", add_special=False, parse_special=False) == [N_VOCAB]
    assert found.piece(N_VOCAB, special=False) == b"<think>"
    assert found.piece(1, special=False) == b"" and found.text(1) == SPECIAL_TOKENS[1]


def test_chat_templates(folder: Path) -> None:
    assert opened(folder).chat_template() == CHAT_TEMPLATE
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(chat_template=named))
    assert opened(folder).chat_template() == "d"
    (folder / "chat_template.jinja").write_text("{{ 'ö' }}", encoding="utf-8")
    assert opened(folder).chat_template() == "{{ 'ö' }}"
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{{")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja: cannot be read as UTF-8 text"):
        opened(folder).chat_template()
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert opened(folder).chat_template() is None


def test_a_missing_or_broken_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: len(text) // 2], encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: the tokenizers library cannot load it: .* Copy or export the folder again"):
        opened(folder)
    path.unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is missing: without it no text becomes tokens\. Copy the whole folder"):
        opened(folder)


@pytest.mark.parametrize(("content", "message"), [("{", "cannot be read as JSON"), ("[]", "holds a list, expected an object")])
def test_a_broken_configuration(folder: Path, content: str, message: str) -> None:
    (folder / "tokenizer_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(TokenizerError, match=rf"tokenizer_config\.json: {message}"):
        opened(folder)


def test_decoders_that_have_no_bytes(folder: Path) -> None:
    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}

    edit_json(folder / "tokenizer.json", change)
    with pytest.raises(TokenizerError, match=r"decoder \['WordPiece'\] is none that edgeq can take text from piece by piece\. Known: Byte"):
        opened(folder)
    edit_json(folder / "tokenizer.json", lambda tokenizer: tokenizer.update(decoder=None))
    with pytest.raises(TokenizerError, match=r"decoder \['None'\] is none that edgeq can take"):
        opened(folder)


def test_texts_that_are_none(folder: Path) -> None:
    for text in ("\ud800", 7):
        with pytest.raises(TokenizerError, match=r"text cannot be tokenized: .* Repair its encoding"):
            opened(folder).encode(text, add_special=False, parse_special=False)  # type: ignore[arg-type]


def test_without_tokenizers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependency, match=r"tokenizers is not installed. Install it with: pip install 'edgeq\[onnx\]'"):
        opened(folder)
    assert json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
