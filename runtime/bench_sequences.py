"""Several sequences that llama.cpp computes together, each with a cache of its own: what `edgeq bench --batch` measures.

Prompts go in step by step, the same number of tokens of every sequence in one llama_decode; then every llama_decode takes one token of
each. `edgeq.runtime.lanes` is for sequences that come and go; these stay together from beginning to end.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgeq.errors import RuntimeFailure, UsageError
from edgeq.runtime.likelihood import Floats
from edgeq.runtime.llama import LlamaAdapter, LlamaModel, library
from edgeq.runtime.llama_context import Batch, LlamaContext


class LlamaSequences:
    """n_sequences sequences of up to n_ctx tokens on one model. Raises as `LlamaContext`, and UsageError for more than llama.cpp takes."""

    def __init__(self, model: LlamaModel, *, n_sequences: int, n_ctx: int, threads: int | None, kv_type: str) -> None:
        most = library().llama_max_parallel_sequences()
        if not 1 <= n_sequences <= most:
            raise UsageError(f"batch is {n_sequences}; llama.cpp computes 1 to {most} sequences together")
        self._context = LlamaContext(model, n_ctx=n_ctx, threads=threads, kv_type=kv_type, n_seq=n_sequences, max_outputs=n_sequences)
        self.model, self.n_sequences, self.n_ctx, self.threads = model, n_sequences, n_ctx, self._context.threads
        self._c, self._n_past = library(), 0
        self._step = max(1, self._context.n_batch // n_sequences)  # tokens of each sequence at once
        self._batch = Batch(self._c, self._step * n_sequences)
        self._batch.sequences[:] = np.tile(np.arange(n_sequences), self._step)  # tokens of one position stand together

    def close(self) -> None:
        self._context.close()

    def set_adapter(self, adapter: LlamaAdapter) -> None:
        """Let an adapter act on all sequences."""
        self._context.set_adapters({adapter: 1.0})

    def clear(self) -> None:
        """Empty the caches."""
        self._context.clear()
        self._n_past = 0

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Floats:
        """Append a prompt to each sequence, all of one length; returns logits of their last tokens, (n_sequences, n_vocab)."""
        ids = self._checked(prompts)
        self._check_room(ids.shape[1])
        for start in range(0, ids.shape[1], self._step):
            self._decode(ids[:, start : start + self._step], wanted=start + self._step >= ids.shape[1])
        return self._logits()

    def greedy_steps(self, tokens: npt.NDArray[np.int64], n_steps: int) -> npt.NDArray[np.int64]:
        """As `edgeq.runtime.decoding.greedy_steps`, one token of each sequence per step: clock readings in ns, (n_steps + 1,)."""
        self._check_room(n_steps)
        stamps = np.empty(n_steps + 1, dtype=np.int64)
        stamps[0] = time.perf_counter_ns()
        for i in range(1, n_steps + 1):
            self._decode(tokens[:, None], wanted=True)
            tokens = self._logits().argmax(axis=1)
            stamps[i] = time.perf_counter_ns()
        return stamps

    def _checked(self, prompts: Sequence[Sequence[int]]) -> npt.NDArray[np.int32]:
        lengths = {len(prompt) for prompt in prompts}
        if len(prompts) != self.n_sequences or len(lengths) != 1 or 0 in lengths:
            raise UsageError(f"{len(prompts)} prompts for {self.n_sequences} sequences; give one for each, all of the same length")
        return np.stack([self.model.check_tokens(prompt) for prompt in prompts])

    def _check_room(self, n: int) -> None:
        if self._n_past + n > self.n_ctx:
            raise UsageError(f"{n} tokens after the {self._n_past} in the caches exceed the context of {self.n_ctx}. Use a larger n_ctx.")

    def _decode(self, ids: npt.NDArray[np.integer], *, wanted: bool) -> None:
        """Append ids, (n_sequences, n). wanted: logits of the last token of each."""
        n_sequences, n = ids.shape
        batch, n_tokens = self._batch, n_sequences * n
        batch.tokens[:n_tokens] = ids.T.ravel()
        batch.positions[:n_tokens] = np.repeat(np.arange(self._n_past, self._n_past + n), n_sequences)
        batch.wanted[:n_tokens] = False
        batch.wanted[n_tokens - n_sequences : n_tokens] = wanted
        batch.c.n_tokens = n_tokens
        if status := self._c.llama_decode(self._context.pointer, batch.c):
            raise RuntimeFailure(f"{self.model.path}: llama_decode of {n_tokens} tokens of {n_sequences} sequences failed with {status}")
        self._n_past += n

    def _logits(self) -> Floats:
        """Logits of the last tokens, (n_sequences, n_vocab): a view that the next call overwrites. Waits for the device."""
        return np.ctypeslib.as_array(self._c.llama_get_logits(self._context.pointer), shape=(self.n_sequences, self.model.n_vocab))
