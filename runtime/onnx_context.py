"""Keys and values of one sequence in ONNX Runtime, and the means to fill them.

Every buffer that grows with the context is made once. Where the graph writes keys and values in place (`onnx_facts`), one buffer of n_ctx
tokens is bound as past and as present and stays bound. Other layers get two buffers that take turns, since their operator copies the past
into the present. A failed call leaves what was remembered as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import psutil

from edgeq.errors import PlanError, RuntimeFailure, UsageError
from edgeq.runtime.likelihood import Floats
from edgeq.runtime.onnx_adapters import OnnxAdapter, combined, nothing
from edgeq.runtime.onnx_facts import Cache
from edgeq.runtime.onnx_model import QUIET, OnnxModel, library, said
from edgeq.runtime.onnx_rows import ROWS
from edgeq.runtime.text_logits import TextLogits
from edgeq.runtime.token_ids import TokenIds

_LOGITS_CHUNK = 1 << 25  # values of logits that may exist at once: 128 MiB
_DTYPES: Mapping[str, type[np.floating[Any]]] = {"f32": np.float32, "f16": np.float16}


class OnnxContext(TextLogits):
    """A KV cache for one sequence. n_ctx: tokens that fit. n_batch: most tokens computed together; longer input is split.

    kv_type: what the graph keeps keys and values in; there is no choice. max_outputs: most logits rows that one decode may return (default
    n_batch).
    """

    def __init__(
        self, model: OnnxModel, *, n_ctx: int, n_batch: int = 512, kv_type: str | None = None, max_outputs: int | None = None
    ) -> None:
        for name, value in (("n_ctx", n_ctx), ("n_batch", n_batch)):
            if value < 1:
                raise UsageError(f"{name} is {value}; expected at least 1")
        facts = model.facts
        if kv_type not in (None, facts.kv_type):
            raise UsageError(
                f"{facts.path}: this graph keeps keys and values in {facts.kv_type}, not {kv_type}. Leave kv_type out, or export the model "
                "again in the other precision."
            )
        if facts.n_positions is not None and n_ctx > facts.n_positions:
            raise PlanError(f"{facts.path}: has rotary tables for {facts.n_positions} tokens, n_ctx is {n_ctx}. Use a smaller n_ctx.")
        needed, total = facts.kv_bytes(n_ctx), psutil.virtual_memory().total
        if model.gpu is None and needed > total:
            raise PlanError(
                f"{facts.path}: {n_ctx} tokens of context need {needed / 1e9:.1f} GB of keys and values, "
                f"this machine has {total / 1e9:.1f} GB. Use a smaller n_ctx."
            )
        self.model, self.n_ctx, self.threads = model, n_ctx, model.threads
        self.kv_type: str = facts.kv_type
        most = max(1, _LOGITS_CHUNK // facts.n_vocab)
        self.n_batch = min(n_batch, n_ctx) if model.chooses_rows else min(n_batch, n_ctx, most)
        self.max_outputs = min(max_outputs or self.n_batch, self.n_batch, most)
        self.adapters: Mapping[OnnxAdapter, float] = {}
        self._n_past = 0
        self._graph: _Graph | None = _Graph(model, n_ctx)
        model._contexts.add(self)

    def close(self) -> None:
        self._graph, self.adapters = None, {}

    @property
    def n_past(self) -> int:
        """Tokens in the cache."""
        return self._n_past

    @property
    def last_logits(self) -> Floats:
        """Logits of the last token computed, (n_vocab,)."""
        return self._open.logits[-1]

    @property
    def _open(self) -> _Graph:
        assert self.model.session
        if self._graph is None:
            raise RuntimeFailure(f"{self.model.path}: the context is closed. Make a new one.")
        return self._graph

    def set_adapters(self, scales: Mapping[OnnxAdapter, float]) -> None:
        """Let these adapters, times their scales, act on what is decoded from now on; none for an empty mapping.

        The cache stays as it is: keys and values in it were computed under the adapters of their time. Several together, or one that is
        scaled, take as much memory again.
        """
        for adapter in scales:
            if adapter.model is not self.model:
                raise UsageError(f"{adapter.path}: the adapter was loaded for another model")
        if scales != self.adapters:
            self._open.set_adapters(combined(scales))
            self.adapters = dict(scales)

    def clear(self) -> None:
        """Empty the cache."""
        self._check_open()
        self._n_past = 0

    def truncate(self, n_tokens: int) -> int:
        """Forget what follows the first `n_tokens` tokens; returns how many are left.

        That is 0 on a GPU when layers of the graph cannot write in place: their cache would have to be moved together there.
        """
        graph = self._open
        if not 0 <= n_tokens <= self._n_past:
            raise UsageError(f"cannot keep {n_tokens} tokens of the {self._n_past} in the cache")
        self._n_past = graph.truncate(self._n_past, n_tokens)
        return self._n_past

    def decode(self, tokens: TokenIds, *, outputs: Literal["last", "all"] = "last") -> Floats:
        """Append tokens to the sequence and return their logits.

        Returns float32 (1, n_vocab) for the last token, or (n_tokens, n_vocab): a view, good until the next call on this context. With
        outputs="all" at most `max_outputs` tokens; `logits_of` takes more.
        Raises UsageError for ids out of range, no tokens, or more than fit; RuntimeFailure when ONNX Runtime fails. The cache is then as
        before the call, or as before the batch that failed.
        """
        graph, ids = self._open, self.model.check_tokens(tokens)
        if not ids.size:
            raise UsageError("no tokens to decode; give at least one")
        self._check_room(ids.size)
        if outputs == "all" and ids.size > self.max_outputs:
            raise UsageError(f"logits of {ids.size} tokens were asked for at once, at most {self.max_outputs} are possible. Use logits_of.")
        for start in range(0, ids.size, self.n_batch):
            chunk = ids[start : start + self.n_batch]
            graph.run(chunk, self._n_past, n_rows=len(chunk) if outputs == "all" else 1)
            self._n_past += len(chunk)
        return graph.logits

    def _check_room(self, n_tokens: int) -> None:
        if self._n_past + n_tokens > self.n_ctx:
            raise UsageError(
                f"{n_tokens} tokens after the {self._n_past} in the cache exceed the context of {self.n_ctx}. Use a larger n_ctx."
            )

    def greedy_stepper(self, n_steps: int) -> Callable[[int], int]:
        """A function that appends one token and returns the likeliest next one, for loops whose overhead matters.

        Room for n_steps tokens is checked once, here; the argument must be a token of the vocabulary and is not checked.
        Raises UsageError when n_steps tokens do not fit.
        """
        self._check_room(n_steps)
        graph, ids = self._open, np.zeros(1, dtype=np.int32)

        def step(token: int) -> int:
            ids[0] = token
            graph.run(ids, self._n_past, n_rows=1)
            self._n_past += 1
            return int(graph.logits[-1].argmax())

        return step

    def _check_open(self) -> None:
        assert self._open

    @property
    def _rows_at_once(self) -> int:
        return self.max_outputs


class _Graph:
    """A model's graph with every input and output bound to memory of ours. logits: float32 (n_rows, n_vocab) of the last run.

    A binding takes 2 to 3 microseconds, so what did not move is not bound again: in a step of one token that leaves the mask and the caches
    that take turns.
    """

    def __init__(self, model: OnnxModel, n_ctx: int) -> None:
        ort, facts = library(), model.facts
        self._model, self._facts, self._n_ctx = model, facts, n_ctx
        self._options = ort.RunOptions()
        self._options.log_severity_level = QUIET
        self._ids, self._mask, self._positions = _Numbers(np.zeros(n_ctx)), _Numbers(np.ones(n_ctx)), _Numbers(np.arange(n_ctx))
        self._fed: dict[str, tuple[list[int], int]] = {}
        self._output = np.empty((0, facts.n_vocab), dtype=_DTYPES[facts.float_type])
        self.logits: Floats = np.empty((0, facts.n_vocab), dtype=np.float32)
        self._fixed = [(cache, _Buffer(cache, n_ctx, model)) for cache in facts.caches if cache.in_place]
        self._turning = [(cache, [_Buffer(cache, n_ctx, model) for _ in range(2)]) for cache in facts.caches if not cache.in_place]
        self._turn = 0
        self._bind(model.session)

    def _bind(self, session: Any) -> None:
        """Bind what stays in its place, in a session that nothing is bound in yet."""
        self._session, self._binding = session, session.io_binding()
        self._adapters: Mapping[str, Any] = {}
        self._fed.clear()
        for cache, buffer in self._fixed:
            self._binding.bind_input(cache.past, *buffer.place(self._n_ctx))
            self._binding.bind_output(cache.present, *buffer.place(self._n_ctx))

    def _follow(self) -> None:
        """Go over to the model's session, if it has another one."""
        if (session := self._model.session) is not self._session:
            self._bind(session)

    def run(self, ids: npt.NDArray[np.int32], n_past: int, *, n_rows: int) -> None:
        """Compute tokens behind n_past others, and the logits of the last n_rows of them."""
        n, facts, model = len(ids), self._facts, self._model
        self._follow()
        self._ids.values[:n] = ids
        self._feed(facts.ids, self._ids, [1, n])
        self._feed(facts.mask, self._mask, [1, n_past + n])
        if facts.positions is not None:
            self._feed(facts.positions, self._positions, [1, n], start=n_past)
        if model.chooses_rows:
            self._feed(ROWS, self._positions, [n_rows], start=n - n_rows)
        made = self._bind_logits(n_rows if model.chooses_rows else n)
        for cache, buffers in self._turning:
            self._binding.bind_input(cache.past, *buffers[self._turn].place(n_past))
            self._binding.bind_output(cache.present, *buffers[1 - self._turn].place(n_past + n))
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as err:  # its errors have no base of their own
            raise RuntimeFailure(f"{facts.path}: computing {n} tokens after {n_past} failed. ONNX Runtime said: {said(err)}") from err
        self._turn = 1 - self._turn
        self.logits = made[len(made) - n_rows :].astype(np.float32, copy=False)

    def set_adapters(self, values: Mapping[str, Any]) -> None:
        """Bind inputs for adapters to these values, and those that were bound before to nothing."""
        if values:
            self._model.with_places()
        self._follow()
        gone = {name: value for name, value in self._adapters.items() if name not in values}
        for name, value in (*nothing(self._model, gone).items(), *values.items()):
            self._binding.bind_ortvalue_input(name, value)
        self._adapters = values

    def truncate(self, n_past: int, n_tokens: int) -> int:
        """Keep the first n_tokens of n_past tokens, if that can be done; how many are kept."""
        if not self._turning or n_tokens in (0, n_past):
            return n_tokens
        if self._model.gpu is not None:
            return 0
        for _, buffers in self._turning:
            buffers[self._turn].keep(n_past, n_tokens)
        return n_tokens

    def _feed(self, name: str, numbers: _Numbers, shape: list[int], *, start: int = 0) -> None:
        """Bind an input to a part of an array that stays. For a GPU its values are copied here, so that it has to be done every time."""
        place = shape, numbers.address + numbers.values.itemsize * start
        if self._model.gpu is not None or self._fed.get(name) != place:
            self._binding.bind_input(name, "cpu", 0, np.int64, *place)
            self._fed[name] = place

    def _bind_logits(self, n_rows: int) -> npt.NDArray[np.floating[Any]]:
        """Where the logits of that many tokens will be: (n_rows, n_vocab)."""
        if len(self._output) < n_rows:
            self._output = np.empty((n_rows, self._facts.n_vocab), dtype=self._output.dtype)
        made = self._output[:n_rows]
        place = [1, *made.shape], made.ctypes.data
        if self._fed.get(self._facts.logits) != place:
            self._binding.bind_output(self._facts.logits, "cpu", 0, made.dtype.type, *place)
            self._fed[self._facts.logits] = place
        return made


class _Numbers:
    """An array of int64 that stays where it is, and its address."""

    def __init__(self, values: npt.NDArray[Any]) -> None:
        self.values = values.astype(np.int64)
        self.address: int = self.values.ctypes.data


class _Buffer:
    """Memory for the keys or values of one layer, on the model's device."""

    def __init__(self, cache: Cache, n_ctx: int, model: OnnxModel) -> None:
        self._cache, self._dtype = cache, _DTYPES[model.facts.kv_type]
        if model.gpu is None:
            self._device = ("cpu", 0)
            self._values = np.zeros(cache.values(n_ctx), dtype=self._dtype)  # pages that are never written take no memory
            self._address = self._values.ctypes.data
        else:
            self._device = ("cuda", model.gpu)
            self._on_gpu = library().OrtValue.ortvalue_from_shape_and_type([cache.values(n_ctx)], self._dtype, *self._device)
            self._address = self._on_gpu.data_ptr()

    def place(self, n_tokens: int) -> tuple[str, int, type[np.floating[Any]], list[int], int]:
        """Arguments to bind the first n_tokens tokens."""
        return (*self._device, self._dtype, [1, self._cache.n_kv_heads, n_tokens, self._cache.length], self._address)

    def keep(self, n_past: int, n_tokens: int) -> None:
        """Move the first n_tokens of n_past tokens of every head together."""
        heads = self._values[: self._cache.values(n_past)].reshape(self._cache.n_kv_heads, n_past, self._cache.length)
        kept = heads[:, :n_tokens].copy()
        self._values[: kept.size] = kept.ravel()
