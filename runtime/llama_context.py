"""Contexts of llama.cpp: a cache of keys and values, and batches of tokens that are computed into it.

Refused here, since C would answer with an abort: token ids out of range, batches beyond the batch size, positions beyond the context. A
context is closed by `close()`, by its `with` block or when it is dropped. It must not be used by two threads at once.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import psutil

from edgeq.errors import PlanError, RuntimeFailure, UsageError
from edgeq.grids import grid
from edgeq.runtime.cores import usable_cores
from edgeq.runtime.likelihood import Floats
from edgeq.runtime.llama import LlamaAdapter, LlamaModel, captured, said
from edgeq.runtime.memory import kv_bytes
from edgeq.runtime.text_logits import TextLogits
from edgeq.runtime.token_ids import TokenIds

KV_TYPES = ("f16", "f32", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
_LOGITS_CHUNK = 1 << 25  # values of logits that may exist at once while a long text is scored: 128 MiB


@dataclass(frozen=True)
class State:
    """What a context remembers: the number of tokens in its cache, and llama.cpp's bytes. For use within one process."""

    n_past: int
    data: bytes


class LlamaContext(TextLogits):
    """A KV cache for one sequence, and the means to fill it; or room for several (`edgeq.runtime.lanes`).

    n_ctx: tokens that fit, of each of n_seq sequences (llama.cpp rounds its cells up to a multiple of 256). n_batch: most tokens per
    llama_decode; longer input is split. n_ubatch: most tokens computed together. threads: default is every core this process may use.
    kv_type: number format of keys and values, one of KV_TYPES. flash_attention: None leaves it to llama.cpp.
    max_outputs: most logits rows that one decode may return (default n_batch); llama.cpp reserves memory for that many.
    """

    def __init__(
        self,
        model: LlamaModel,
        *,
        n_ctx: int,
        n_batch: int = 512,
        n_ubatch: int = 512,
        threads: int | None = None,
        kv_type: str = "f16",
        flash_attention: bool | None = None,
        max_outputs: int | None = None,
        n_seq: int = 1,
    ) -> None:
        if model.vocab_only:
            raise UsageError(f"{model.path} was loaded with vocab_only, without weights. Load it in full to decode.")
        threads = usable_cores() if threads is None else threads
        for name, value in (("n_ctx", n_ctx), ("n_batch", n_batch), ("n_ubatch", n_ubatch), ("threads", threads), ("n_seq", n_seq)):
            if value < 1:
                raise UsageError(f"{name} is {value}; expected at least 1")
        self.model, self.n_ctx, self.threads, self.kv_type, self.n_seq = model, n_ctx, threads, kv_type, n_seq
        self.n_batch = max(min(n_batch, n_ctx * n_seq), n_seq)
        self.n_ubatch = min(n_ubatch, self.n_batch)
        self.max_outputs = min(max_outputs or self.n_batch, self.n_batch)
        self._c = model._c
        pointer = self._create(flash_attention)
        self._open: int | None = pointer
        self._memory = self._c.llama_get_memory(pointer)
        self._batch = Batch(self._c, self.n_batch)
        self._n_past = 0
        self.adapters: Mapping[LlamaAdapter, float] = {}
        self._free = weakref.finalize(self, _free_context, self._c, pointer, model)
        model._contexts.add(self)

    def _create(self, flash_attention: bool | None) -> int:
        c, model = self._c, self.model
        params = c.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = self._cells, self.n_batch, self.n_ubatch
        params.n_seq_max, params.kv_unified = self.n_seq, False  # each sequence has cells of its own
        params.n_outputs_max = self.max_outputs
        params.n_threads = params.n_threads_batch = self.threads
        params.type_k = params.type_v = _kv_id(model, self._cells, self.kv_type, flash_attention)
        params.flash_attn_type = {
            None: c.LLAMA_FLASH_ATTN_TYPE_AUTO,
            True: c.LLAMA_FLASH_ATTN_TYPE_ENABLED,
            False: c.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        }[flash_attention]
        params.swa_full = False  # windowed layers keep a window's worth of cells, not n_ctx
        params.offload_kqv = params.op_offload = bool(model.gpu_layers)
        with captured() as lines:
            pointer = c.llama_init_from_model(model.pointer, params)
        if not pointer:
            raise RuntimeFailure(
                f"{model.path}: llama.cpp cannot make a context of {self.n_ctx} tokens with {self.kv_type} keys and values. "
                f"It said: {said(lines)}"
            )
        return pointer

    @property
    def _cells(self) -> int:
        """Of all sequences; llama.cpp gives each a multiple of 256."""
        return self.n_ctx if self.n_seq == 1 else self.n_seq * -(-self.n_ctx // 256) * 256

    @property
    def memory(self) -> Any:
        """llama.cpp's handle of the cache."""
        return self._memory

    def close(self) -> None:
        self._open, self.adapters = None, {}
        self._free()

    @property
    def pointer(self) -> int:
        """llama.cpp's handle."""
        if self._open is None:
            raise RuntimeFailure(f"{self.model.path}: the context is closed. Make a new one.")
        return self._open

    def _check_open(self) -> None:
        assert self.pointer

    @property
    def n_past(self) -> int:
        """Tokens in the cache."""
        return self._n_past

    def set_adapters(self, scales: Mapping[LlamaAdapter, float]) -> None:
        """Let these adapters, times their scales, act on what is decoded from now on; none for an empty mapping.

        The cache stays as it is: keys and values in it were computed under the adapters of their time. Another set of adapters than
        before costs the next decode a new reservation of its graph.
        """
        for adapter, scale in scales.items():
            if adapter.model is not self.model:
                raise UsageError(f"{adapter.path}: the adapter was loaded for another model")
            if not math.isfinite(scale):
                raise UsageError(f"{adapter.path}: the adapter's scale is {scale}; expected a finite number")
        c, n = self._c, len(scales)
        pointers = (c.llama_adapter_lora_p_ctypes * n)(*(adapter.pointer for adapter in scales))
        status = c.llama_set_adapters_lora(self.pointer, pointers, n, (ctypes.c_float * n)(*scales.values()))
        if status:
            raise RuntimeFailure(f"{self.model.path}: llama.cpp cannot set {n} adapters (status {status})")
        self.adapters = dict(scales)

    def clear(self) -> None:
        """Empty the cache."""
        self._check_open()
        self._c.llama_memory_clear(self._memory, False)
        self._n_past = 0

    def truncate(self, n_tokens: int) -> int:
        """Forget what follows the first `n_tokens` tokens; returns how many are left.

        That is fewer (0) when a sliding window has already dropped cells that the remaining tokens would look back at.
        """
        self._check_open()
        if not 0 <= n_tokens <= self._n_past:
            raise UsageError(f"cannot keep {n_tokens} tokens of the {self._n_past} in the cache")
        if n_tokens == self._n_past:
            return n_tokens
        window = self.model.n_window
        if n_tokens and window and self._c.llama_memory_seq_pos_min(self._memory, 0) > max(0, n_tokens - window):
            n_tokens = 0
        if n_tokens and self._c.llama_memory_seq_rm(self._memory, 0, n_tokens, -1):
            self._n_past = n_tokens
        else:
            self.clear()
        return self._n_past

    def decode(self, tokens: TokenIds, *, outputs: Literal["last", "all"] = "last") -> Floats:
        """Append tokens to the sequence and return their logits.

        Returns float32 (1, n_vocab) for the last token, or (n_tokens, n_vocab): a view of llama.cpp's memory, good until the next
        call on this context. With outputs="all" at most `max_outputs` tokens; `logits_of` takes more.
        Raises UsageError for ids out of range, no tokens, or more than fit (the cache is then as before); RuntimeFailure when
        llama.cpp fails, after dropping what it had taken.
        """
        pointer, ids = self.pointer, self.model.check_tokens(tokens)
        if not ids.size:
            raise UsageError("no tokens to decode; give at least one")
        if self._n_past + ids.size > self.n_ctx:
            raise UsageError(
                f"{ids.size} tokens after the {self._n_past} in the cache exceed the context of {self.n_ctx}. Use a larger n_ctx."
            )
        if outputs == "all" and ids.size > self.max_outputs:
            raise UsageError(f"logits of {ids.size} tokens were asked for at once, at most {self.max_outputs} are possible. Use logits_of.")
        for start in range(0, ids.size, self.n_batch):
            chunk = ids[start : start + self.n_batch]
            last = start + len(chunk) == ids.size
            self._decode_batch(chunk, "all" if outputs == "all" else "last" if last else "none")
        n_outputs = ids.size if outputs == "all" else 1
        return np.ctypeslib.as_array(self._c.llama_get_logits(pointer), shape=(n_outputs, self.model.n_vocab))

    def _check_room(self, n_tokens: int) -> None:
        if self._n_past + n_tokens > self.n_ctx:
            raise UsageError(
                f"{n_tokens} tokens after the {self._n_past} in the cache exceed the context of {self.n_ctx}. Use a larger n_ctx."
            )

    def _decode_batch(self, ids: npt.NDArray[np.int32], outputs: Literal["last", "all", "none"]) -> None:
        with captured() as lines:
            status = self._c.llama_decode(self.pointer, self._batch.filled(ids, self._n_past, outputs))
        if status:
            self._c.llama_memory_seq_rm(self._memory, 0, self._n_past, -1)
            meaning = {1: "no room in the KV cache", 2: "stopped", -1: "bad input"}.get(status, "computation failed")
            raise RuntimeFailure(
                f"{self.model.path}: llama_decode of {len(ids)} tokens failed with {status} ({meaning}). It said: {said(lines)}"
            )
        self._n_past += len(ids)

    def greedy_stepper(self, n_steps: int) -> Callable[[int], int]:
        """A function that appends one token and returns the likeliest next one, for loops whose overhead matters.

        Room for n_steps tokens is checked once, here; the argument must be a token of the vocabulary and is not checked. numpy's
        argmax takes 4 us for 49,152 logits; llama.cpp's greedy sampler, which first lists all candidates, takes 100 us.
        Raises UsageError when n_steps tokens do not fit.
        """
        self._check_room(n_steps)
        pointer, decode, logits_of_last = self.pointer, self._c.llama_decode, self._c.llama_get_logits
        batch = self._batch.filled(np.zeros(1, dtype=np.int32), self._n_past, "last")
        tokens, positions, shape = self._batch.tokens, self._batch.positions, (self.model.n_vocab,)
        address, logits = 0, np.empty(shape, dtype=np.float32)

        def step(token: int) -> int:
            nonlocal address, logits
            tokens[0] = token
            positions[0] = self._n_past
            if status := decode(pointer, batch):
                raise RuntimeFailure(f"{self.model.path}: llama_decode failed with {status} at position {self._n_past}")
            self._n_past += 1
            found = logits_of_last(pointer)  # waits for the device
            if (now := ctypes.addressof(found.contents)) != address:
                address, logits = now, np.ctypeslib.as_array(found, shape=shape)
            return int(logits.argmax())

        return step

    @property
    def _rows_at_once(self) -> int:
        return min(self.n_ubatch, self.max_outputs, max(1, _LOGITS_CHUNK // self.model.n_vocab))

    def state(self) -> State:
        """The cache and the last logits, for `restore` on a context of the same shape."""
        size = self._c.llama_state_get_size(self.pointer)
        buffer = (ctypes.c_uint8 * size)()
        written = self._c.llama_state_get_data(self.pointer, buffer, size)
        return State(n_past=self._n_past, data=bytes(buffer)[:written])

    def restore(self, state: State) -> None:
        """Bring back what `state` saved. Raises RuntimeFailure when it came from another model or another kind of context."""
        buffer = (ctypes.c_uint8 * len(state.data)).from_buffer_copy(state.data)
        with captured() as lines:
            read = self._c.llama_state_set_data(self.pointer, buffer, len(state.data))
        if read != len(state.data):
            self.clear()
            raise RuntimeFailure(f"{self.model.path}: this state does not fit the context. llama.cpp said: {said(lines)}")
        self._n_past = state.n_past


class Batch:
    """A llama_batch over memory of our own, filled in place. Each token is of one sequence."""

    def __init__(self, c: ModuleType, size: int) -> None:
        self.tokens = np.zeros(size, dtype=np.int32)
        self.positions = np.zeros(size, dtype=np.int32)
        self.wanted = np.zeros(size, dtype=np.int8)
        self._counts = np.ones(size, dtype=np.int32)
        self.sequences = np.zeros(size, dtype=np.int32)
        ints = ctypes.POINTER(ctypes.c_int32)
        first = self.sequences.ctypes.data
        self._sequences = (ints * size)(*(ctypes.cast(first + 4 * i, ints) for i in range(size)))
        self.c = c.llama_batch(
            n_tokens=0,
            token=self.tokens.ctypes.data_as(ints),
            embd=None,
            pos=self.positions.ctypes.data_as(ints),
            n_seq_id=self._counts.ctypes.data_as(ints),
            seq_id=self._sequences,
            logits=self.wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def filled(self, ids: npt.NDArray[np.int32], start: int, outputs: Literal["last", "all", "none"], sequence: int = 0) -> Any:
        n = len(ids)
        assert 0 < n <= len(self.tokens)
        self.tokens[:n], self.sequences[:n] = ids, sequence
        self.positions[:n] = np.arange(start, start + n)
        self.wanted[:n] = outputs == "all"
        self.wanted[n - 1] = outputs != "none"
        self.c.n_tokens = n
        return self.c


def _free_context(c: ModuleType, pointer: int, _model: LlamaModel) -> None:
    """Holding the model here keeps it until its context is gone, in whatever order both are dropped."""
    c.llama_free(pointer)


def _kv_id(model: LlamaModel, n_ctx: int, kv_type: str, flash_attention: bool | None) -> int:
    """ggml's id of a KV type, checked against the model and the machine's memory."""
    facts = model.facts
    if kv_type not in KV_TYPES:
        raise UsageError(f"kv_type {kv_type!r} is not known; expected one of {', '.join(KV_TYPES)}")
    kv_grid = grid(kv_type.upper())
    if not kv_grid.is_float and flash_attention is False:
        raise UsageError(f"kv_type {kv_type} needs flash attention. Leave it on or use f16.")
    if not kv_grid.fits(facts.key_length):
        raise UsageError(
            f"{facts.path.name}: heads of {facts.key_length} do not divide into {kv_grid.name} blocks of {kv_grid.block_size}. "
            "Use kv_type f16."
        )
    # llama.cpp would fill gigabytes before it finds that a cache does not fit.
    needed, total = kv_bytes(facts, n_ctx, kv_type), psutil.virtual_memory().total
    if not model.gpu_layers and needed > total:
        raise PlanError(
            f"{facts.path}: {n_ctx} tokens of context need {needed / 1e9:.1f} GB of keys and values, "
            f"this machine has {total / 1e9:.1f} GB. Use a smaller n_ctx."
        )
    return kv_grid.id
