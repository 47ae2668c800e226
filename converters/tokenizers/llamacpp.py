"""What llama.cpp does with a vocabulary while it loads it, where that is not what the file says.

It finds some control tokens by their spelling, takes a token for EOS when none is given, strips white space behind special tokens of
models called Phi-3, and stops the whole process over a few faults. Read from llama_vocab::impl::load in src/llama-vocab.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from enum import IntEnum

from edgeq.errors import TokenizerError
from edgeq.model import Vocabulary


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type` (llama.h)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


SPECIAL = frozenset({TokenType.UNKNOWN, TokenType.CONTROL})  # found in text only when special tokens are to be parsed

# fmt: off
# End a generation wherever they are in a vocabulary, and are control tokens then.
ENDS_GENERATION = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>", "<|endoftext|>",
    "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>",
    "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
))
# Found by their spelling for filling in the middle, and control tokens then.
_FILL_IN = frozenset((
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>", "<|prefix|>",
    "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>", "<|suffix|>",
    "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>", "<|middle|>",
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>",
    "<reponame>", "<|file_sep|>",
))
# fmt: on
_FORCED_CONTROL = ENDS_GENERATION | _FILL_IN
_FORCED_USER_DEFINED = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})

# In models called Phi-3 white space behind these stays; llama.cpp does not load such a model without them and </s>.
_STRIPS_NOTHING = frozenset({"<unk>", "<s>", "<|endoftext|>"})
_PHI3_NEEDS = _STRIPS_NOTHING | {"</s>"}
_PHI3_NAME = re.compile("phi-?3", re.IGNORECASE)

BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))


def effective_type(token: str, type: int) -> int:
    """The type llama.cpp works with after it has looked at the spelling."""
    if token in _FORCED_USER_DEFINED:
        return TokenType.USER_DEFINED
    if token in _FORCED_CONTROL and type != TokenType.UNKNOWN:
        return TokenType.CONTROL
    return type


def strips_behind(token: str, type: int) -> bool:
    """Whether white space behind this token is dropped in a model called Phi-3."""
    special = effective_type(token, type) in SPECIAL | {TokenType.USER_DEFINED}
    return special and token not in _STRIPS_NOTHING


def is_called_phi3(name: str) -> bool:
    """Whether llama.cpp strips white space behind special tokens because of this `general.name`."""
    return _PHI3_NAME.search(name) is not None


def can_be_called_phi3(tokens: Iterable[str]) -> bool:
    """Whether llama.cpp loads a model of that name with these tokens."""
    return _PHI3_NEEDS.issubset(tokens)


def general_name(vocabulary: Vocabulary, name: str) -> str:
    """A `general.name` under which llama.cpp treats white space behind special tokens as this vocabulary wants it.

    "Phi 3 Mini" becomes "Phi-3 Mini" when white space is to be dropped, and "my phi-3 qwen" becomes "my phi 3 qwen" when it is not.
    """
    if vocabulary.strips_special:
        if is_called_phi3(name):
            return name
        spaced = re.sub(r"phi[ _]3", "Phi-3", name, count=1, flags=re.IGNORECASE)
        return spaced if is_called_phi3(spaced) else f"{name} (Phi-3)"
    return _PHI3_NAME.sub(lambda match: match[0][:3] + " 3", name)


def check_vocabulary(vocabulary: Vocabulary, where: str) -> None:
    """Find what llama.cpp would die of. Raises TokenizerError naming `where` (a file) and the token."""
    n_tokens = len(vocabulary.tokens)
    _check_distinct(vocabulary.tokens, where)
    if len(vocabulary.types) != n_tokens:
        raise TokenizerError(f"{where}: {len(vocabulary.types)} token types for {n_tokens} tokens")
    for role, id in vocabulary.special_ids.items():
        if not 0 <= id < n_tokens:
            raise TokenizerError(f"{where}: the {role} token has id {id}, but there are {n_tokens} tokens")
    if vocabulary.strips_special and not can_be_called_phi3(vocabulary.tokens):
        raise TokenizerError(
            f"{where}: the model is called Phi-3, and llama.cpp loads no such model without the tokens {', '.join(sorted(_PHI3_NEEDS))}. "
            "Change general.name."
        )
    if vocabulary.kind == "bpe":
        if not vocabulary.merges:
            raise TokenizerError(f"{where}: there are no merges, which llama.cpp needs for a byte-level vocabulary")
        return
    if len(vocabulary.scores) != n_tokens:
        raise TokenizerError(f"{where}: {len(vocabulary.scores)} scores for {n_tokens} tokens")
    missing = sorted(set(BYTE_TOKENS) - set(vocabulary.tokens))
    if missing:
        raise TokenizerError(f"{where}: {len(missing)} of the 256 byte tokens are missing ({missing[0]} ...); llama.cpp needs them all")


def _check_distinct(tokens: Sequence[str], where: str) -> None:
    if len(set(tokens)) == len(tokens):
        return
    seen: dict[str, int] = {}
    for id, token in enumerate(tokens):
        if token in seen:
            raise TokenizerError(f"{where}: tokens {seen[token]} and {id} are both spelled {token!r}; llama.cpp needs distinct ones")
        seen[token] = id
