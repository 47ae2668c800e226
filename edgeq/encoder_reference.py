"""The reference for encoders: a float forward pass from a spec and lazy tensors alone, in torch, one layer at a time.

Every text runs alone or with others of its length, so there is no padding and no mask to get wrong. Outputs equal those of transformers.
Weights are streamed: a layer is decoded, applied to all texts and dropped before the next one is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from edgeq.encoder_spec import LINEARS, EncoderSpec, Pooling, SentenceSpec, relative_buckets
from edgeq.errors import UsageError
from edgeq.progress import Progress, silent
from edgeq.tensors import LazyTensor, take_rows

Texts = Sequence[Sequence[int]]

BATCH_TOKENS = 1024
ROWS = 16384  # of an embedding that are looked at together
_ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


class Linears(Protocol):
    """Replaces weights as they are reached: given a layer, the roles of linears that read the same input, and that input in batches
    (.., n_in), returns the weights to go on with, (n_out, n_in) each."""

    def __call__(
        self, layer: int, roles: Sequence[str], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]: ...


def keep(layer: int, roles: Sequence[str], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The weights as they are."""
    return weights


@dataclass(frozen=True)
class _Rows:
    """Rows of a table by their ids, which are ascending."""

    ids: npt.NDArray[np.intp]
    rows: torch.Tensor

    def at(self, ids: npt.NDArray[np.intp]) -> torch.Tensor:
        """(ids.shape, n_embd)."""
        return self.rows[torch.from_numpy(np.searchsorted(self.ids, ids))]


class EncoderReference:
    """A model ready to run. Nothing is decoded before it is needed."""

    def __init__(self, spec: EncoderSpec, tensors: Mapping[str, LazyTensor], *, dtype: torch.dtype = torch.float32) -> None:
        self.spec = spec
        self.tensors = tensors
        self.dtype = dtype

    @torch.no_grad()
    def hidden(self, texts: Texts, *, replace: Linears = keep, progress: Progress = silent) -> list[torch.Tensor]:
        """Vectors of the last layer, (n_tokens, n_embd) for each text of token ids, in the order given.

        Raises UsageError for an empty text, one that is longer than there are positions, or an id outside the vocabulary.
        """
        self._check(texts)
        batches = _batches(texts)
        words = self._rows("embed.weight", np.array(sorted({token for ids in texts for token in ids})))
        states = [self._embed(np.array([texts[i] for i in index]), words) for index in batches]
        for layer in range(self.spec.n_layers):
            progress("reference", layer, self.spec.n_layers)
            states = self._layer(layer, states, replace)
        progress("reference", self.spec.n_layers, self.spec.n_layers)
        hidden = {i: row for index, batch in zip(batches, states, strict=True) for i, row in zip(index, batch, strict=True)}
        return [hidden[i] for i in range(len(texts))]

    @torch.no_grad()
    def embeddings(self, texts: Texts, sentence: SentenceSpec, *, progress: Progress = silent) -> npt.NDArray[np.float32]:
        """One vector per text, float32 (n_texts, n_out). Raises as `hidden`."""
        return self.pooled(self.hidden(texts, progress=progress), sentence)

    @torch.no_grad()
    def pooled(self, hidden: Sequence[torch.Tensor], sentence: SentenceSpec) -> npt.NDArray[np.float32]:
        """One vector per text, float32 (n_texts, n_out), from the vectors of its tokens, (n_tokens, n_embd) each."""
        pooled = torch.stack([pool(rows.to(self.dtype), sentence.pooling) for rows in hidden])
        if sentence.dense is not None:
            pooled = F.linear(pooled, self._load("dense.weight"), self._load("dense.bias"))
            pooled = pooled.tanh() if sentence.dense == "tanh" else pooled
        if sentence.normalize:
            pooled = F.normalize(pooled, dim=-1)
        return pooled.float().numpy()

    def _check(self, texts: Texts) -> None:
        for i, ids in enumerate(texts):
            if not 1 <= len(ids) <= self.spec.n_ctx:
                raise UsageError(f"text {i} has {len(ids)} tokens; the model takes 1 to {self.spec.n_ctx}")
            if min(ids) < 0 or max(ids) >= self.spec.n_vocab:
                raise UsageError(f"text {i} has a token id outside the vocabulary of {self.spec.n_vocab}")

    def _embed(self, ids: npt.NDArray[np.intp], words: _Rows) -> torch.Tensor:
        spec = self.spec
        places = np.arange(ids.shape[1])[None].repeat(len(ids), 0)
        if spec.counts_positions:
            there = ids != spec.padding_id
            places = np.cumsum(there, axis=1) * there + spec.padding_id
        states = words.at(ids) + self._rows("positions.weight", np.unique(places)).at(places)
        if spec.n_types:
            states += self._rows("types.weight", np.array([0])).at(np.zeros_like(ids))
        return self._norm("embed_norm", states)

    def _rows(self, name: str, ids: npt.NDArray[np.intp]) -> _Rows:
        """Some rows of a table; ids ascending. Gone through in pieces, because what is rounded on reading is rounded row after row."""
        parts = [ids[(ids >= start) & (ids < start + ROWS)] for start in range(0, self.tensors[name].n_rows, ROWS)]
        rows = [take_rows(self.tensors[name], part).decode() for part in parts if len(part)]
        return _Rows(ids, torch.from_numpy(np.concatenate(rows)).to(self.dtype))

    def _layer(self, layer: int, states: Sequence[torch.Tensor], replace: Linears) -> list[torch.Tensor]:
        spec = self.spec

        def linears(roles: Sequence[str], inputs: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
            """Outputs by role, of every batch."""
            weights = replace(layer, roles, inputs, [self._load(f"layers.{layer}.{role}.weight") for role in roles])
            biases = [self._load(f"layers.{layer}.{role}.bias") for role in roles]
            return [[F.linear(x, w, b) for x in inputs] for w, b in zip(weights, biases, strict=True)]

        qkv, out, up, down = LINEARS
        q, k, v = linears(qkv, states)
        mixed = [self._attend(*one) for one in zip(q, k, v, strict=True)]
        states = [self._norm(f"layers.{layer}.attn_norm", x + y) for x, y in zip(states, linears(out, mixed)[0], strict=True)]
        hidden = [_ACTIVATIONS[spec.activation](x) for x in linears(up, states)[0]]
        return [self._norm(f"layers.{layer}.mlp_norm", x + y) for x, y in zip(states, linears(down, hidden)[0], strict=True)]

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.unflatten(-1, (self.spec.n_heads, -1)).transpose(1, 2) for x in (q, k, v))
        bias = None
        if self.spec.n_buckets:
            buckets = torch.from_numpy(relative_buckets(q.shape[2], self.spec.n_buckets))
            bias = self._load("relative.weight")[buckets].permute(2, 0, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (self.spec.n_embd,), self._load(f"{name}.weight"), self._load(f"{name}.bias"), self.spec.norm_eps)

    def _load(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.tensors[name].decode()).to(self.dtype)


def pool(rows: torch.Tensor, poolings: Sequence[Pooling]) -> torch.Tensor:
    """Vectors of a text's tokens, (n_tokens, n_embd), to one vector, (len(poolings) * n_embd,)."""
    n_tokens = len(rows)
    kinds = {
        "cls": lambda: rows[0],
        "max": lambda: rows.amax(0),
        "mean": lambda: rows.mean(0),
        "mean_sqrt_len": lambda: rows.sum(0) / n_tokens**0.5,
    }
    return torch.cat([kinds[kind]() for kind in poolings])


def _batches(texts: Texts) -> list[list[int]]:
    """Texts of one length that run together, shortest first."""
    batches: list[list[int]] = []
    for i in sorted(range(len(texts)), key=lambda i: len(texts[i])):
        last = batches[-1] if batches else []
        length = len(texts[i])
        if last and len(texts[last[0]]) == length and (len(last) + 1) * length <= BATCH_TOKENS:
            last.append(i)
        else:
            batches.append([i])
    return batches
