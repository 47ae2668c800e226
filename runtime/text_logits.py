"""Logits of whole texts, which a context of either runtime computes in pieces."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from edgeq.errors import UsageError
from edgeq.runtime.closing import Closing
from edgeq.runtime.likelihood import Floats
from edgeq.runtime.token_ids import TokenIds


class TextLogits(Closing):
    """What contexts have in common that score texts."""

    model: Any
    n_ctx: int

    @property
    @abstractmethod
    def n_past(self) -> int: ...
    @property
    @abstractmethod
    def _rows_at_once(self) -> int:
        """Tokens whose logits may exist together."""

    @abstractmethod
    def _check_open(self) -> None:
        """Raise RuntimeFailure when it is closed."""

    @abstractmethod
    def clear(self) -> None: ...
    @abstractmethod
    def decode(self, tokens: TokenIds, *, outputs: Literal["last", "all"] = "last") -> Floats: ...

    def iter_logits(self, tokens: TokenIds, *, keep: bool = False) -> Iterator[tuple[int, Floats]]:
        """Logits of a text on its own, in pieces: (position of the first row, float32 (rows, n_vocab)), a view as in `decode`.

        The cache is emptied first and holds the text afterwards. keep: the text goes on from what the cache holds instead; positions
        are still those within `tokens`.
        """
        self._check_open()
        ids = self.model.check_tokens(tokens)
        before = self.n_past if keep else 0
        if before + ids.size > self.n_ctx:
            raise UsageError(f"{before + ids.size} tokens exceed the context of {self.n_ctx}. Use a larger n_ctx or fewer tokens.")
        if not keep:
            self.clear()
        for start in range(0, ids.size, self._rows_at_once):
            yield start, self.decode(ids[start : start + self._rows_at_once], outputs="all")

    def logits_of(self, tokens: TokenIds, out: Floats | None = None) -> Floats:
        """Logits at every position of a text on its own, float32 (n_tokens, n_vocab), in `out` when given.

        The cache is emptied first and holds the text afterwards.
        """
        self._check_open()
        shape = (len(tokens), self.model.n_vocab)
        if out is None:
            out = np.empty(shape, dtype=np.float32)
        elif out.shape != shape or out.dtype != np.float32:
            raise UsageError(f"out is {out.dtype} of shape {list(out.shape)}, expected float32 of shape {list(shape)}")
        for start, logits in self.iter_logits(tokens):
            out[start : start + len(logits)] = logits
        return out
