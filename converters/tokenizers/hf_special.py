"""Special tokens of a Hugging Face folder: which id plays which role, and what is put around a text.

Several files name them and disagree at times. Decided as llama.cpp's converter does (SpecialVocab in gguf-py/gguf/vocab.py): names
before ids, tokenizer_config.json before config.json, and about BOS and EOS around a text the post-processor before any switch. Its
guesses about sequences it cannot express are refused here; generation_config.json, which it does not read, is read in addition.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from edgeq.converters.tokenizers.hf_files import HfFiles
from edgeq.converters.tokenizers.llamacpp import ENDS_GENERATION
from edgeq.errors import TokenizerError

log = logging.getLogger(__name__)

# Role in Hugging Face files and role in GGUF, in the converter's order ("seperator" is GGUF's spelling).
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "cls": "cls", "mask": "mask"}
_MORE_ENDS = ("eot", "eom")  # GGUF has room for two more tokens that end a generation


@dataclass(frozen=True, kw_only=True)
class Specials:
    """ids by GGUF role; whether BOS and EOS are put around a text."""

    ids: Mapping[str, int]
    add_bos: bool
    add_eos: bool


@dataclass(frozen=True, kw_only=True)
class _Around:
    """What the post-processor puts before and behind a text; settled: it says so also where that is nothing."""

    before: str | None = None
    behind: str | None = None
    settled: bool = False


def read_specials(files: HfFiles, tokens: Mapping[int, str]) -> Specials:
    """tokens: spelling by id. Raises TokenizerError for missing EOS and for sequences that llama.cpp cannot put around a text."""
    ids = {token: id for id, token in tokens.items()}
    named = {gguf: _named(files, role, ids) for role, gguf in _ROLES.items()}
    around = _around(files)
    before, behind = (_id(token, ids, files.where) for token in (around.before, around.behind))
    if before is not None and named["bos"] not in (None, before):
        raise TokenizerError(
            f"{files.where}: the post_processor begins texts with {around.before!r}, but bos_token is {tokens[named['bos']]!r}. "
            "Name the same token in both."
        )
    stops = _generation_ends(files, tokens)
    # A text that is closed by another token than EOS: either ends a generation, and the one that closes is llama.cpp's EOS.
    eos = next((id for id in (behind, named["eos"], *stops) if id is not None), None)
    if eos is None:
        raise TokenizerError(
            f"{files.where}: no EOS token is named, and llama.cpp would take an arbitrary one. Name eos_token in tokenizer_config.json."
        )
    further = _further_ends(files, tokens, eos, named["eos"], stops)
    named |= {"bos": named["bos"] if before is None else before, "eos": eos}
    special_ids = {role: id for role, id in named.items() if id is not None} | further
    add_bos = _is_added(files, "bos", around.before, around.settled)
    if add_bos and "bos" not in special_ids:
        raise TokenizerError(
            f"{files.where}: texts are to begin with a BOS token, but none is named. Name bos_token in tokenizer_config.json."
        )
    return Specials(ids=special_ids, add_bos=add_bos, add_eos=_is_added(files, "eos", around.behind, around.settled))


def _named(files: HfFiles, role: str, ids: Mapping[str, int]) -> int | None:
    """Id of the token that the files name for a role."""
    for source in (files.config, files.special_map):
        entry = source.get(f"{role}_token")
        token = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(token, str) and token in ids:
            return ids[token]
    for config in (files.model_config, files.text_config):
        id = config.get(f"{role}_token_id")
        if isinstance(id, int) and id in ids.values():
            return id
    return None


def _generation_ends(files: HfFiles, tokens: Mapping[int, str]) -> list[int]:
    for config in (files.generation, files.model_config, files.text_config):
        ends = config.get("eos_token_id")
        if ends is not None:
            return [id for id in ([ends] if isinstance(ends, int) else ends) if id in tokens]
    return []


def _further_ends(files: HfFiles, tokens: Mapping[int, str], eos: int, named_eos: int | None, stops: list[int]) -> dict[str, int]:
    """Roles for tokens besides EOS that end a generation.

    llama.cpp knows most of them by their spelling, and would only lose the EOT it finds to one that is named.
    """
    closed_otherwise = [] if named_eos is None or named_eos == eos else [named_eos]
    ends = list(dict.fromkeys([*closed_otherwise, *(id for id in stops if id != eos and tokens[id] not in ENDS_GENERATION)]))
    for id in ends[len(_MORE_ENDS) :]:
        log.warning("%s: %r ends a generation too, but GGUF has no place left to say so", files.where, tokens[id])
    return dict(zip(_MORE_ENDS, ends, strict=False))


def _around(files: HfFiles) -> _Around:
    part = files.tokenizer.get("post_processor")
    around = _Around()
    for item in part.get("processors", [part]) if part else ():
        match item:
            case {"type": "ByteLevel"}:
                around = _Around(before=around.before, behind=around.behind, settled=True)
            case {"type": "TemplateProcessing", "single": list(single)}:
                names = [piece.get("SpecialToken", {}).get("id") for piece in single]
                text = names.index(None) if None in names else 0
                if text > 1 or len(names) - text > 2:
                    raise TokenizerError(
                        f"{files.where}: the post_processor adds {names[:text]} before a text and {names[text + 1 :]} behind it; "
                        "llama.cpp can add one token on either side"
                    )
                before, behind = (names[0] if text else None), (names[-1] if text + 1 < len(names) else None)
                around = _Around(before=before, behind=behind, settled=around.settled)
            case _:
                raise TokenizerError(
                    f"{files.where}: post_processor {item.get('type')!r} is not one edgeq can carry to llama.cpp. "
                    "Known: ByteLevel and TemplateProcessing"
                )
    return around


def _id(token: str | None, ids: Mapping[str, int], where: str) -> int | None:
    if token is None:
        return None
    if token not in ids:
        raise TokenizerError(f"{where}: the post_processor adds {token!r}, which is not in the vocabulary")
    return ids[token]


def _is_added(files: HfFiles, role: str, token: str | None, settled: bool) -> bool:
    return token is not None or (not settled and files.config.get(f"add_{role}_token") is True)
