"""The reference: a forward pass from a spec and lazy tensors alone, in torch, one block at a time.

Calibration reads its activations and the gate compares a package's logits with its own, so it is plain and exact before it is
fast: float32 or float64 throughout, no cache. Its logits equal those of transformers for every family.

Weights are streamed. One block (the attention or the MLP of a layer) is decoded, applied to all windows and dropped before the
next one is; what stays is the hidden states, 4 * n_embd bytes per token in float32.

Assumes tensors that fit the spec, in the names and layout of `edgeq.families`; readers see to that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from edgeq.attention import Angles, attend, by_head, rope_angles, rotate
from edgeq.errors import SourceError, UsageError
from edgeq.families import family
from edgeq.progress import Progress, silent
from edgeq.spec import Attention, Block, Mlp, ModelSpec
from edgeq.tensors import LazyTensor, take_rows

Point = Literal["attn_in", "queries", "attn_out", "mlp_in", "mlp_hidden", "head_in"]
Windows = Sequence[Sequence[int]]

# Tokens that pass through a block together; a longer window goes alone. On 2 cores with SmolLM2-135M the intermediate values of
# 1024 tokens stay near the cache, and larger batches were no faster.
BATCH_TOKENS = 1024
# Values decoded at once: bounds the temporaries of a dequantizer, which are several times its result.
CHUNK_VALUES = 1 << 22
# A head up to this size in the reference's dtype stays in memory between calls of `logits` (SmolLM2-135M: 108 MiB in float32).
HEAD_CACHE_BYTES = 512 << 20

_ATTENTION_ROLES = ("attn_norm", "wq", "wk", "wv", "wo", "q_norm", "k_norm", "post_attn_norm")
_MLP_ROLES = ("mlp_norm", "gate", "up", "down", "post_mlp_norm")
_ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


class Observer(Protocol):
    """Sees the input of every group of linears, once per layer, point and batch of windows, and queries before they are rotated.

    point, and the linears that multiply x: "attn_in" wq wk wv; "attn_out" wo; "mlp_in" gate up; "mlp_hidden" down; "head_in" the
    head, with layer None. x is (windows, tokens, width), "queries" (windows, tokens, n_heads, head_dim): to be read, not kept and
    not changed.
    """

    def __call__(self, layer: int | None, point: Point, x: torch.Tensor) -> None: ...


def ignore(layer: int | None, point: Point, x: torch.Tensor) -> None:
    """The observer that does not look."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight along the last axis. Zhang and Sennrich 2019, arXiv:1910.07467."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@dataclass(frozen=True)
class _Weights:
    """Decoded tensors of one block by `role.weight` and `role.bias`."""

    values: Mapping[str, torch.Tensor]
    eps: float

    def linear(self, role: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.values[f"{role}.weight"], self.values.get(f"{role}.bias"))

    def norm(self, role: str, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.values[f"{role}.weight"], self.eps)


@dataclass
class _Batch:
    """Windows of one length: where the caller had them, their states (windows, n_tokens, n_embd), and LongRoPE's context length."""

    index: list[int]
    states: torch.Tensor
    n_ctx: int

    @property
    def n_tokens(self) -> int:
        return self.states.shape[1]


class Reference:
    """A model ready to run. Nothing is decoded before `hidden` or `logits` needs it.

    dtype is that of weights, activations and logits: torch.float32, or torch.float64 for checks that allow no more than rounding.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Mapping[str, LazyTensor],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.spec = spec
        self.tensors = tensors
        self.device = torch.device(device)
        self.dtype = dtype
        self._family = family(spec.family)
        self._angles: dict[tuple[str, int, int], Angles | None] = {}
        self._head: torch.Tensor | None = None

    @torch.no_grad()
    def hidden(
        self,
        windows: Windows,
        *,
        n_ctx: int | None = None,
        observe: Observer = ignore,
        step: str = "reference",
        progress: Progress = silent,
    ) -> list[torch.Tensor]:
        """Final-normed hidden states, (n_tokens, n_embd) for each window of token ids, in the order given.

        Each window is a text of its own that starts at position 0. n_ctx is the context length by which LongRoPE chooses its
        factors: the window's own length if None, as transformers does; llama.cpp goes by the length of its context.
        Progress counts blocks under the name `step`. Raises UsageError for an empty window or an id outside the vocabulary.
        """
        _check(windows, self.spec.n_vocab)
        batches = [self._embed(windows, index, n_ctx) for index in _batches(windows)]
        for done, block in enumerate(self.spec.blocks):
            progress(step, done, len(self.spec.blocks))
            weights = self._weights(block)
            for batch in batches:
                batch.states += self._run(block, weights, batch, observe)
            del weights  # before the next block is decoded
        final_norm = self._load("final_norm.weight")
        hidden: dict[int, torch.Tensor] = {}
        for batch in batches:
            batch.states = rms_norm(batch.states, final_norm, self.spec.norm_eps)
            observe(None, "head_in", batch.states)
            hidden |= zip(batch.index, batch.states, strict=True)
        progress(step, len(self.spec.blocks), len(self.spec.blocks))
        return [hidden[i] for i in range(len(windows))]

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores of every token, (n_tokens, n_vocab), from rows of final-normed hidden states, (n_tokens, n_embd).

        A head above HEAD_CACHE_BYTES is decoded anew in each call, a few rows at a time: then pass many tokens at once.
        """
        name = "embed.weight" if self.spec.tied else "head.weight"
        if self._head is None and self.spec.n_vocab * self.spec.n_embd * self.dtype.itemsize <= HEAD_CACHE_BYTES:
            self._head = self._load(name)
        if self._head is not None:
            return F.linear(hidden, self._head)
        head = self._tensor(name)
        logits = torch.empty(len(hidden), head.n_rows, device=self.device, dtype=self.dtype)
        for start, stop in _row_chunks(head):
            logits[:, start:stop] = F.linear(hidden, self._decode(head, start, stop))
        return logits

    @torch.no_grad()
    def embed(self, windows: Windows) -> torch.Tensor:
        """Embeddings of windows of one length: (windows, n_tokens, n_embd). Raises UsageError as `hidden` does."""
        _check(windows, self.spec.n_vocab)
        return self._embed(windows, list(range(len(windows))), None).states

    def layer(self, blocks: Sequence[Block]) -> Callable[[torch.Tensor, Observer], torch.Tensor]:
        """Blocks in a row, decoded once: a function from states (windows, n_tokens, n_embd) to the states behind them.

        Gradients flow through it where torch has them enabled.
        """
        loaded = [(block, self._weights(block)) for block in blocks]

        def run(states: torch.Tensor, observe: Observer) -> torch.Tensor:
            for block, weights in loaded:
                states = states + self._run(block, weights, _Batch([], states, states.shape[1]), observe)
            return states

        return run

    def final_norm(self, states: torch.Tensor) -> torch.Tensor:
        """What the head reads, from the states behind the last block."""
        return rms_norm(states, self._load("final_norm.weight"), self.spec.norm_eps)

    @torch.no_grad()
    def head_transposed(self, slopes: torch.Tensor) -> torch.Tensor:
        """slopes (n_tokens, n_vocab) times the head's matrix: gradients by logits turned into gradients by `logits`' argument."""
        head = self._tensor("embed.weight" if self.spec.tied else "head.weight")
        if self._head is not None:
            return slopes @ self._head
        back = slopes.new_zeros(len(slopes), self.spec.n_embd)
        for start, stop in _row_chunks(head):
            back += slopes[:, start:stop] @ self._decode(head, start, stop)
        return back

    def _embed(self, windows: Windows, index: list[int], n_ctx: int | None) -> _Batch:
        ids, place = np.unique(np.array([windows[i] for i in index]), return_inverse=True)
        rows = self._rows("embed.weight", ids)
        states = rows[torch.from_numpy(place).to(self.device)] * self.spec.embed_scale
        return _Batch(index, states, states.shape[1] if n_ctx is None else n_ctx)

    def _run(self, block: Block, w: _Weights, batch: _Batch, observe: Observer) -> torch.Tensor:
        """What a block adds to the residual stream, (windows, n_tokens, n_embd)."""
        if isinstance(block, Attention):
            branch, post_norm = self._attention(block, w, batch, observe), "post_attn_norm"
        else:
            branch, post_norm = self._mlp(block, w, batch, observe), "post_mlp_norm"
        return w.norm(post_norm, branch) if self._family.post_norms else branch

    def _attention(self, block: Attention, w: _Weights, batch: _Batch, observe: Observer) -> torch.Tensor:
        x = w.norm("attn_norm", batch.states)
        observe(block.layer, "attn_in", x)
        q, k, v = (w.linear(role, x).unflatten(-1, (-1, block.head_dim)) for role in ("wq", "wk", "wv"))
        if self._family.qk_norm:
            q, k = w.norm("q_norm", q), w.norm("k_norm", k)
        observe(block.layer, "queries", q)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # (windows, heads, n_tokens, head_dim)
        angles = self._angles_of(block, batch)
        if angles is not None:
            q, k = rotate(q, by_head(angles, block.pairs, block.n_heads)), rotate(k, by_head(angles, block.pairs, block.n_kv_heads))
        mixed = attend(q, k, v, scale=self.spec.attn_scale, window=block.window).transpose(1, 2).flatten(2)
        observe(block.layer, "attn_out", mixed)
        return w.linear("wo", mixed)

    def _mlp(self, block: Mlp, w: _Weights, batch: _Batch, observe: Observer) -> torch.Tensor:
        x = w.norm("mlp_norm", batch.states)
        observe(block.layer, "mlp_in", x)
        hidden = _ACTIVATIONS[self._family.activation](w.linear("gate", x)).mul_(w.linear("up", x))
        observe(block.layer, "mlp_hidden", hidden)
        return w.linear("down", hidden)

    def _angles_of(self, block: Attention, batch: _Batch) -> Angles | None:
        key = (block.rope, batch.n_tokens, batch.n_ctx)
        if key not in self._angles:
            rope = self.spec.rope_of(block)
            self._angles[key] = (
                None if rope is None else rope_angles(rope, batch.n_tokens, n_ctx=batch.n_ctx, device=self.device, dtype=self.dtype)
            )
        return self._angles[key]

    def _weights(self, block: Block) -> _Weights:
        wanted = _ATTENTION_ROLES if isinstance(block, Attention) else _MLP_ROLES
        names = [f"{role}.weight" for role in wanted if role in self._family.roles]
        names += [f"{role}.bias" for role in wanted if role in self.spec.biases]
        return _Weights({name: self._load(f"layers.{block.layer}.{name}") for name in names}, self.spec.norm_eps)

    def _tensor(self, name: str) -> LazyTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise SourceError(f"{name} is missing: the spec of this {self.spec.family} model asks for it") from None

    def _load(self, name: str) -> torch.Tensor:
        """A whole tensor, decoded a few rows at a time."""
        tensor = self._tensor(name)
        values = torch.empty(tensor.shape, device=self.device, dtype=self.dtype)
        if len(tensor.shape) == 1:
            return values.copy_(self._decode(tensor, 0, 1))
        for start, stop in _row_chunks(tensor):
            values[start:stop] = self._decode(tensor, start, stop)
        return values

    def _decode(self, tensor: LazyTensor, start: int, stop: int) -> torch.Tensor:
        return torch.from_numpy(tensor.decode(start, stop)).to(device=self.device, dtype=self.dtype)

    def _rows(self, name: str, ids: np.ndarray) -> torch.Tensor:
        """Rows `ids` (ascending) of a matrix; neighbours are read together, since some tensors decode every row in between."""
        tensor = self._tensor(name)
        near = [ids[np.searchsorted(ids, start) : np.searchsorted(ids, stop)] for start, stop in _row_chunks(tensor)]
        return torch.cat([self._decode(take_rows(tensor, rows), 0, len(rows)) for rows in near if len(rows)])


def _row_chunks(tensor: LazyTensor) -> Iterator[tuple[int, int]]:
    """Bounds of runs of rows, at most CHUNK_VALUES values each."""
    step = max(1, CHUNK_VALUES // tensor.n_cols)
    for start in range(0, tensor.n_rows, step):
        yield start, min(start + step, tensor.n_rows)


def _batches(windows: Windows) -> list[list[int]]:
    """Positions of windows that run together: of equal length, at most BATCH_TOKENS tokens unless one window is longer."""
    by_length: dict[int, list[int]] = {}
    for i, window in enumerate(windows):
        by_length.setdefault(len(window), []).append(i)
    batches = []
    for length, index in by_length.items():
        step = max(1, BATCH_TOKENS // length)
        batches += [index[start : start + step] for start in range(0, len(index), step)]
    return batches


def _check(windows: Windows, n_vocab: int) -> None:
    for i, window in enumerate(windows):
        if len(window) == 0:
            raise UsageError(f"window {i} has no tokens: leave it out")
        low, high = min(window), max(window)
        if low < 0 or high >= n_vocab:
            raise UsageError(f"window {i}: token id {low if low < 0 else high} is outside the vocabulary of {n_vocab} tokens")
