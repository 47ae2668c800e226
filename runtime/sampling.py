"""Choosing the next token: in llama.cpp's own sampler chain, and in numpy (`edgeq.runtime.token_draw`) from logits of other runtimes.

Order of the chain as in llama.cpp's tools: top-k, top-p, min-p, temperature, then a draw. Temperature 0 takes the likeliest token. Both
draw the same tokens from the same logits and seed.
"""

from __future__ import annotations

import ctypes
import math
import secrets
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgeq.errors import UsageError
from edgeq.runtime.engine import Context
from edgeq.runtime.grammar import grammar_sampler
from edgeq.runtime.llama import LlamaModel, library
from edgeq.runtime.llama_context import LlamaContext
from edgeq.runtime.token_draw import Twister, candidates, draw

if TYPE_CHECKING:
    from edgeq.runtime.onnx_context import OnnxContext

_MAX_SEED = 2**32 - 2  # 2**32 - 1 means "draw a seed" to llama.cpp


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample. top_k, top_p, min_p: None is off. seed: None draws one. grammar: GBNF; llama.cpp only."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature is {self.temperature}; expected a number of at least 0 (0 takes the likeliest token)")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k is {self.top_k}; expected at least 1")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"{name} is {value}; expected a number from 0 to 1")
        if self.seed is not None and not 0 <= self.seed <= _MAX_SEED:
            raise UsageError(f"seed is {self.seed}; expected 0 to {_MAX_SEED}")


class Sampler:
    """Chooses tokens on one context for one generation: a draw advances its random state."""

    def __init__(self, sampling: Sampling, context: Context) -> None:
        seed = secrets.randbelow(_MAX_SEED + 1) if sampling.seed is None else sampling.seed
        self._chain: _Chain = _LlamaChain(sampling, seed, context) if isinstance(context, LlamaContext) else _NumpyChain(sampling, seed)

    def sample(self, context: Context, row: int = -1) -> int:
        """The next token, from the logits of the last decode; of the token at place `row` of its batch, in llama.cpp."""
        return self._chain.sample(context, row)

    def close(self) -> None:
        self._chain.close()


class _Chain(Protocol):
    def sample(self, context: Any, row: int) -> int: ...
    def close(self) -> None: ...


class _LlamaChain:
    def __init__(self, sampling: Sampling, seed: int, context: LlamaContext) -> None:
        c = library()
        self._chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        self._free = weakref.finalize(self, c.llama_sampler_free, self._chain)
        self._sample = c.llama_sampler_sample
        if sampling.temperature == 0:
            parts = [c.llama_sampler_init_greedy()]
        else:
            parts = [
                *([c.llama_sampler_init_top_k(sampling.top_k)] if sampling.top_k is not None else []),
                *([c.llama_sampler_init_top_p(sampling.top_p, 1)] if sampling.top_p is not None else []),
                *([c.llama_sampler_init_min_p(sampling.min_p, 1)] if sampling.min_p is not None else []),
                c.llama_sampler_init_temp(sampling.temperature),
                c.llama_sampler_init_dist(seed),
            ]
        for part in parts:
            c.llama_sampler_chain_add(self._chain, part)  # the chain owns it from here
        self._held = None if sampling.grammar is None else _Held(context.model, sampling.grammar)

    def sample(self, context: LlamaContext, row: int) -> int:
        if self._held is None:
            return self._sample(self._chain, context.pointer, row)
        return self._held.sample(self._chain, context, row)

    def close(self) -> None:
        self._free()
        if self._held is not None:
            self._held.close()


_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data of llama.h


class _Held:
    """A grammar before a chain. llama.cpp ends the process when a token comes that the grammar does not allow, as one does when it allows
    none, or when a low temperature makes its logits infinite; so what is chosen is looked at before the grammar is told."""

    def __init__(self, model: LlamaModel, grammar: str) -> None:
        self._model, self._c = model, library()
        self._grammar = grammar_sampler(model, grammar)
        self._free = weakref.finalize(self, self._c.llama_sampler_free, self._grammar)
        self._candidates = np.zeros(model.n_vocab, dtype=_CANDIDATE)

    def sample(self, chain: Any, context: LlamaContext, row: int) -> int:
        c, candidates = self._c, self._candidates
        candidates["id"] = np.arange(len(candidates))
        candidates["logit"] = np.ctypeslib.as_array(c.llama_get_logits_ith(context.pointer, row), shape=(len(candidates),))
        array = c.llama_token_data_array(
            data=candidates.ctypes.data_as(c.llama_token_data_p), size=len(candidates), selected=-1, sorted=False
        )
        c.llama_sampler_apply(self._grammar, ctypes.byref(array))
        allowed = candidates["logit"] != -np.inf
        if not allowed.any():
            raise UsageError(
                f"{self._model.path}: no token of the vocabulary can go on as the grammar wants. Let it want what the model can spell."
            )
        token = likeliest = int(candidates["logit"].argmax())
        c.llama_sampler_apply(chain, ctypes.byref(array))
        if 0 <= array.selected < array.size:
            token = array.data[array.selected].id
        token = token if allowed[token] else likeliest
        c.llama_sampler_accept(self._grammar, token)
        c.llama_sampler_accept(chain, token)
        return token

    def close(self) -> None:
        self._free()


class _NumpyChain:
    def __init__(self, sampling: Sampling, seed: int) -> None:
        self._sampling, self._twister = sampling, Twister(seed)

    def sample(self, context: OnnxContext, row: int) -> int:
        s, logits = self._sampling, context.last_logits
        if s.temperature == 0:
            return int(logits.argmax())
        ids, kept = candidates(logits, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p)
        return draw(ids, kept / np.float32(s.temperature), self._twister.uniform())

    def close(self) -> None:
        """There is nothing to free."""
