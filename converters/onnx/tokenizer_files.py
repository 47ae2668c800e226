"""Tokenizer files of an ONNX folder: tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

Two kinds of readers have to get the same ids from them: the `tokenizers` library (ours, transformers) and onnxruntime-genai, which reads
the same files with code of its own and never puts BOS or EOS around a text. A source in Hugging Face layout keeps its files; a part is
written anew only where a reader would do something else than the source's tokenizer does:

- added tokens get the flags of tokenizer_config.json, and those that end a generation are special, as `edgeq.converters.tokenizers` has it;
- a post-processor that does not put BOS and EOS where the model wants them is replaced by one that does;
- sentencepiece-like merges without a pre-tokenizer get one that cuts nothing, or onnxruntime-genai would cut words from punctuation;
- a tokenizer class that onnxruntime-genai does not know (0.18), or none, becomes PreTrainedTokenizerFast: as tokenizer.json says.

A vocabulary from a GGUF file is spelled out the same way, cut as the model's own files do, without llama.cpp's exceptions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeq.converters.tokenizers.gguf import byte_letters, post_processor, tokenizer_parts
from edgeq.converters.tokenizers.hf import added_tokens
from edgeq.converters.tokenizers.hf_files import HfFiles, read_hf_files
from edgeq.converters.tokenizers.library import LibraryTokenizer, load
from edgeq.errors import TokenizerError
from edgeq.model import Tokenizer, Vocabulary

TOKENIZER, CONFIG, SPECIALS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"

# What `tokenizer_class` may be, with or without "Fast" behind it, for onnxruntime-genai to read merges from tokenizer.json.
_CLASSES = frozenset(
    {
        *("CodeGenTokenizer", "CodeLlamaTokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer", "GemmaTokenizer", "InternLM2Tokenizer"),
        *("LlamaTokenizer", "Phi3Tokenizer", "PreTrainedTokenizer", "Qwen2Tokenizer", "TokenizersBackend"),
    }
)
_ANY_CLASS = "PreTrainedTokenizerFast"
_CUTS_NOTHING = {"type": "Split", "pattern": {"Regex": r"[\s\S]+"}, "behavior": "Isolated", "invert": False}
_NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


@dataclass(frozen=True)
class TokenizerFiles:
    """files: contents by name. tokenizer: what the `tokenizers` library makes of them. differs: on which input onnxruntime-genai gives
    other ids than it, in words."""

    files: Mapping[str, bytes]
    tokenizer: LibraryTokenizer
    differs: tuple[str, ...]

    def write(self, folder: Path) -> list[Path]:
        """Write them into a folder that exists, and return their paths."""
        paths = [folder / name for name in self.files]
        for path in paths:
            path.write_bytes(self.files[path.name])
        return paths


def tokenizer_files(tokenizer: Tokenizer, *, n_ctx: int) -> TokenizerFiles:
    """Files for a source's tokenizer. n_ctx: tokens the model was trained for. Raises TokenizerError as reading a tokenizer does."""
    vocabulary = tokenizer.vocabulary
    if tokenizer.folder is None:
        where, parts = "vocabulary", tokenizer_parts(vocabulary, "vocabulary", as_published=True)
        files = {CONFIG: _json(_config(vocabulary, n_ctx))}
    else:
        source = read_hf_files(tokenizer.folder)
        where, parts = source.where, _carried_parts(source, vocabulary)
        files = _carried_files(source, vocabulary, n_ctx)
    if vocabulary.kind == "spm" and not parts.get("pre_tokenizer"):
        parts["pre_tokenizer"] = _CUTS_NOTHING
    library = load(parts, where)
    if _around(library) != _wanted_around(vocabulary):
        parts["post_processor"] = post_processor(vocabulary)
        library = load(parts, where)
    if tokenizer.folder is not None and parts == source.tokenizer:
        files = {TOKENIZER: _bytes(tokenizer.folder / TOKENIZER), **files}
    else:
        files = {TOKENIZER: _json(parts), **files}
    if vocabulary.chat_template is not None:
        files[TEMPLATE] = vocabulary.chat_template.encode()
    return TokenizerFiles(files, LibraryTokenizer(library, vocabulary), tuple(_genai_differs(parts)))


def _carried_parts(source: HfFiles, vocabulary: Vocabulary) -> dict[str, Any]:
    """tokenizer.json without tokens that the embedding has no row for."""
    added = [entry for entry in added_tokens(source) if entry["id"] < len(vocabulary.tokens)]
    return {**source.tokenizer, "added_tokens": added}


def _carried_files(source: HfFiles, vocabulary: Vocabulary, n_ctx: int) -> dict[str, bytes]:
    files = {}
    if not source.config:
        files[CONFIG] = _json(_config(vocabulary, n_ctx))
    elif _is_known(source.config.get("tokenizer_class")):
        files[CONFIG] = _bytes(source.folder / CONFIG)
    else:
        files[CONFIG] = _json({**source.config, "tokenizer_class": _ANY_CLASS})
    if source.special_map:
        files[SPECIALS] = _bytes(source.folder / SPECIALS)
    return files


def _is_known(tokenizer_class: object) -> bool:
    return isinstance(tokenizer_class, str) and tokenizer_class.removesuffix("Fast") in _CLASSES


def _config(vocabulary: Vocabulary, n_ctx: int) -> dict[str, Any]:
    """What transformers and onnxruntime-genai want to know beside tokenizer.json."""
    named = {key: vocabulary.tokens[vocabulary.special_ids[role]] for role, key in _NAMED.items() if role in vocabulary.special_ids}
    return {
        "add_bos_token": bool(vocabulary.add_bos),
        "add_eos_token": bool(vocabulary.add_eos),
        **named,
        "clean_up_tokenization_spaces": False,
        "model_max_length": n_ctx,
        "tokenizer_class": _ANY_CLASS,
    }


def _around(library: Any) -> list[int]:
    """Ids that the library puts around a text of no tokens."""
    return library.encode("", add_special_tokens=True).ids


def _wanted_around(vocabulary: Vocabulary) -> list[int]:
    special = vocabulary.special_ids
    return [special[role] for role, wanted in (("bos", vocabulary.add_bos), ("eos", vocabulary.add_eos)) if wanted]


def _genai_differs(parts: Mapping[str, Any]) -> Iterator[str]:
    """Sentences, from the structure of tokenizer.json, as onnxruntime-genai 0.18 reads it."""
    kinds = {step.get("type") for key in ("normalizer", "pre_tokenizer") for step in _steps(parts.get(key))}
    if "Digits" in kinds:
        yield "digits outside ASCII (٣, ½), which onnxruntime-genai does not cut one by one"
    if "NFC" in kinds:
        yield "text that is not in Unicode's normal form C, which onnxruntime-genai does not compose"
    if "Metaspace" in kinds:
        yield "runs of spaces, and words with punctuation or digits beside letters, which onnxruntime-genai cuts before it merges"
    absent = [letter for letter in byte_letters() if letter not in parts["model"]["vocab"]] if "ByteLevel" in kinds else []
    if absent:
        yield f"bytes that no token has ({len(absent)} of 256), which are left out and get the id -1 in onnxruntime-genai"


def _steps(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer and whatever is within it."""
    if part is None:
        return
    yield part
    for inner in (*part.get("normalizers", ()), *part.get("pretokenizers", ())):
        yield from _steps(inner)


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise TokenizerError(f"{path}: cannot be read ({err.strerror}). Keep the source in place until the work is done.") from err
