"""Merges of a Hugging Face tokenizer and what stands around them, as llama.cpp has to be told.

Both functions take the folder's files, its added tokens, the library's merges alone (`model`, without cuts and added tokens) and a
vocabulary that lacks merges, and return the whole vocabulary and the kinds of input for which llama.cpp gives other ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from edgeq.converters.tokenizers.gguf import byte_letters
from edgeq.converters.tokenizers.hf_files import HfFiles
from edgeq.converters.tokenizers.library import load
from edgeq.converters.tokenizers.llamacpp import BYTE_TOKENS, TokenType
from edgeq.converters.tokenizers.merging import Pair, token_scores
from edgeq.converters.tokenizers.pretokenizers import (
    SPACE_MARK,
    ByteLevelRow,
    Step,
    byte_level_rows,
    describe,
    metaspace_splits,
    normalizer_steps,
    pre_tokenizer_steps,
    space_row,
)
from edgeq.errors import TokenizerError
from edgeq.model import Vocabulary

Added = Sequence[Mapping[str, Any]]

# Bytes that no UTF-8 text holds.
_NEVER_IN_TEXT = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})
_BYTE_LEVEL_DECODERS = frozenset({"ByteLevel"})
_SPACE_DECODERS = frozenset({"ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"})
# Tokens that no merge makes score below all others, and each its own, so that the file can be read back. -1000 in llama.cpp's converter.
_NOT_MADE = -1000.0


def byte_level(files: HfFiles, plain: Vocabulary, added: Added, model: Any) -> tuple[Vocabulary, list[str]]:
    """Kind "bpe": the row for `tokenizer.ggml.pre`, and the merges."""
    normalizer, cuts = _steps(files)
    if cuts[-1:] != (("byte level",),) or normalizer not in ((), (("NFC",),)):
        raise TokenizerError(
            f"{files.where}: without byte_fallback, edgeq expects no normalizer but NFC and a pre_tokenizer that ends in ByteLevel; "
            f"found normalizer {describe(normalizer)} and pre_tokenizer {describe(cuts)}"
        )
    _check_decoder(files, _BYTE_LEVEL_DECODERS)
    row = _row(files, cuts[:-1], added, model)
    differs = [row.differs] if row.differs else []
    if normalizer:
        differs.append("text that is not in Unicode normal form C (llama.cpp does not normalize)")
    absent = [byte for byte, letter in enumerate(byte_letters()) if letter not in files.model["vocab"] and byte not in _NEVER_IN_TEXT]
    if absent:
        listed = " ".join(f"{byte:02X}" for byte in absent)
        differs.append(f"text with UTF-8 bytes that the vocabulary lacks ({listed}; llama.cpp leaves them out after merging)")
    # Byte-level merges never meet a space, so a pair that holds one does nothing; GGUF could not spell it.
    merges = tuple(f"{left} {right}" for left, right in _pairs(files) if " " not in left + right)
    return replace(plain, pre=row.name, merges=merges), differs


def marked_spaces(files: HfFiles, plain: Vocabulary, added: Added, model: Any) -> tuple[Vocabulary, list[str]]:
    """Kind "spm": scores that make llama.cpp merge as the ranks do (see `merging`), and whether a space goes in front."""
    normalizer, cuts = _steps(files)
    row = space_row(normalizer + cuts, where=files.where)
    _check_decoder(files, _SPACE_DECODERS)
    pairs = _pairs(files)
    if metaspace_splits(files.tokenizer.get("pre_tokenizer")):
        _check_words(pairs, added, files.where)
    whole, differs = _whole(plain, files, _without_shortcut(files, model))
    types = tuple(_space_type(token, type, whole) for token, type in zip(plain.tokens, plain.types, strict=True))
    made, lowest = token_scores(pairs), _NOT_MADE - len(pairs)
    scores = tuple(made.get(token, 0.0) if token in whole else lowest - id for id, token in enumerate(plain.tokens))
    if row.differs:
        differs.append(row.differs)
    if any(before == TokenType.USER_DEFINED != now for before, now in zip(plain.types, types, strict=True)):
        differs.append(f"text that holds {SPACE_MARK} itself next to another or to spaces")
    behind_space = [entry["content"] for entry in added if entry.get("normalized") and ("prepend", SPACE_MARK) in normalizer]
    if behind_space:
        differs.append(f"added tokens marked normalized ({', '.join(behind_space[:3])}), which the library finds only behind a space")
    return replace(plain, types=types, scores=scores, add_space_prefix=row.add_space_prefix), differs


def _steps(files: HfFiles) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    normalizer = normalizer_steps(files.tokenizer.get("normalizer"), where=files.where)
    return normalizer, pre_tokenizer_steps(files.tokenizer.get("pre_tokenizer"), where=files.where)


def _pairs(files: HfFiles) -> list[Pair]:
    """Merges, which stand as "left right" in older files and as [left, right] in newer ones."""
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in files.model.get("merges") or ())
    return [(left, right) for left, right in merges]  # the library has checked that there are two


def _check_decoder(files: HfFiles, known: frozenset[str]) -> None:
    part = files.tokenizer.get("decoder")
    for item in part.get("decoders", [part]) if part else ():
        if str(item.get("type")) not in known:
            raise TokenizerError(
                f"{files.where}: decoder {item.get('type')!r} is not one edgeq can carry to llama.cpp. Known: {', '.join(sorted(known))}"
            )


def _row(files: HfFiles, cuts: tuple[Step, ...], added: Added, model: Any) -> ByteLevelRow:
    """The best row for these cuts under which llama.cpp and the library agree about words that are tokens."""
    ignore_merges = bool(files.model.get("ignore_merges"))
    rows = byte_level_rows(cuts, where=files.where)
    if rows[0].ignore_merges == ignore_merges:
        return rows[0]
    unmade = _unmade_token(files, added, model)
    for row in rows:
        if unmade is None or row.ignore_merges == ignore_merges:
            return row
    raise TokenizerError(
        f"{files.where}: model.ignore_merges is {str(ignore_merges).lower()}, which llama.cpp has the other way round for "
        f"{rows[0].name!r}, and it matters for token {unmade!r}, which no merges make"
    )


def _unmade_token(files: HfFiles, added: Added, model: Any) -> str | None:
    """A token of the vocabulary that merging its spelling does not give; None when all are given."""
    vocab = files.model["vocab"]
    tokens = list(vocab.keys() - {entry["content"] for entry in added})
    encodings = _without_shortcut(files, model).encode_batch_fast(tokens)
    return min((token for token, encoding in zip(tokens, encodings, strict=True) if encoding.ids != [vocab[token]]), default=None)


def _without_shortcut(files: HfFiles, model: Any) -> Any:
    """The merges with ignore_merges off, under which every token would be taken whole."""
    if not files.model.get("ignore_merges"):
        return model
    return load({"version": "1.0", "added_tokens": [], "model": {**files.model, "ignore_merges": False}}, files.where)


def _space_type(token: str, type: int, whole: set[str]) -> int:
    if type == TokenType.NORMAL and token in BYTE_TOKENS:
        return TokenType.BYTE
    # Runs of spaces that are added tokens and made by merges too (Gemma): llama.cpp finds normal tokens behind its own marking of
    # spaces, and spells them as spaces again; user-defined ones it would look for in the text as they stand.
    if type == TokenType.USER_DEFINED and SPACE_MARK in token and token in whole:
        return TokenType.NORMAL
    return type


def _check_words(pairs: Iterable[Pair], added: Added, where: str) -> None:
    """Cutting in front of every space mark must not matter: no merge may make a token that holds one further in."""
    always_found = {entry["content"] for entry in added}
    for left, right in pairs:
        token = left + right
        if SPACE_MARK in token[1:] and token not in always_found:
            raise TokenizerError(
                f"{where}: pre_tokenizer Metaspace cuts in front of every space, so token {token!r} is never made; llama.cpp does not cut "
                "there and would make it"
            )


def _whole(plain: Vocabulary, files: HfFiles, model: Any) -> tuple[set[str], list[str]]:
    """Tokens that merging their spelling gives, and texts in which llama.cpp makes another one.

    Such another token is made by no merge, but spelled by two neighbours that the library leaves apart. Raises TokenizerError when
    it is a normal one; a special one means that its spelling is not safe as plain text.
    """
    vocab = files.model["vocab"]
    whole, spelled = set(), []
    for token, type, encoding in zip(plain.tokens, plain.types, model.encode_batch(list(plain.tokens)), strict=True):
        if encoding.ids == [vocab.get(token)]:
            whole.add(token)
        elif type == TokenType.USER_DEFINED or len(set(encoding.offsets)) > 2:  # found before merging; or three neighbours and more
            continue
        elif type == TokenType.NORMAL:
            raise TokenizerError(
                f"{files.where}: token {token!r} is made by no merge, but llama.cpp would make it wherever its parts "
                f"{encoding.tokens} meet. Add the merge, or remove the token."
            )
        else:
            spelled.append(token)
    return whole, [f"plain text that spells {', '.join(spelled[:4])} (llama.cpp takes it for the special token)"] if spelled else []
