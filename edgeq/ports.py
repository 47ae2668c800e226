"""Ports: structured dimensions of a layer, and every tensor axis that moves with them.

A part of a port can be moved to another place, or left out, if the same is done on every axis listed for it here. Moving leaves the
model's function as it is; leaving out equals zeroing the part's columns in the linear that reads it. Names and layout are those of
`edgeq.families`, in which fused projections are split, so one table serves all families.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgeq.elastic import Kept, Port
from edgeq.errors import ShapeError
from edgeq.spec import Attention, Block, Mlp, ModelSpec
from edgeq.tensors import LazyTensor, map_values, take_rows

Index = npt.NDArray[np.intp]

# role -> (axis, what one part is on it). Biases of row members move along; q_norm and k_norm are shared by all heads and stay.
Unit = Literal["channel", "head", "query_heads"]
PORTS: Mapping[Port, Mapping[str, tuple[Literal["rows", "columns"], Unit]]] = {
    "ffn": {"gate": ("rows", "channel"), "up": ("rows", "channel"), "down": ("columns", "channel")},
    "kv_group": {
        "wq": ("rows", "query_heads"),
        "wk": ("rows", "head"),
        "wv": ("rows", "head"),
        "wo": ("columns", "query_heads"),
    },
}


def size(block: Block) -> int:
    """How many parts the port of a block has."""
    return block.n_ff if isinstance(block, Mlp) else block.n_kv_heads


def port_of(block: Block) -> Port:
    return "ffn" if isinstance(block, Mlp) else "kv_group"


def parameters(tensors: Mapping[str, LazyTensor], block: Block) -> int:
    """Parameters that go with one part: weights, and biases of row members."""
    return sum(math.prod(tensors[name].shape) for name in _moved(tensors, block)) // size(block)


def block_params(tensors: Mapping[str, LazyTensor]) -> int:
    """Parameters of all blocks, norms and biases included; embeddings, final norm and head do not count."""
    return sum(math.prod(tensor.shape) for name, tensor in tensors.items() if name.startswith("layers."))


def select(tensors: Mapping[str, LazyTensor], block: Block, parts: Index) -> dict[str, LazyTensor]:
    """All tensors, the block's port reduced to `parts` in that order: a permutation moves them, fewer leave the others out.

    Rows stay in their grid; columns come back as float32, read lazily. Raises ShapeError for a part that the port does not have,
    or one named twice.
    """
    n_parts = size(block)
    if len(set(parts.tolist())) != len(parts) or (len(parts) and not 0 <= parts.min() <= parts.max() < n_parts):
        raise ShapeError(f"layer {block.layer}: {port_of(block)} has parts 0 to {n_parts - 1}, each at most once; got {parts.tolist()}")
    chosen = dict(tensors)
    for name, (axis, unit) in _moved(tensors, block).items():
        index = _expand(parts, _width(block, unit))
        tensor = tensors[name]
        chosen[name] = take_rows(tensor, index) if axis == "rows" else _take_columns(tensor, index)
    return chosen


def with_sizes(spec: ModelSpec, kept: Kept) -> ModelSpec:
    """The spec of a cut. A block of size 0 is gone."""
    blocks: list[Block] = []
    for block in spec.blocks:
        if isinstance(block, Mlp) and kept.n_ff[block.layer]:
            blocks.append(dataclasses.replace(block, n_ff=kept.n_ff[block.layer]))
        elif isinstance(block, Attention) and (n_kv := kept.n_kv[block.layer]):
            group = block.n_heads // block.n_kv_heads
            blocks.append(dataclasses.replace(block, n_kv_heads=n_kv, n_heads=n_kv * group))
    return dataclasses.replace(spec, blocks=tuple(blocks))


def cut(spec: ModelSpec, tensors: Mapping[str, LazyTensor], kept: Kept) -> tuple[ModelSpec, dict[str, LazyTensor]]:
    """The first parts of every port of a sorted model, without compensation."""
    chosen = dict(tensors)
    for block in spec.blocks:
        chosen = select(chosen, block, np.arange((kept.n_ff if isinstance(block, Mlp) else kept.n_kv)[block.layer]))
    return with_sizes(spec, kept), chosen


def _moved(tensors: Mapping[str, LazyTensor], block: Block) -> dict[str, tuple[Literal["rows", "columns"], Unit]]:
    """Tensors of the port that this model has, by name, with their axis and unit."""
    moved = {}
    for role, (axis, unit) in PORTS[port_of(block)].items():
        moved[f"layers.{block.layer}.{role}.weight"] = (axis, unit)
        if axis == "rows" and (bias := f"layers.{block.layer}.{role}.bias") in tensors:
            moved[bias] = (axis, unit)
    return moved


def _width(block: Block, unit: Unit) -> int:
    if isinstance(block, Mlp):
        return 1
    return block.head_dim * (block.n_heads // block.n_kv_heads if unit == "query_heads" else 1)


def _expand(parts: Index, width: int) -> Index:
    return (parts[:, None] * width + np.arange(width)).reshape(-1)


def _take_columns(tensor: LazyTensor, index: Index) -> LazyTensor:
    return map_values(tensor, lambda values: values[:, index], shape=(tensor.n_rows, len(index)))
