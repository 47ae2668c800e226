"""The process in which a `ScoringWorker` scores: loads one artifact in its runtime and answers requests about it.

Its argument is an inherited file descriptor for what is too large for an answer: logits, float32 (n_tokens, n_vocab) from the start of
that file. The first request is {"op": "load", artifact, adapter, n_ctx, threads, n_ubatch}; the others are methods of `Scorer`. What it
logs is quoted by the parent when it dies.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.runtime.adapter_formats import load_adapter
from edgeq.runtime.child import serve
from edgeq.runtime.engine import load_model, new_context
from edgeq.runtime.likelihood import Floats, negative_log_likelihood
from edgeq.runtime.memory import peak_rss_bytes


class Scorer:
    """One artifact, loaded, with an adapter or none. Generators yield how many tokens of a window are done."""

    def __init__(self, logits_file: int, *, artifact: str, adapter: str | None, n_ctx: int, threads: int | None, n_ubatch: int) -> None:
        self._model = load_model(Path(artifact), threads=threads)
        self._context = new_context(self._model, n_ctx=n_ctx, n_batch=n_ubatch, threads=threads)
        if adapter is not None:
            self._context.set_adapters({load_adapter(self._model, Path(adapter)): 1.0})
        self._logits_file = logits_file

    def facts(self) -> dict[str, Any]:
        model = self._model
        return {
            "architecture": model.facts.arch,
            "n_vocab": model.n_vocab,
            "n_ctx_train": model.n_ctx_train,
            "bos": model.bos,
            "eos": model.eos,
            "bos_text": None if model.bos is None else model.token_text(model.bos),
            "eos_text": None if model.eos is None else model.token_text(model.eos),
            "chat_template": model.chat_template(),
            "threads": self._context.threads,
            "library": model.library,
        }

    def peak_rss(self) -> int | None:
        return peak_rss_bytes()

    def tokenize(self, *, text: str, add_special: bool, parse_special: bool) -> list[int]:
        return self._model.tokenize(text, add_special=add_special, parse_special=parse_special)

    def logits(self, *, ids: Sequence[int]) -> Generator[int, None, int]:
        for start, rows in self._context.iter_logits(ids):
            _write(self._logits_file, rows, start * rows.shape[1] * rows.itemsize)
            yield start + len(rows)
        return len(ids)

    def nll(self, *, ids: Sequence[int]) -> Generator[int, None, list[float]]:
        """-log p of tokens 1.., each given those before it."""
        targets = np.asarray(ids[1:], dtype=np.int64)
        nll = np.empty(len(targets))
        for start, rows in self._context.iter_logits(ids):
            wanted = targets[start : start + len(rows)]
            nll[start : start + len(wanted)] = negative_log_likelihood(rows[: len(wanted)], wanted)
            yield start + len(rows)
        return nll.tolist()

    def continuations(self, *, ids: Sequence[int], continuations: Sequence[Sequence[int]]) -> Generator[int, None, list[list[float]]]:
        """-log p of every token of each continuation of a text. The text is computed once, where the runtime can go back to its end."""
        context, before = self._context, ids[:-1]
        context.clear()
        found, kept = [], 0
        for done, continuation in enumerate(continuations, 1):
            if kept < len(before):
                context.decode(before[kept:])
            targets = np.asarray(continuation, dtype=np.int64)
            nll = np.empty(len(targets))
            for start, rows in context.iter_logits([ids[-1], *continuation[:-1]], keep=True):
                nll[start : start + len(rows)] = negative_log_likelihood(rows, targets[start : start + len(rows)])
            found.append(nll.tolist())
            kept = context.truncate(len(before))
            yield done
        return found

    def generate(self, *, ids: Sequence[int], max_tokens: int, one_line: bool) -> Generator[int, None, str]:
        """The likeliest continuation. one_line: up to a line break after the first text."""
        self._context.clear()
        token = int(self._context.decode(ids)[0].argmax())
        out, n_tokens = b"", 0
        while not self._model.is_eog(token):
            out += self._model.token_to_piece(token)
            n_tokens += 1
            if n_tokens == max_tokens or (one_line and b"\n" in out.lstrip()):
                break
            yield n_tokens
            token = int(self._context.decode([token])[0].argmax())
        text = out.decode("utf-8", "replace")
        return text.lstrip().split("\n")[0] if one_line else text


def _write(file: int, rows: Floats, offset: int) -> None:
    rest = np.ascontiguousarray(rows).data.cast("B")
    while rest:
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written


def main(logits_file: int) -> None:
    logging.basicConfig(level=logging.DEBUG, format="%(message)s", stream=sys.stderr)
    scorer: Scorer | None = None

    def handle(request: Mapping[str, Any]) -> Any:
        nonlocal scorer
        arguments = dict(request)
        op = arguments.pop("op")
        if scorer is None:
            assert op == "load"
            scorer = Scorer(logits_file, **arguments)
            return scorer.facts()
        return getattr(scorer, op)(**arguments)

    serve(handle)


if __name__ == "__main__":
    main(int(sys.argv[1]))
