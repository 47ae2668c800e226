"""The tokenizer of an ONNX folder, by the `tokenizers` library: tokenizer.json, tokenizer_config.json and chat_template.jinja.

Texts get BOS and EOS from the post-processor of tokenizer.json; where there is none, from add_bos_token and add_eos_token of
tokenizer_config.json. Bytes of single tokens follow from the decoder: byte-level vocabularies spell each byte as a character (GPT-2's
table), sentencepiece-like ones spell a space as U+2581 and bytes without a token as <0xE4>.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from edgeq.errors import MissingDependency, TokenizerError

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class OnnxTokenizer:
    """bos, eos: what to put around a text where the post-processor does not."""

    def __init__(self, folder: Path, *, bos: int | None, eos: int | None) -> None:
        self._path = folder / "tokenizer.json"
        self._config = _read_config(folder / "tokenizer_config.json")
        self._folder = folder
        self._library = _load(self._path)
        self._library.no_truncation()
        self._library.no_padding()
        self._spelling = _spelling(self._library, self._path)
        self._added: Mapping[int, Any] = self._library.get_added_tokens_decoder()
        self._around = tuple([id] if id is not None and self._adds(role) else [] for role, id in (("bos", bos), ("eos", eos)))
        self._lock = threading.Lock()  # how special tokens are read is a setting of the library's object

    @property
    def n_tokens(self) -> int:
        """One more than the largest id."""
        return 1 + max(self._library.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of a text. Raises TokenizerError for what is no text."""
        try:
            with self._lock:
                self._library.encode_special_tokens = not parse_special
                ids = self._library.encode(text, add_special_tokens=add_special).ids
        except (TypeError, UnicodeEncodeError) as err:
            raise TokenizerError(f"text cannot be tokenized: {err}. Repair its encoding.") from err
        before, behind = self._around if add_special else ([], [])
        return [*before, *ids, *behind]

    def decode(self, ids: Sequence[int], *, special: bool) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD. special: spell special tokens too."""
        return self._library.decode(list(ids), skip_special_tokens=not special)

    def text(self, id: int) -> str:
        """A token's spelling in the vocabulary; ids without one are named as the exporters name them."""
        found = self._library.id_to_token(id)
        return f"[PAD{id}]" if found is None else found

    def piece(self, id: int, *, special: bool) -> bytes:
        """The bytes a token stands for. special: spell special tokens too, else they are empty."""
        added = self._added.get(id)
        if added is not None:
            return added.content.encode() if special or not added.special else b""
        token = self._library.id_to_token(id)
        if token is None:
            return b""
        if self._spelling == "bytes":
            table = _byte_table()
            return b"".join(bytes([table[c]]) if c in table else c.encode() for c in token)
        byte = _BYTE.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()

    def chat_template(self) -> str | None:
        """The template of chat_template.jinja, else of tokenizer_config.json, of several the one called "default"; None without."""
        path = self._folder / "chat_template.jinja"
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except (OSError, ValueError) as err:
                raise TokenizerError(f"{path}: cannot be read as UTF-8 text: {err}. Copy the folder again.") from err
        found = self._config.get("chat_template")
        if isinstance(found, list):
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
            found = named.get("default")
        return found if isinstance(found, str) else None

    def _adds(self, role: str) -> bool:
        return self._library.post_processor is None and self._config.get(f"add_{role}_token") is True


def _load(path: Path) -> Any:
    try:
        import tokenizers
    except ImportError as err:
        raise MissingDependency("tokenizers", "onnx") from err
    if not path.is_file():
        raise TokenizerError(f"{path} is missing: without it no text becomes tokens. Copy the whole folder.")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as err:  # the library raises nothing narrower
        raise TokenizerError(f"{path}: the tokenizers library cannot load it: {err}. Copy or export the folder again.") from err


def _read_config(path: Path) -> Mapping[str, Any]:
    """Empty when there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as err:
        raise TokenizerError(f"{path}: cannot be read as JSON: {err}. Copy the folder again.") from err
    if not isinstance(found, dict):
        raise TokenizerError(f"{path}: holds a {type(found).__name__}, expected an object. Copy the folder again.")
    return found


def _spelling(library: Any, path: Path) -> Literal["bytes", "spaces"]:
    """How tokens spell bytes, from the decoder's own description."""
    described = b"{}" if library.decoder is None else library.decoder.__getstate__()
    decoder = json.loads(described)
    kinds = {part.get("type") for part in decoder.get("decoders", [decoder])}
    if "ByteLevel" in kinds:
        return "bytes"
    if kinds & {"ByteFallback", "Metaspace", "Replace"}:
        return "spaces"
    raise TokenizerError(
        f"{path}: decoder {sorted(map(str, kinds))} is none that edgeq can take text from piece by piece. Known: ByteLevel, and "
        "ByteFallback or Metaspace."
    )


@lru_cache(maxsize=1)
def _byte_table() -> Mapping[str, int]:
    """Bytes by the characters that spell them in GPT-2's vocabulary: printable ones themselves, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + i): byte for i, byte in enumerate(others)}}
