"""Several sequences over one model in llama.cpp, computed together: one llama_decode brings every one of them a token further."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgeq.errors import RuntimeFailure
from edgeq.runtime.llama import LlamaAdapter, LlamaModel, library
from edgeq.runtime.llama_context import Batch, LlamaContext


class Lanes:
    """Caches of `slots` sequences of up to n_ctx tokens each. Adapters act on all that are computed at once."""

    def __init__(self, model: LlamaModel, *, slots: int, n_ctx: int, threads: int, kv_type: str) -> None:
        self.context = LlamaContext(model, n_ctx=n_ctx, threads=threads, kv_type=kv_type, n_seq=slots, max_outputs=slots)
        self._c, self._batch = library(), Batch(library(), self.context.n_batch)
        self._lengths = [0] * slots

    @property
    def n_ctx(self) -> int:
        return self.context.n_ctx

    def set_adapters(self, scales: Mapping[LlamaAdapter, float]) -> None:
        self.context.set_adapters(scales)

    def fill(self, lane: int, ids: Sequence[int]) -> None:
        """Append tokens to a sequence. Logits of the last one are those of row -1. Raises RuntimeFailure; the sequence is empty then."""
        tokens, size = np.asarray(ids, dtype=np.int32), self.context.n_batch
        for start in range(0, len(tokens), size):
            chunk = tokens[start : start + size]
            last = start + len(chunk) == len(tokens)
            self._decode(self._batch.filled(chunk, self._lengths[lane], "last" if last else "none", lane), [lane])
            self._lengths[lane] += len(chunk)
        logits = np.ctypeslib.as_array(self._c.llama_get_logits_ith(self.context.pointer, -1), shape=(self.context.model.n_vocab,))
        if not np.isfinite(logits).all():
            self.free(lane)
            raise RuntimeFailure(
                f"{self.context.model.path}: the model's outputs are not finite. Its weights are damaged; run edgeq verify."
            )

    def step(self, tokens: Mapping[int, int]) -> None:
        """Append one token to each of some sequences, by lane, whose number is that of its row of logits.

        Raises as `fill`, for all of them. Idle lanes compute a token that nobody sees: a row's sums are then rounded alike, however many
        others run.
        """
        batch, lanes = self._batch, range(len(self._lengths))
        filled = batch.filled(np.array([tokens.get(lane, 0) for lane in lanes], dtype=np.int32), 0, "all")
        batch.sequences[: len(lanes)], batch.positions[: len(lanes)] = lanes, self._lengths
        self._decode(filled, lanes)
        for lane in lanes:
            if lane in tokens:
                self._lengths[lane] += 1
            else:
                self.free(lane)

    def free(self, lane: int) -> None:
        """Empty a sequence."""
        self._c.llama_memory_seq_rm(self.context.memory, lane, -1, -1)
        self._lengths[lane] = 0

    def close(self) -> None:
        self.context.close()

    def _decode(self, batch: Any, lanes: Sequence[int]) -> None:
        if status := self._c.llama_decode(self.context.pointer, batch):
            for lane in lanes:
                self.free(lane)
            raise RuntimeFailure(f"{self.context.model.path}: llama_decode of {len(lanes)} sequences failed with {status}.")
