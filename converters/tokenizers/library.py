"""The `tokenizers` library behind edgeq's Tokenizer protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from edgeq.errors import MissingDependency, TokenizerError
from edgeq.model import Vocabulary


def import_tokenizers() -> ModuleType:
    try:
        import tokenizers
    except ImportError as err:
        raise MissingDependency("tokenizers", "export") from err
    return tokenizers


def load(tokenizer: Mapping[str, Any], where: str) -> Any:
    """A `tokenizers.Tokenizer` from the parts of a `tokenizer.json`. Raises TokenizerError naming `where` when they do not fit."""
    library = import_tokenizers()
    try:
        return library.Tokenizer.from_str(json.dumps(tokenizer, ensure_ascii=False))
    except Exception as err:  # the library raises nothing narrower
        raise TokenizerError(f"{where}: the tokenizers library cannot load it: {err}. Fetch the file again.") from err


def merges_alone(library: Any) -> Any:
    """A tokenizer's merges without cuts, normalizer and added tokens; the model is shared, not copied."""
    return import_tokenizers().Tokenizer(library.model)


class LibraryTokenizer:
    """A `tokenizers.Tokenizer` and the vocabulary llama.cpp gets for it.

    The library's own post-processor is not used: BOS and EOS are those of the vocabulary. differs: on which input llama.cpp is known
    to give other ids, in words; empty for most models. folder: where its own files lie, in Hugging Face layout.
    """

    def __init__(self, library: Any, vocabulary: Vocabulary, differs: Sequence[str] = (), *, folder: Path | None = None) -> None:
        library.no_truncation()
        library.no_padding()
        self._library = library
        self.vocabulary = vocabulary
        self.differs = tuple(differs)
        self.folder = folder

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids of a text. Raises TokenizerError for a text that has no UTF-8 form (lone surrogates)."""
        self._library.encode_special_tokens = not parse_special
        try:
            ids = self._library.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError) as err:
            raise TokenizerError(f"text cannot be tokenized: {_why_not(text, err)}") from err
        special = self.vocabulary.special_ids
        bos = [special["bos"]] if add_special and self.vocabulary.add_bos else []
        eos = [special["eos"]] if add_special and self.vocabulary.add_eos else []
        return bos + ids + eos

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included. Ids that no token has, and padding, are silent."""
        return self._library.decode(list(ids), skip_special_tokens=False)


def _why_not(text: object, err: Exception) -> str:
    if not isinstance(text, str):
        return f"it is a {type(text).__name__}, not a string"
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        return f"character {problem.start} is half of a surrogate pair ({text[problem.start]!r}). Repair the text's encoding."
    return str(err)
