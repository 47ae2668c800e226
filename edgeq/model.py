"""A model as the pipeline sees it: spec, lazy tensors under canonical names, tokenizer, and where it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from edgeq.spec import ModelSpec
from edgeq.tensors import LazyTensor

TokenKind = Literal["bpe", "spm"]


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Everything a runtime needs to turn text into token ids, in llama.cpp's terms.

    kind: "bpe" (byte-level, GGUF model "gpt2") or "spm" (sentencepiece-like with byte fallback, GGUF model "llama").
    pre: llama.cpp's name of the pre-tokenizer ("smollm", "llama-bpe", "qwen2", ...; "default" for spm).
    tokens: spelling by id. types: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte (llama.h).
    merges: "left right" in rank order (bpe). scores: by id (spm); higher merges first.
    special_ids: by role, keys as in GGUF without prefix and suffix: bos eos unknown padding eot ...
    strips_special: white space behind special tokens belongs to them (Phi-3); llama.cpp goes by `general.name` for this.
    """

    kind: TokenKind
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    special_ids: Mapping[str, int] = field(default_factory=dict)
    add_bos: bool | None = None
    add_eos: bool | None = None
    add_space_prefix: bool | None = None
    chat_template: str | None = None
    strips_special: bool = False


class Tokenizer(Protocol):
    """The source's own tokenizer, run by the `tokenizers` library (never by the runtime it is compared with)."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def differs(self) -> tuple[str, ...]:
        """On which input llama.cpp is known to give other ids with this vocabulary, in words; empty when there is none."""
        ...

    @property
    def folder(self) -> Path | None:
        """Where its own files lie, in Hugging Face layout; None when it came out of a GGUF file."""
        ...

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids. add_special: with the BOS/EOS the model expects; parse_special: text may spell special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Model:
    """A source, opened. Nothing but headers and the tokenizer has been read.

    name: what to call it ("SmolLM2 135M Instruct"). files: every file it was read from. metadata: general facts for the carrier
    in GGUF's `general.*` spelling without the prefix (name, license, languages, ...). gguf_fields: for a GGUF source, all its
    metadata fields as read (`edgeq.gguf_file.Field`), so that an unchanged export can carry them byte for byte.
    quantization: method and options of a quantized checkpoint, for people; None for floats and for GGUF, whose grids say it all.
    """

    name: str
    spec: ModelSpec
    tensors: Mapping[str, LazyTensor]
    tokenizer: Tokenizer
    files: tuple[Path, ...]
    format: Literal["hf", "gguf"]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    gguf_fields: Mapping[str, Any] | None = None
    quantization: Mapping[str, Any] | None = None
