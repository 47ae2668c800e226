"""Stored tensors of a Hugging Face checkpoint, brought into edgeq's names and layout (see `edgeq.families`).

Fused projections are split into rows, norm weights become the multiplier they stand for, a tied head is dropped. Every tensor
the spec asks for must be there with the shape that follows from config.json, and every stored tensor must be asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeq.converters.sources.hf_config import HfConfig
from edgeq.converters.sources.hf_dialects import Wrapper
from edgeq.converters.sources.stored import StoredTensor
from edgeq.errors import SourceError, UnsupportedError
from edgeq.families import Family, family
from edgeq.spec import Attention, Block, ModelSpec
from edgeq.tensors import Floats, LazyTensor, map_values, slice_rows

_HEAD = "lm_head.weight"
_EMBED = "model.embed_tokens.weight"
# Rotary frequencies that old transformers versions saved; they follow from the config.
_ROTARY_BUFFER = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
_FUSED = {"wqkv": ("wq", "wk", "wv"), "gate_up": ("gate", "up")}


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """A tensor the checkpoint must store. parts: canonical names with their rows, in order; one part covers it all."""

    stored: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, int], ...]
    offset: float = 0.0


def canonical_tensors(stored: Mapping[str, StoredTensor], config: HfConfig, folder: Path) -> dict[str, LazyTensor]:
    """Canonical name -> lazy tensor, in the order of the network.

    Raises SourceError for a missing tensor, a shape that contradicts config.json, or a tied head that differs from the embedding;
    UnsupportedError for a tensor that no row describes or that is not stored in floats.
    """
    spec = config.spec
    stored = _text_part(stored, config.wrapper)
    wanted = list(_wanted(spec, family(spec.family)))
    _refuse_unknown(stored, {w.stored for w in wanted}, spec, folder)
    tensors: dict[str, LazyTensor] = {}
    for want in wanted:
        tensors |= _take(stored, want, folder)
    if spec.tied and _HEAD in stored:
        _check_tied(stored[_EMBED], stored[_HEAD], folder)
    return tensors


def role_shapes(spec: ModelSpec, block: Block) -> dict[str, tuple[int, ...]]:
    """Shape of the weight of every role a block may have."""
    n = spec.n_embd
    if isinstance(block, Attention):
        q, kv, d = block.n_heads * block.head_dim, block.n_kv_heads * block.head_dim, block.head_dim
        shapes: dict[str, tuple[int, ...]] = {"attn_norm": (n,), "wq": (q, n), "wk": (kv, n), "wv": (kv, n), "wo": (n, q)}
        return shapes | {"q_norm": (d,), "k_norm": (d,), "post_attn_norm": (n,)}
    return {"mlp_norm": (n,), "gate": (block.n_ff, n), "up": (block.n_ff, n), "down": (n, block.n_ff), "post_mlp_norm": (n,)}


def _wanted(spec: ModelSpec, row: Family) -> Iterator[_Wanted]:
    matrix = (spec.n_vocab, spec.n_embd)
    yield _Wanted(stored=_EMBED, shape=matrix, parts=(("embed.weight", spec.n_vocab),))
    for block in spec.blocks:
        yield from _wanted_of_block(spec, row, block)
    name = f"model.{row.hf_name('final_norm')}.weight"
    yield _Wanted(stored=name, shape=(spec.n_embd,), parts=(("final_norm.weight", 1),), offset=row.norm_offset)
    if not spec.tied:
        yield _Wanted(stored=_HEAD, shape=matrix, parts=(("head.weight", spec.n_vocab),))


def _wanted_of_block(spec: ModelSpec, row: Family, block: Block) -> Iterator[_Wanted]:
    shapes = {role: shape for role, shape in role_shapes(spec, block).items() if role in row.roles}
    fused = {"wqkv": row.fused_qkv, "gate_up": row.fused_gate_up}
    groups = [(name, roles) for name, roles in _FUSED.items() if fused[name] and roles[0] in shapes]
    groups += [(role, (role,)) for role in shapes if not any(role in roles for _, roles in groups)]
    for name, roles in groups:
        module = f"model.{row.hf_name(name)}".format(i=block.layer)
        canonical = [f"layers.{block.layer}.{role}" for role in roles]
        rows = [shapes[role][0] for role in roles]
        weight = tuple((f"{c}.weight", r) for c, r in zip(canonical, rows, strict=True))
        offset = row.norm_offset if name.endswith("norm") else 0.0
        yield _Wanted(stored=f"{module}.weight", shape=(sum(rows), *shapes[roles[0]][1:]), parts=weight, offset=offset)
        if roles[0] in spec.biases:
            bias = tuple((f"{c}.bias", r) for c, r in zip(canonical, rows, strict=True))
            yield _Wanted(stored=f"{module}.bias", shape=(sum(rows),), parts=bias)


def _text_part(stored: Mapping[str, StoredTensor], wrapper: Wrapper | None) -> dict[str, StoredTensor]:
    """Stored tensors by the name they have in a text-only checkpoint, without those that are not weights of it."""
    kept = {name: tensor for name, tensor in stored.items() if not _ROTARY_BUFFER.search(name)}
    if wrapper is None:
        return kept
    renamed = {}
    for name, tensor in kept.items():
        if name.startswith(wrapper.left_out):
            continue
        prefix = next((p for p in wrapper.renamed if name.startswith(p)), "")
        renamed[wrapper.renamed.get(prefix, "") + name.removeprefix(prefix)] = tensor
    return renamed


def _refuse_unknown(stored: Mapping[str, StoredTensor], wanted: set[str], spec: ModelSpec, folder: Path) -> None:
    unknown = [tensor for name, tensor in stored.items() if name not in wanted and not (spec.tied and name == _HEAD)]
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise UnsupportedError(
            f"{unknown[0].origin}{more} has no place in a {spec.family} model of {spec.n_layers} layers, "
            f"which is what {folder / 'config.json'} describes"
        )


def _take(stored: Mapping[str, StoredTensor], want: _Wanted, folder: Path) -> dict[str, LazyTensor]:
    tensor = stored.get(want.stored)
    if tensor is None:
        hint = " If the head shares the embedding, config.json must say tie_word_embeddings: true." if want.stored == _HEAD else ""
        raise SourceError(f"{folder}: tensor {want.stored} is missing. Download the model's folder again, with all its files.{hint}")
    if tensor.shape != want.shape:
        raise SourceError(f"{tensor.origin} has shape {list(tensor.shape)}, but config.json asks for {list(want.shape)}")
    lazy = tensor.open()
    if want.offset:
        lazy = map_values(lazy, _adder(want.offset))
    if len(want.parts) == 1:
        return {want.parts[0][0]: lazy}
    bounds = np.cumsum([0, *(rows for _, rows in want.parts)])
    return {name: slice_rows(lazy, int(start), int(start) + rows) for (name, rows), start in zip(want.parts, bounds, strict=False)}


def _adder(offset: float) -> Callable[[Floats], Floats]:
    return lambda values: values + np.float32(offset)


def _check_tied(embed: StoredTensor, head: StoredTensor, folder: Path) -> None:
    """A head stored beside a tied embedding must repeat it; compared a few rows at a time."""
    one, other = embed.open(), head.open()
    same = one.shape == other.shape
    for start in range(0, one.n_rows, 4096) if same else ():
        stop = min(start + 4096, one.n_rows)
        same = same and np.array_equal(one.decode(start, stop), other.decode(start, stop), equal_nan=True)
    if not same:
        raise SourceError(
            f"{head.origin} differs from {embed.name}, but {folder / 'config.json'} says tie_word_embeddings: true. "
            "If the model has a head of its own, change that to false."
        )
