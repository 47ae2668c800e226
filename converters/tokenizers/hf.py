"""Tokenizers in Hugging Face folders: run by the `tokenizers` library, seen as llama.cpp has to see them.

Where llama.cpp is known to give other ids than the library, a warning says on which input, and so does `LibraryTokenizer.differs`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from edgeq.converters.tokenizers.hf_files import HfFiles, chat_template, read_hf_files
from edgeq.converters.tokenizers.hf_merges import Added, byte_level, marked_spaces
from edgeq.converters.tokenizers.hf_special import read_specials
from edgeq.converters.tokenizers.library import LibraryTokenizer, load, merges_alone
from edgeq.converters.tokenizers.llamacpp import (
    SPECIAL,
    TokenType,
    can_be_called_phi3,
    check_vocabulary,
    effective_type,
    strips_behind,
)
from edgeq.errors import TokenizerError
from edgeq.model import Vocabulary

log = logging.getLogger(__name__)

# Text-only Gemma 3 names this token one past its embedding. https://huggingface.co/google/gemma-3-1b-it
_WITHOUT_ROW = frozenset({"<image_soft_token>"})
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def read_hf_tokenizer(folder: Path, *, n_vocab: int | None = None) -> LibraryTokenizer:
    """Read the tokenizer of a Hugging Face folder.

    n_vocab: rows of the embedding; `vocab_size` of config.json when not given. Ids up to it that have no token get unused ones.
    Raises TokenizerError that names the file and the part: files missing or broken, a structure that no row describes, more tokens
    than rows, tokens that llama.cpp would merge otherwise.
    """
    files = read_hf_files(folder)
    tokens = _tokens(files)
    rows = n_vocab if n_vocab is not None else files.model_config.get("vocab_size", files.text_config.get("vocab_size"))
    rowless = _without_row(tokens, rows, files.where)
    tokens = {id: token for id, token in tokens.items() if id not in rowless}
    added = [entry for entry in added_tokens(files) if entry["id"] not in rowless]
    library = load({**files.tokenizer, "added_tokens": added}, files.where)
    types = _types(tokens, added, files)
    specials = read_specials(files, tokens)
    ids = range(max(max(tokens) + 1, rows or 0))
    plain = Vocabulary(
        kind="spm" if files.model.get("byte_fallback") else "bpe",
        pre="default",
        tokens=tuple(tokens.get(id, f"[PAD{id}]") for id in ids),
        types=tuple(types.get(id, TokenType.UNUSED) for id in ids),
        special_ids=specials.ids,
        add_bos=specials.add_bos,
        add_eos=specials.add_eos,
        chat_template=chat_template(files),
    )
    complete = marked_spaces if plain.kind == "spm" else byte_level
    vocabulary, differs = complete(files, plain, added, merges_alone(library))
    vocabulary, more = _white_space(vocabulary, added)
    check_vocabulary(vocabulary, files.where)
    differs = [*differs, *more, *_found_by_spelling(vocabulary)]
    for text in differs:
        log.warning("%s: llama.cpp gives other token ids than the Hugging Face tokenizer for %s", files.where, text)
    return LibraryTokenizer(library, vocabulary, differs, folder=folder)


def _tokens(files: HfFiles) -> dict[int, str]:
    """Spelling by id, of the model's vocabulary and the added tokens."""
    tokens: dict[int, str] = {}
    added = [(entry["content"], entry["id"]) for entry in files.tokenizer.get("added_tokens") or ()]
    for token, id in [*files.model["vocab"].items(), *added]:
        if tokens.setdefault(id, token) != token:
            raise TokenizerError(f"{files.where}: id {id} is both {tokens[id]!r} and {token!r}. Fetch the file again.")
    return tokens


def _without_row(tokens: Mapping[int, str], rows: int | None, where: str) -> frozenset[int]:
    """Ids beyond the embedding whose tokens are known to be of no use; TokenizerError for any other."""
    beyond = sorted(id for id in tokens if rows is not None and id >= rows)
    missed = [id for id in beyond if tokens[id] not in _WITHOUT_ROW]
    if missed:
        raise TokenizerError(
            f"{where}: {len(missed)} tokens lie beyond the embedding, which has {rows} rows; the first is {tokens[missed[0]]!r} with id "
            f"{missed[0]}. Resize the embedding (model.resize_token_embeddings) or take the tokenizer the model was trained with."
        )
    return frozenset(beyond)


def added_tokens(files: HfFiles) -> Added:
    """`added_tokens` with the flags of tokenizer_config.json, which win in transformers; special where they are for llama.cpp.

    What llama.cpp takes for a control token has to be plain text for the library too when special tokens are not to be parsed.
    """
    newer = {int(id): entry for id, entry in (files.config.get("added_tokens_decoder") or {}).items()}
    added = []
    for entry in files.tokenizer.get("added_tokens") or ():
        flags = newer.get(entry["id"], {})
        if flags.get("content") == entry["content"]:
            entry = {**entry, **{flag: flags[flag] for flag in _FLAGS if flag in flags}}
        special = entry.get("special", False) or _looks_special(entry["content"])
        type = effective_type(entry["content"], TokenType.CONTROL if special else TokenType.USER_DEFINED)
        added.append({**entry, "special": type in SPECIAL})
    return added


def _looks_special(token: str) -> bool:
    """Control tokens that are not marked special, by their looks (command-r, deepseek-coder, gemma); a rule of llama.cpp's converter."""
    frames = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(token.startswith(a) and token.endswith(b) for a, b in frames)


def _types(tokens: Mapping[int, str], added: Added, files: HfFiles) -> dict[int, int]:
    types: dict[int, int] = dict.fromkeys(tokens, TokenType.NORMAL)
    for entry in added:
        unknown = bool(files.model.get("byte_fallback")) and entry["content"] == files.model.get("unk_token")
        special = TokenType.UNKNOWN if unknown else TokenType.CONTROL
        types[entry["id"]] = special if entry["special"] else TokenType.USER_DEFINED
    return types


def _white_space(vocabulary: Vocabulary, added: Added) -> tuple[Vocabulary, list[str]]:
    """White space that belongs to added tokens: llama.cpp knows one rule, that of Phi-3; anything else is a difference."""
    behind = {entry["content"] for entry in added if entry.get("rstrip")}
    phi3 = {token for token, type in zip(vocabulary.tokens, vocabulary.types, strict=True) if strips_behind(token, type)}
    if behind and behind == phi3 and can_be_called_phi3(vocabulary.tokens):
        vocabulary, behind = replace(vocabulary, strips_special=True), set()
    others = sorted(behind | {entry["content"] for entry in added if entry.get("lstrip") or entry.get("single_word")})
    if not others:
        return vocabulary, []
    return vocabulary, [f"text with white space or letters right next to {_some(others)}, which the library treats in its own way"]


def _found_by_spelling(vocabulary: Vocabulary) -> list[str]:
    types = zip(vocabulary.tokens, vocabulary.types, strict=True)
    found = [token for token, type in types if type == TokenType.NORMAL and effective_type(token, type) != type]
    return [f"text that spells {_some(found)} while special tokens are parsed (ordinary tokens for the library)"] if found else []


def _some(tokens: Iterable[str]) -> str:
    tokens = list(tokens)
    return ", ".join(tokens[:4]) + (f" and {len(tokens) - 4} more" if len(tokens) > 4 else "")
