"""Sorting and cutting a model by its ports: what moves, what goes, and the spec that is left.

    ffn       MLP channels                     of one layer
    kv_group  KV heads with their query heads  of one layer
    head      dimensions of every head of every layer: as many of values (vo) as of queries and keys, in RoPE pairs (qk)
    layer     everything in a layer

`edgeq.transforms` lists the tensor axes of ffn, kv_group, vo and qk. Moving parts leaves the model's function as it is. Leaving parts
out equals zeroing the columns that read them, for RoPE pairs their rows in the queries; scores keep the scale of whole heads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from edgeq import axes
from edgeq.axes import Index as Index
from edgeq.axes import Multiply
from edgeq.elastic import Kept
from edgeq.errors import UnsupportedError
from edgeq.families import family
from edgeq.rope import RopeSpec
from edgeq.spec import Attention, Block, Mlp, ModelSpec
from edgeq.tensors import LazyTensor
from edgeq.transforms import NORMED, PORTS, Numbers, Order, Rotation, pairs, selected, stored, transformed

_ROLES: Mapping[type[Block], tuple[str, ...]] = {
    Attention: ("attn_norm", "wq", "wk", "wv", "wo", "q_norm", "k_norm", "post_attn_norm"),
    Mlp: ("mlp_norm", "gate", "up", "down", "post_mlp_norm"),
}


def size(block: Block) -> int:
    """How many parts the port of a block has: channels or KV groups."""
    return block.n_ff if isinstance(block, Mlp) else block.n_kv_heads


def port_of(block: Block) -> Literal["ffn", "kv_group"]:
    return "ffn" if isinstance(block, Mlp) else "kv_group"


def parameters(tensors: Mapping[str, LazyTensor], block: Block) -> int:
    """Parameters that go with one channel or KV group: weights, and biases of row members. Each dimension of a head has an equal share."""
    roles = PORTS[port_of(block)]
    names = [name for role, member in roles.items() for name in stored(tensors, block.layer, role, member.axis)]
    return sum(math.prod(tensors[name].shape) for name in names) // size(block)


def block_params(tensors: Mapping[str, LazyTensor]) -> int:
    """Parameters of all blocks, norms and biases included; embeddings, final norm and head do not count."""
    return sum(math.prod(tensor.shape) for name, tensor in tensors.items() if name.startswith("layers."))


def select(tensors: Mapping[str, LazyTensor], block: Block, parts: Index) -> dict[str, LazyTensor]:
    """All tensors, channels or KV groups of a block reduced to `parts` in that order: a permutation moves them, fewer leave others out.

    No parts: the block goes, norms and all. Raises ShapeError for a part that the port does not have, or one named twice.
    """
    if len(parts):
        return selected(tensors, block, parts)
    gone = tuple(f"layers.{block.layer}.{role}." for role in _ROLES[type(block)])
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(gone)}


def apply(
    spec: ModelSpec,
    tensors: Mapping[str, LazyTensor],
    orders: Sequence[Index],
    *,
    pair_order: Index | None = None,
    rotations: Mapping[int, Numbers] | None = None,
) -> tuple[ModelSpec, dict[str, LazyTensor]]:
    """The model in sorted order: the same function, its parts moved.

    orders: for each block of the spec, its channels or KV groups, most important first. pair_order: RoPE pairs of the whole model, as in
    `order_pairs`; give it whenever heads may be cut later, even if no pair moves. rotations: by layer, the matrix of each KV head in its
    old place, as in `Rotation`. Raises UnsupportedError as `order_pairs`, ShapeError for what does not fit the spec.
    """
    spec, changed = (spec, dict(tensors)) if pair_order is None else order_pairs(spec, tensors, pair_order)
    for block, order in zip(spec.blocks, orders, strict=True):
        if isinstance(block, Attention) and rotations is not None and block.layer in rotations:
            changed = transformed(spec, changed, block, "vo", Rotation(rotations[block.layer]))
        changed = select(changed, block, order)
    return spec, changed


def order_pairs(spec: ModelSpec, tensors: Mapping[str, LazyTensor], order: Index) -> tuple[ModelSpec, dict[str, LazyTensor]]:
    """RoPE pairs of all heads of all layers in one order, with their frequencies: there is one set of those for a model.

    order: old numbers of the head_dim / 2 pairs. Those that turn come first, then those that do not, two neighbours each. The result
    turns whole heads (`widened`) by one divisor per pair, into which scaling such as YaRN's goes. Raises UnsupportedError for pairs
    that are not there or missing, and for heads of several sizes.
    """
    head_dim = _head_dim(spec)
    if sorted(order.tolist()) != list(range(head_dim // 2)):
        raise UnsupportedError(f"an order of pairs names each of 0 to {head_dim // 2 - 1} once; got {order.tolist()}")
    wide, changed = widened(spec, tensors)
    return _with_ropes(wide, lambda rope: rope.take(order.tolist())), _take_pairs(wide, changed, order)


def widened(spec: ModelSpec, tensors: Mapping[str, LazyTensor]) -> tuple[ModelSpec, dict[str, LazyTensor]]:
    """The same model with rotary embeddings of whole heads, so that pairs which never turn can be ordered among the others.

    A magnitude of the rotation then meets all dimensions; queries of those that it did not meet before are divided by its square.
    Raises UnsupportedError when dimensions do not come in pairs.
    """
    head_dim, rope_dim = _head_dim(spec), spec.rope.dim
    changed = dict(tensors)
    if rope_dim == head_dim:
        return spec, changed
    role = "q_norm" if family(spec.family).qk_norm else "wq"
    for block in spec.attention:
        rope = {"main": spec.rope, "local": spec.rope_local, "none": None}[block.rope]
        if rope is not None and rope.attn_factor != 1:
            factors = np.ones(head_dim)
            factors[pairs(head_dim, rope_dim)[rope_dim // 2 :]] = rope.attn_factor**-2
            for name in stored(changed, block.layer, role, "rows"):
                changed[name] = axes.rows(changed[name], Multiply(np.tile(factors, changed[name].shape[0] // head_dim)))
    return _with_ropes(spec, lambda rope: rope.widened(head_dim)), _take_pairs(spec, changed, np.arange(head_dim // 2))


def with_sizes(spec: ModelSpec, kept: Kept) -> ModelSpec:
    """The spec of a cut. A block of size 0 is gone. Smaller heads keep their attention scale and the frequencies of their first pairs.

    Raises UnsupportedError for a head size that cannot be.
    """
    spec = _with_head_dim(spec, kept.head_dim)
    blocks: list[Block] = []
    for block in spec.blocks:
        if isinstance(block, Mlp) and kept.n_ff[block.layer]:
            blocks.append(dataclasses.replace(block, n_ff=kept.n_ff[block.layer]))
        elif isinstance(block, Attention) and (n_kv := kept.n_kv[block.layer]):
            group = block.n_heads // block.n_kv_heads
            blocks.append(dataclasses.replace(block, n_kv_heads=n_kv, n_heads=n_kv * group))
    return dataclasses.replace(spec, blocks=tuple(blocks))


def cut(spec: ModelSpec, tensors: Mapping[str, LazyTensor], kept: Kept) -> tuple[ModelSpec, dict[str, LazyTensor]]:
    """The first parts of every port of a sorted model, without compensation. Raises as `with_sizes`, and ShapeError for parts it lacks."""
    small = _with_head_dim(spec, kept.head_dim)
    chosen = dict(tensors)
    if small is not spec:
        wide, chosen = widened(spec, chosen)
        head_dim = small.attention[0].head_dim
        chosen = _take_pairs(wide, chosen, np.arange(head_dim // 2))
        for block in wide.attention:
            first = np.tile(np.arange(head_dim), (block.n_kv_heads, 1))
            chosen = transformed(wide, chosen, block, "vo", Order(first))
    for part in small.blocks:
        chosen = select(chosen, part, np.arange((kept.n_ff if isinstance(part, Mlp) else kept.n_kv)[part.layer]))
    return with_sizes(spec, kept), chosen


def _with_head_dim(spec: ModelSpec, head_dim: int | None) -> ModelSpec:
    """The spec with the first head_dim dimensions of every head; itself when that is all of them."""
    if head_dim is None or head_dim == (full := _head_dim(spec)):
        return spec
    if not 0 < head_dim < full or head_dim % 2:
        raise UnsupportedError(f"heads of {full} dimensions cannot be cut to {head_dim}. Keep an even number from 2 to {full}.")
    if family(spec.family).qk_norm:
        raise UnsupportedError(NORMED.format(spec.family, "without some dimensions all others change"))
    smaller = _with_ropes(spec, lambda rope: rope.widened(full).take(range(head_dim // 2)))
    blocks = tuple(dataclasses.replace(b, head_dim=head_dim) if isinstance(b, Attention) else b for b in spec.blocks)
    return dataclasses.replace(smaller, blocks=blocks)


def _with_ropes(spec: ModelSpec, change: Callable[[RopeSpec], RopeSpec]) -> ModelSpec:
    return dataclasses.replace(spec, rope=change(spec.rope), rope_local=spec.rope_local and change(spec.rope_local))


def _take_pairs(spec: ModelSpec, tensors: Mapping[str, LazyTensor], order: Index) -> dict[str, LazyTensor]:
    changed = dict(tensors)
    for block in spec.attention:
        changed = transformed(spec, changed, block, "qk", Order(order))
    return changed


def _head_dim(spec: ModelSpec) -> int:
    """The size of all heads. Raises UnsupportedError when there are several, or rotations of several sizes."""
    sizes = {block.head_dim for block in spec.attention}
    turning = {rope.dim for rope in (spec.rope, spec.rope_local) if rope is not None}
    if len(sizes) != 1 or len(turning) != 1:
        raise UnsupportedError(
            f"heads have {sorted(sizes)} dimensions, of which {sorted(turning)} turn: pairs of all layers can only be treated alike "
            "when there is one size of both."
        )
    return sizes.pop()
