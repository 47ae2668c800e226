"""Exact match: whether a model answers a prompt with just the expected words.

A line of the file is {"prompt": text, "answer": text, or a list of texts of which any will do}. The likeliest token is taken at every step
until the model ends, or the text has come to a line break (unless an answer has one), or it is sure to be longer than every answer: 16
tokens more than the longest. Line breaks before the first word are passed over. Prompts go in as they stand, white space included.

exact_match  share of items where text and answer are the same after normalisation: Unicode NFKC, runs of white space as one space, none
             at either end. Case and punctuation count.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import UsageError
from edgeq.runtime.child import ignore
from edgeq.runtime.jsonl import Malformed, known, read_items, text_of
from edgeq.runtime.prompts import PromptWriter

EXPECTED = '{"prompt": "The capital of France is", "answer": "Paris"}'
_MORE_TOKENS = 16  # beyond the longest answer


@dataclass(frozen=True, kw_only=True)
class ExactItem:
    """line: where in the file. answers: any of them will do."""

    line: int
    prompt: str
    answers: tuple[str, ...]


def read_exact(path: Path) -> tuple[tuple[ExactItem, ...], str]:
    """Items of a file, and its SHA-256. Raises SourceError that names the line."""
    return read_items(path, _item, expected=EXPECTED)


def _item(line: int, document: dict[str, Any]) -> ExactItem:
    known(document, "prompt", "answer")
    prompt, answer = text_of(document, "prompt"), document.get("answer")
    if isinstance(answer, list):
        if not answer:
            raise Malformed('"answer" is an empty list')
        answers = tuple(text_of({f"answer[{i}]": text}, f"answer[{i}]") for i, text in enumerate(answer))
    else:
        answers = (text_of(document, "answer"),)
    if not all(map(normalised, answers)):
        raise Malformed('"answer" is empty')
    return ExactItem(line=line, prompt=prompt, answers=answers)


def normalised(text: str) -> str:
    """
    >>> normalised("  New   York\\n")
    'New York'
    """
    return " ".join(unicodedata.normalize("NFKC", text).split())


def match_exactly(
    writer: PromptWriter, items: Sequence[ExactItem], *, n_ctx: int, on_items: Callable[[int], None] = ignore
) -> npt.NDArray[np.bool_]:
    """Answer every item; whether each matched, bool (n_items,). on_items is told how many items are done.

    Raises UsageError for an item that does not fit n_ctx, before anything is generated.
    """
    prompts, limits = [], []
    for item in items:
        ids = writer.ids(writer.text(item.prompt))
        limit = max(len(writer.worker.tokenize(answer)) for answer in item.answers) + _MORE_TOKENS
        if not ids:
            raise UsageError(f"line {item.line} of the exact matches: the prompt is empty and the model has no BOS token. Write a prompt.")
        if len(ids) + limit > n_ctx:
            raise UsageError(
                f"line {item.line} of the exact matches needs {len(ids) + limit:,} tokens with its answer, the context has {n_ctx:,}. "
                "Use a larger --ctx or a shorter prompt."
            )
        prompts.append(ids)
        limits.append(limit)
    right = np.zeros(len(items), dtype=np.bool_)
    for i, (item, ids, limit) in enumerate(zip(items, prompts, limits, strict=True)):
        one_line = not any("\n" in answer.strip() for answer in item.answers)
        text = writer.worker.generate(ids, max_tokens=limit, one_line=one_line)
        right[i] = normalised(text) in map(normalised, item.answers)
        on_items(i + 1)
    return right
