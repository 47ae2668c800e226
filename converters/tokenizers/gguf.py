"""Tokenizers in GGUF metadata: building one for the `tokenizers` library, and the fields that llama.cpp's converter writes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from edgeq.converters.tokenizers.library import LibraryTokenizer, load
from edgeq.converters.tokenizers.llamacpp import SPECIAL, TokenType, check_vocabulary, effective_type, is_called_phi3, strips_behind
from edgeq.converters.tokenizers.merging import Pair, ranked_pairs
from edgeq.converters.tokenizers.pretokenizers import SPACE_MARK, byte_level_row_named, normalizer_json, pre_tokenizer_json
from edgeq.errors import TokenizerError
from edgeq.gguf_fields import Field
from edgeq.gguf_file import Header
from edgeq.model import TokenKind, Vocabulary

_KINDS: dict[str, TokenKind] = {"gpt2": "bpe", "llama": "spm"}
_MODELS = {kind: model for model, kind in _KINDS.items()}
_ROLE = re.compile(r"tokenizer\.ggml\.(?P<role>\w+)_token_id")
# What llama.cpp assumes when a file of this kind does not say.
_SPM_IDS = {"bos": 1, "eos": 2, "unknown": 0}
_BPE_BOS = 11


def byte_letters() -> tuple[str, ...]:
    """The letter that byte-level merges use for each byte: itself where printable in Latin-1, else the next from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


def read_gguf_tokenizer(header: Header) -> LibraryTokenizer:
    """Build the tokenizer a GGUF file describes, to give the ids that llama.cpp gives for it.

    Raises TokenizerError for a tokenizer model or pre-tokenizer that no row describes, and for what llama.cpp would not survive.
    """
    where = str(header.path)
    vocabulary = _read_vocabulary(header, where)
    check_vocabulary(vocabulary, where)
    return LibraryTokenizer(load(tokenizer_parts(vocabulary, where), where), vocabulary)


def _read_vocabulary(header: Header, where: str) -> Vocabulary:
    model = header.value("tokenizer.ggml.model")
    if model not in _KINDS:
        raise TokenizerError(f"{where}: tokenizer.ggml.model is {model!r}; edgeq reads {' and '.join(_KINDS)}")
    kind = _KINDS[model]
    tokens = tuple(_needed(header, "tokenizer.ggml.tokens", where))
    pre = header.value("tokenizer.ggml.pre", "default")
    found = {match["role"]: field.value for key, field in header.fields.items() if (match := _ROLE.fullmatch(key))}
    add_bos = header.value("tokenizer.ggml.add_bos_token", True if kind == "spm" else byte_level_row_named(pre, where=where).add_bos)
    assumed = _SPM_IDS if kind == "spm" else {"bos": _BPE_BOS} if add_bos else {}
    return Vocabulary(
        kind=kind,
        pre=pre,
        tokens=tokens,
        types=tuple(header.value("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)),
        merges=tuple(_needed(header, "tokenizer.ggml.merges", where)) if kind == "bpe" else (),
        scores=tuple(float(score) for score in _needed(header, "tokenizer.ggml.scores", where)) if kind == "spm" else (),
        special_ids={**{role: id for role, id in assumed.items() if id < len(tokens)}, **found},
        add_bos=add_bos,
        add_eos=header.value("tokenizer.ggml.add_eos_token", False),
        add_space_prefix=header.value("tokenizer.ggml.add_space_prefix", True if kind == "spm" else None),
        chat_template=header.value("tokenizer.chat_template"),
        strips_special=is_called_phi3(header.value("general.name", "")),
    )


def _needed(header: Header, key: str, where: str) -> Sequence[Any]:
    value = header.value(key)
    if not isinstance(value, list) or not value:
        raise TokenizerError(f"{where}: {key} is missing, so the file has no usable tokenizer. Convert the model again.")
    return value


def tokenizer_json(vocabulary: Vocabulary) -> str:
    """The vocabulary as a `tokenizer.json` that gives the ids llama.cpp gives, BOS and EOS included."""
    return json.dumps(tokenizer_parts(vocabulary, "vocabulary"), ensure_ascii=False)


def tokenizer_parts(vocabulary: Vocabulary, where: str, *, as_published: bool = False) -> dict[str, Any]:
    """The parts of such a `tokenizer.json`.

    as_published: cut text as the model's own files do, where llama.cpp cuts otherwise, and leave bytes that no token has to whoever reads
    it: those are rare, and the step that llama.cpp's way takes is more than other readers than the library know.
    """
    build = _space_parts(vocabulary, where) if vocabulary.kind == "spm" else _byte_level_parts(vocabulary, where, as_published=as_published)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocabulary),
        "post_processor": post_processor(vocabulary),
        **build,
    }


def _byte_level_parts(vocabulary: Vocabulary, where: str, *, as_published: bool) -> dict[str, Any]:
    row = byte_level_row_named(vocabulary.pre, where=where)
    ids = {token: id for id, token in enumerate(vocabulary.tokens)}
    absent = "" if as_published else "".join(letter for letter in byte_letters() if letter not in ids)
    return {
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer_json(row, absent, as_published=as_published),
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": _model(ids, [_pair(merge, where) for merge in vocabulary.merges], ignore_merges=row.ignore_merges, byte_fallback=False),
    }


def _pair(merge: str, where: str) -> Pair:
    # llama.cpp looks for the space from the second byte on; a token may begin with one.
    middle = merge.find(" ", 1)
    if middle < 0:
        raise TokenizerError(f"{where}: merge {merge!r} has no space between its two tokens")
    return merge[:middle], merge[middle + 1 :]


def _space_parts(vocabulary: Vocabulary, where: str) -> dict[str, Any]:
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if vocabulary.add_space_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    scores = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    ids = {token: id for id, token in enumerate(vocabulary.tokens)}
    types = dict(zip(vocabulary.tokens, map(effective_type, vocabulary.tokens, vocabulary.types), strict=True))
    pairs = ranked_pairs(
        scores,
        ordinary={token for token, type in types.items() if type == TokenType.NORMAL},
        # With a mark of a space in it, it may still be made of spaces.
        never_made={token for token, type in types.items() if type == TokenType.USER_DEFINED and SPACE_MARK not in token},
        where=where,
    )
    return {
        "normalizer": normalizer_json(add_space_prefix=bool(vocabulary.add_space_prefix)),
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _model(ids, pairs, ignore_merges=False, byte_fallback=True),
    }


def _model(ids: Mapping[str, int], pairs: Sequence[Pair], *, ignore_merges: bool, byte_fallback: bool) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": ids,
        "merges": pairs,
    }


def _added_tokens(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Tokens found in text before anything else."""
    added = []
    for id, (token, type) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        type = effective_type(token, type)
        if type in SPECIAL or type == TokenType.USER_DEFINED:
            rstrip = vocabulary.strips_special and strips_behind(token, type)
            flags = {"single_word": False, "lstrip": False, "rstrip": rstrip, "normalized": False, "special": type in SPECIAL}
            added.append({"id": id, "content": token, **flags})
    return added


def post_processor(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """What puts BOS and EOS around a text, as a part of a `tokenizer.json`; None when the model wants neither."""
    first = [vocabulary.special_ids["bos"]] if vocabulary.add_bos else []
    last = [vocabulary.special_ids["eos"]] if vocabulary.add_eos else []
    if not first + last:
        return None

    def special(ids: Sequence[int]) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": vocabulary.tokens[id], "type_id": 0}} for id in ids]

    def sequence(name: str) -> list[dict[str, Any]]:
        return [*special(first), {"Sequence": {"id": name, "type_id": 0}}, *special(last)]

    used = {vocabulary.tokens[id]: {"id": vocabulary.tokens[id], "ids": [id], "tokens": [vocabulary.tokens[id]]} for id in first + last}
    return {"type": "TemplateProcessing", "single": sequence("A"), "pair": sequence("A") + sequence("B"), "special_tokens": used}


def tokenizer_fields(vocabulary: Vocabulary) -> list[Field]:
    """The fields llama.cpp's converter writes for this vocabulary, in its order and types."""
    fields = [
        Field.string("tokenizer.ggml.model", _MODELS[vocabulary.kind]),
        Field.string("tokenizer.ggml.pre", vocabulary.pre),
        Field.strings("tokenizer.ggml.tokens", vocabulary.tokens),
    ]
    if vocabulary.scores:
        fields.append(Field.f32s("tokenizer.ggml.scores", vocabulary.scores))
    fields.append(Field.i32s("tokenizer.ggml.token_type", vocabulary.types))
    if vocabulary.merges:
        fields.append(Field.strings("tokenizer.ggml.merges", vocabulary.merges))
    fields += [Field.u32(f"tokenizer.ggml.{role}_token_id", id) for role, id in vocabulary.special_ids.items()]
    switches = {"add_bos_token": vocabulary.add_bos, "add_eos_token": vocabulary.add_eos, "add_space_prefix": vocabulary.add_space_prefix}
    fields += [Field.boolean(f"tokenizer.ggml.{name}", value) for name, value in switches.items() if value is not None]
    if vocabulary.chat_template is not None:
        fields.append(Field.string("tokenizer.chat_template", vocabulary.chat_template))
    return fields
