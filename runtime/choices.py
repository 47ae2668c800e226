"""Multiple choice: which of several continuations a model finds likeliest.

A line of the file is {"prompt": text, "choices": [texts], "answer": index from 0, or the text of one choice}. The score of a choice is the
sum of log p over its tokens, given the prompt. Two accuracies, as lm-evaluation-harness defines them:

acc        share of items whose answer has the highest score.
acc_norm   the same after dividing each score by the choice's length in UTF-8 bytes, so that long choices are not at a loss.
           (The harness counts characters; for ASCII that is the same.)

What is scored: prompt and choice as one text. White space at the end of the prompt is moved to the choice; when neither has any, one space
goes between them. After a chat template the choice follows at once. Tokens that prompt and all joined texts begin with are the context;
scoring begins after them, at the same place for all choices of an item, even where the last characters of a prompt and the first of
a choice make one token. The first of equal scores wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import RuntimeFailure, UsageError
from edgeq.runtime.child import ignore
from edgeq.runtime.jsonl import Malformed, known, read_items, text_of
from edgeq.runtime.prompts import PromptWriter

EXPECTED = '{"prompt": "The sky is", "choices": ["blue", "green"], "answer": 0}'


@dataclass(frozen=True, kw_only=True)
class ChoiceItem:
    """line: where in the file. answer: index of the right choice."""

    line: int
    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, kw_only=True)
class ChoiceScores:
    """Per item whether the choice with the highest score was right, raw and by bytes: bool (n_items,)."""

    acc: npt.NDArray[np.bool_]
    acc_norm: npt.NDArray[np.bool_]


def read_choices(path: Path) -> tuple[tuple[ChoiceItem, ...], str]:
    """Items of a file, and its SHA-256. Raises SourceError that names the line."""
    return read_items(path, _item, expected=EXPECTED)


def _item(line: int, document: dict[str, Any]) -> ChoiceItem:
    known(document, "prompt", "choices", "answer")
    prompt = text_of(document, "prompt")
    choices = document.get("choices")
    if not isinstance(choices, list) or len(choices) < 2:
        raise Malformed('"choices" is not a list of at least two texts')
    texts = tuple(text_of({f"choices[{i}]": choice}, f"choices[{i}]") for i, choice in enumerate(choices))
    if not all(text.strip() for text in texts):
        raise Malformed(f'"choices[{[bool(text.strip()) for text in texts].index(False)}]" is empty')
    return ChoiceItem(line=line, prompt=prompt, choices=texts, answer=_answer(document.get("answer"), texts))


def _answer(value: object, choices: Sequence[str]) -> int:
    if isinstance(value, str):
        if choices.count(value) != 1:
            raise Malformed(f'"answer" is {value!r}, which is {"none" if value not in choices else "more than one"} of the choices')
        return choices.index(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(choices):
        raise Malformed(f'"answer" is {value!r}, not an index from 0 to {len(choices) - 1}')
    return value


def score_choices(
    writer: PromptWriter, items: Sequence[ChoiceItem], *, n_ctx: int, on_items: Callable[[int], None] = ignore
) -> ChoiceScores:
    """Score every item. writer: of the model that answers. on_items is told how many items are done.

    Raises UsageError for an item that does not fit n_ctx, before anything is scored; RuntimeFailure for scores that are no numbers.
    """
    encoded = [encode(writer, item) for item in items]
    for item, (context, continuations) in zip(items, encoded, strict=True):
        longest = len(context) + max(map(len, continuations))
        if longest > n_ctx:
            raise UsageError(
                f"line {item.line} of the choices needs {longest:,} tokens, the context has {n_ctx:,}. "
                "Use a larger --ctx or a shorter prompt."
            )
    right = np.zeros((2, len(items)), dtype=np.bool_)
    for i, (item, (context, continuations)) in enumerate(zip(items, encoded, strict=True)):
        scores = [-math.fsum(nll) for nll in writer.worker.continuation_nll(context, continuations)]
        if not np.isfinite(scores).all():
            raise RuntimeFailure(f"line {item.line} of the choices: the scores are no finite numbers. The model's weights are damaged.")
        by_bytes = [score / len(choice.encode()) for score, choice in zip(scores, item.choices, strict=True)]
        right[:, i] = int(np.argmax(scores)) == item.answer, int(np.argmax(by_bytes)) == item.answer
        on_items(i + 1)
    return ChoiceScores(acc=right[0], acc_norm=right[1])


def encode(writer: PromptWriter, item: ChoiceItem) -> tuple[list[int], list[list[int]]]:
    """Token ids of the context, at least one, and of each continuation, at least one; see the module docstring."""
    prompt, joined = writer.joined(item.prompt, item.choices)
    ids, whole = writer.ids(prompt), [writer.ids(text) for text in joined]
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(ids, *whole, strict=False)))
    start = min(shared, *(len(text) - 1 for text in whole))
    if start < 1:
        raise UsageError(
            f"line {item.line} of the choices: nothing stands before the choices, and the model has no BOS token. Write a prompt."
        )
    return whole[0][:start], [text[start:] for text in whole]
