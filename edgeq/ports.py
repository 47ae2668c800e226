"""Sorting and cutting a model by its ports: what moves, what goes, and the spec that is left.

    ffn       MLP channels                     of one layer
    kv_group  KV heads with their query heads  of one layer
    head      dimensions of every head, of one layer or of all: as many of values (vo) as of queries and keys, in RoPE pairs (qk)
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
    pair_orders: Mapping[int, Index] | None = None,
    rotations: Mapping[int, Numbers] | None = None,
) -> tuple[ModelSpec, dict[str, LazyTensor]]:
    """The model in sorted order: the same function, its parts moved.

    orders: for each block of the spec, its channels or KV groups, most important first. pair_order: RoPE pairs of the whole model, as in
    `order_pairs`; give it whenever heads may be cut later, even if no pair moves. pair_orders: in its place, pairs of layers by KV head, as
    in `order_pairs_by_head`. rotations: by layer, the matrix of each KV head in its old place, as in `Rotation`. Raises UnsupportedError as
    `order_pairs`, ShapeError for what does not fit the spec.
    """
    spec, changed = (spec, dict(tensors)) if pair_order is None else order_pairs(spec, tensors, pair_order)
    if pair_orders:
        spec, changed = order_pairs_by_head(spec, changed, pair_orders)
    blocks: list[Block] = []
    for block, order in zip(spec.blocks, orders, strict=True):
        if isinstance(block, Attention) and rotations is not None and block.layer in rotations:
            changed = transformed(spec, changed, block, "vo", Rotation(rotations[block.layer]))
        changed = select(changed, block, order)
        if isinstance(block, Attention) and block.pairs is not None:
            block = dataclasses.replace(block, pairs=tuple(block.pairs[group] for group in order))
        blocks.append(block)
    return dataclasses.replace(spec, blocks=tuple(blocks)), changed


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


def order_pairs_by_head(
    spec: ModelSpec, tensors: Mapping[str, LazyTensor], orders: Mapping[int, Index]
) -> tuple[ModelSpec, dict[str, LazyTensor]]:
    """RoPE pairs of layers in an order of each KV head's own, (n_kv_heads, head_dim / 2), with the pairs that its spec says it turns.

    Heads are `widened`. Raises UnsupportedError for a family that normalises heads, and for heads of several sizes; ShapeError for pairs
    that are not there, or missing.
    """
    wide, changed = widened(spec, tensors)
    blocks: list[Block] = []
    for block in wide.blocks:
        if isinstance(block, Attention) and block.layer in orders:
            order = orders[block.layer]
            changed = transformed(wide, changed, block, "qk", Order(order))
            taken = tuple(tuple(own[pair] for pair in new) for own, new in zip(wide.pairs_of(block), order.tolist(), strict=True))
            block = dataclasses.replace(block, pairs=None if block.rope == "none" else taken)
        blocks.append(block)
    return dataclasses.replace(wide, blocks=tuple(blocks)), changed


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
        rope = spec.rope_of(block)
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
    spec = _with_heads(spec, kept)
    blocks: list[Block] = []
    for block in spec.blocks:
        if isinstance(block, Mlp) and kept.n_ff[block.layer]:
            blocks.append(dataclasses.replace(block, n_ff=kept.n_ff[block.layer]))
        elif isinstance(block, Attention) and (n_kv := kept.n_kv[block.layer]):
            group = block.n_heads // block.n_kv_heads
            own = None if block.pairs is None else block.pairs[:n_kv]
            blocks.append(dataclasses.replace(block, n_kv_heads=n_kv, n_heads=n_kv * group, pairs=own))
    return dataclasses.replace(spec, blocks=tuple(blocks))


def cut(spec: ModelSpec, tensors: Mapping[str, LazyTensor], kept: Kept) -> tuple[ModelSpec, dict[str, LazyTensor]]:
    """The first parts of every port of a sorted model, without compensation. Raises as `with_sizes`, and ShapeError for parts it lacks."""
    small = _with_heads(spec, kept)
    chosen = dict(tensors)
    if small is not spec:
        wide, chosen = widened(spec, chosen)
        for block, left in zip(wide.attention, small.attention, strict=True):
            if left.head_dim < block.head_dim:
                chosen = transformed(wide, chosen, block, "qk", Order(np.arange(left.head_dim // 2)))
                first = np.tile(np.arange(left.head_dim), (block.n_kv_heads, 1))
                chosen = transformed(wide, chosen, block, "vo", Order(first))
    for part in small.blocks:
        chosen = select(chosen, part, np.arange((kept.n_ff if isinstance(part, Mlp) else kept.n_kv)[part.layer]))
    return with_sizes(spec, kept), chosen


def _with_heads(spec: ModelSpec, kept: Kept) -> ModelSpec:
    """The spec with the first dimensions of every head, as many as are kept; itself when that is all of them."""
    sizes = kept.head_dims if kept.head_dim is None else (kept.head_dim,)
    if sizes is None:
        return spec
    full = _head_dim(spec)
    if set(sizes) == {full}:
        return spec
    for size in sizes:
        if not 0 < size <= full or size % 2:
            raise UnsupportedError(f"heads of {full} dimensions cannot be cut to {size}. Keep an even number from 2 to {full}.")
    if family(spec.family).qk_norm:
        raise UnsupportedError(NORMED.format(spec.family, "without some dimensions all others change"))
    wide = _with_ropes(spec, lambda rope: rope.widened(full))
    if kept.head_dim is not None:  # all heads turn the same pairs: the rope says which
        blocks = tuple(dataclasses.replace(b, head_dim=sizes[0]) if isinstance(b, Attention) else b for b in spec.blocks)
        return dataclasses.replace(_with_ropes(wide, lambda rope: rope.take(range(sizes[0] // 2))), blocks=blocks)
    return dataclasses.replace(
        wide, blocks=tuple(_smaller(wide, b, sizes[b.layer]) if isinstance(b, Attention) else b for b in spec.blocks)
    )


def _smaller(wide: ModelSpec, block: Attention, head_dim: int) -> Attention:
    """A block whose heads have their first dimensions only, of a spec that is `widened`."""
    if head_dim == block.head_dim:
        return block
    if block.rope == "none":
        return dataclasses.replace(block, head_dim=head_dim)
    return dataclasses.replace(block, head_dim=head_dim, pairs=tuple(own[: head_dim // 2] for own in wide.pairs_of(block)))


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
