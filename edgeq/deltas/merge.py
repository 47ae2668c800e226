"""Adapters merged into a model, tensor by tensor, when a tensor is read.

Arithmetic is float64 on the base's exact values (a quantized base is what its grid decodes to: that is what a QLoRA adapter was
trained on), the result float32. Tensors that no adapter touches stay as they are, in their own grid; those of an adapter inside the
quantizer come out in the grid of its codes (`edgeq.deltas.inside`), which carriers keep as they keep those of any quantized checkpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgeq.deltas.adapter import Adapter
from edgeq.deltas.delta import Array, Delta, Part, f64
from edgeq.deltas.inside import Inside
from edgeq.errors import ShapeError, SourceError, UnsupportedError
from edgeq.grids import F32
from edgeq.model import Model, Tokenizer
from edgeq.tensors import Bytes, Floats, LazyTensor, check_finite

EMBED, HEAD = "embed.weight", "head.weight"


@dataclass(frozen=True, kw_only=True)
class _Step:
    delta: Delta
    scale: float
    adapter: str


def merged(model: Model, adapters: Sequence[tuple[Adapter, float]], *, tokenizer: Tokenizer | None = None) -> Model:
    """The model with every adapter applied at its scale, in the order given; nothing is computed before a tensor is read.

    A scale s moves each tensor by s times what the adapter would: scale 0 changes nothing, and for LoRA s multiplies alpha. An
    adapter on either of a shared embedding and head, but not both alike, separates them. tokenizer: needed when an adapter has added
    tokens. Raises SourceError naming the first tensor that does not fit the model, and for results that are not finite (when read);
    UnsupportedError for what cannot be merged.
    """
    names = [adapter.name for adapter, _ in adapters]
    for name in names:
        if names.count(name) > 1:
            raise UnsupportedError(f"two adapters are called {name!r}. Give one of them another name.")
    bases = dict(model.tensors)
    separate = model.spec.tied and any(a.deltas.get(EMBED) is not a.deltas.get(HEAD) for a, _ in adapters)
    if separate:
        bases[HEAD] = bases[EMBED]
    chains: dict[str, list[_Step]] = {}
    for adapter, scale in adapters:
        check_fits(adapter, model)
        for name, delta in adapter.deltas.items():
            if name in bases:
                chains.setdefault(name, []).append(_Step(delta=delta, scale=scale, adapter=adapter.name))
    cache = _Latest()
    tensors = {name: _merged(name, base, chains[name], bases, cache) if name in chains else base for name, base in bases.items()}
    n_vocab = _n_vocab(tensors, model, tokenizer)
    if n_vocab == model.spec.n_vocab:
        tokenizer = model.tokenizer
    return replace(
        model,
        spec=replace(model.spec, tied=model.spec.tied and not separate, n_vocab=n_vocab),
        tensors=tensors,
        tokenizer=tokenizer or model.tokenizer,
        files=(*model.files, *(file for adapter, _ in adapters for file in adapter.files)),
    )


def check_fits(adapter: Adapter, model: Model) -> None:
    """Raise SourceError that names the first tensor of the adapter that the model lacks or has in another shape."""
    trained_on = f" It says it was trained on {adapter.base_name}." if adapter.base_name else ""
    for name, delta in adapter.deltas.items():
        base = model.tensors.get(EMBED if name == HEAD and model.spec.tied else name)
        if base is None:
            hint = " Merging a bias needs a model that has one." if name.endswith(".bias") else ""
            raise SourceError(f"adapter {adapter.name!r} changes {name}, which {model.name} does not have.{hint}{trained_on}")
        if base.shape != delta.shape:
            raise SourceError(
                f"adapter {adapter.name!r} does not fit {model.name}: {name} is {list(base.shape)} there, the adapter was made for "
                f"{list(delta.shape)}.{trained_on}"
            )


def _n_vocab(tensors: Mapping[str, LazyTensor], model: Model, tokenizer: Tokenizer | None) -> int:
    sizes = {tensors[name].shape[0] for name in (EMBED, HEAD) if name in tensors}
    if len(sizes) > 1:
        raise ShapeError(
            f"merged, embedding and head have {tensors[EMBED].shape[0]} and {tensors[HEAD].shape[0]} rows. "
            "An adapter that adds tokens must bring both (save_embedding_layers=True)."
        )
    n_vocab = sizes.pop()
    if n_vocab == model.spec.n_vocab:
        return n_vocab
    if tokenizer is None:
        raise UnsupportedError(
            f"an adapter has changed the vocabulary from {model.spec.n_vocab} to {n_vocab} tokens, but brings no tokenizer. "
            "Put the tokenizer files it was trained with into its folder."
        )
    if len(tokenizer.vocabulary.tokens) != n_vocab:
        raise SourceError(f"the adapter's embedding has {n_vocab} rows, its tokenizer {len(tokenizer.vocabulary.tokens)} tokens")
    return n_vocab


class _Latest:
    """The tensor computed last, because carriers read a tensor in several pieces, one tensor after the other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._name: str | None = None
        self._values: Floats = np.empty((0, 0), dtype=np.float32)

    def get(self, name: str, compute: _Compute) -> Floats:
        with self._lock:
            if self._name != name:
                self._name, self._values = None, np.empty((0, 0), dtype=np.float32)
                self._values = compute()
                self._name = name
            return self._values


class _Compute:
    """Values of one merged tensor, rows start..stop or all of them."""

    def __init__(self, name: str, base: LazyTensor, chain: Sequence[_Step], bases: Mapping[str, LazyTensor], origin: str) -> None:
        self.name, self.base, self.chain, self.bases, self.origin = name, base, chain, bases, origin

    def __call__(self) -> Floats:
        base = f64(self.base.decode())
        weight = base
        for step in self.chain:
            whole = base
            if isinstance(step.delta, Part):
                whole = np.concatenate([f64(self.bases[name].decode()) for name in step.delta.names])
            weight = _moved(weight, step.delta.apply(weight, whole), step)
        return self._float32(weight)

    def rows(self, start: int, stop: int, parts: Sequence[Delta]) -> Floats:
        base = f64(self.base.decode(start, stop))
        weight = base
        for step, delta in zip(self.chain, parts, strict=True):
            weight = _moved(weight, delta.apply(weight, base), step)
        return self._float32(weight)

    def _float32(self, weight: Array) -> Floats:
        with np.errstate(over="ignore"):
            values = weight.astype(np.float32)
        check_finite(values, origin=self.origin)
        return values


def _merged(name: str, base: LazyTensor, chain: Sequence[_Step], bases: Mapping[str, LazyTensor], cache: _Latest) -> LazyTensor:
    shape = base.shape
    for step in chain:
        if step.delta.shape != shape:
            raise ShapeError(
                f"adapter {step.adapter!r} was made for {name} of {list(step.delta.shape)}, an earlier adapter leaves {list(shape)}"
            )
        shape = step.delta.out_shape
        if shape != step.delta.shape and step.scale != 1.0:
            raise UnsupportedError(f"adapter {step.adapter!r} resizes {name}, so its scale must be 1, not {step.scale:g}")
    inside = next((step for step in chain if isinstance(step.delta, Inside)), None)
    if inside is not None:
        return _inside(name, base, inside, chain)
    compute = _Compute(name, base, chain, bases, f"{name} with {', '.join(step.adapter for step in chain)} merged")

    def read(start: int, stop: int) -> Bytes:
        values: Floats | None = None
        if len(shape) == 2 and stop - start < shape[0]:
            parts = [step.delta.rows(start, stop) for step in chain]
            known = [part for part in parts if part is not None]
            if len(known) == len(parts):
                values = compute.rows(start, stop, known)
        if values is None:
            values = cache.get(name, compute)[slice(start, stop) if len(shape) == 2 else slice(None)]
        rows = values.reshape(1, -1) if values.ndim == 1 else values
        return np.ascontiguousarray(rows).view(np.uint8)

    return LazyTensor(shape=shape, grid=F32, read=read, origin=compute.origin)


def _inside(name: str, base: LazyTensor, step: _Step, chain: Sequence[_Step]) -> LazyTensor:
    assert isinstance(step.delta, Inside)
    other = next((one.adapter for one in chain if one is not step), None)
    if other is not None:
        raise UnsupportedError(
            f"adapter {step.adapter!r} has trained the codes of {name}, which {other!r} would change. Export with {step.adapter!r} alone "
            f"first, and use {other!r} on the result."
        )
    if step.scale != 1.0:
        raise UnsupportedError(f"adapter {step.adapter!r} has trained the codes of {name}, so its scale must be 1, not {step.scale:g}")
    return step.delta.quantized(base)


def _moved(before: Array, after: Array, step: _Step) -> Array:
    return after if step.scale == 1.0 else before + step.scale * (after - before)
