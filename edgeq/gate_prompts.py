"""The texts that every gate uses: passages to score, lines that are hard to tokenize, conversations to render.

They live in `data/gate_prompts.jsonl`, one object per line: {"kind": "passage" | "line" | "conversation", "name": ...} with "text", or
with "messages" and "add_generation_prompt". All text is in Unicode's composed form (NFC): some tokenizers compose what they read,
which llama.cpp does not do, and a difference that no export can mend is no business of the gate.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from edgeq.model import Tokenizer

PASSAGE_TOKENS = 64  # a passage is scored up to here: scripts that a tokenizer spells in bytes would take most of the time


@dataclass(frozen=True)
class Text:
    name: str
    text: str


@dataclass(frozen=True)
class Conversation:
    name: str
    messages: tuple[dict[str, str], ...]
    add_generation_prompt: bool


@dataclass(frozen=True)
class GatePrompts:
    """passages: ordinary text in eleven languages, code, mathematics, a table, a dialogue, emoji. lines: for the tokenizer only."""

    passages: tuple[Text, ...]
    lines: tuple[Text, ...]
    conversations: tuple[Conversation, ...]

    @property
    def texts(self) -> tuple[Text, ...]:
        """Everything a tokenizer is tried on."""
        return self.passages + self.lines


@cache
def gate_prompts() -> GatePrompts:
    data = resources.files("edgeq").joinpath("data/gate_prompts.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in data.splitlines()]
    return GatePrompts(
        passages=tuple(Text(row["name"], row["text"]) for row in rows if row["kind"] == "passage"),
        lines=tuple(Text(row["name"], row["text"]) for row in rows if row["kind"] == "line"),
        conversations=tuple(
            Conversation(row["name"], tuple(row["messages"]), row["add_generation_prompt"]) for row in rows if row["kind"] == "conversation"
        ),
    )


def passage_windows(tokenizer: Tokenizer, *, n_ctx: int) -> list[list[int]]:
    """Token ids of the passages as a model expects a text to begin, each cut to PASSAGE_TOKENS and to n_ctx."""
    limit = min(PASSAGE_TOKENS, n_ctx)
    return [tokenizer.encode(passage.text, add_special=True)[:limit] for passage in gate_prompts().passages]


def gate_windows(tokenizer: Tokenizer, held_back: Sequence[Sequence[int]], *, n_ctx: int) -> list[list[int]]:
    """What the gate scores: the passages, then windows that calibration did not see, cut to the n_ctx the model was trained for."""
    return passage_windows(tokenizer, n_ctx=n_ctx) + [list(window[:n_ctx]) for window in held_back]
