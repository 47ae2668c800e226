"""Ports as data, and the changes that leave a model's function as it is.

    ffn       MLP channels                    moved, scaled
    kv_group  KV heads with their queries     moved
    vo        value dimensions of a KV head   moved, scaled, mixed by any invertible matrix, shifted
    qk        RoPE pairs of a head            moved (with their frequencies), scaled, turned

A port lists every tensor axis that moves with it, in the names and layout of `edgeq.families`, where fused projections are split: one
table serves all families. A change is a value (`Order`, `Scale`, ...); `moves` turns it into one `AxisMap` for each role, for weights,
biases and norms (`transformed`) or for the factors of an adapter: rows of its B, columns of its A. An order of fewer parts leaves the
others out, which equals zeroing their columns in the linear that reads them, or for pairs, their rows in the queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from edgeq import axes
from edgeq.axes import AxisMap, Index, Mix, Multiply, Take
from edgeq.errors import ShapeError, UnsupportedError
from edgeq.families import family
from edgeq.spec import Attention, Block, Mlp, ModelSpec
from edgeq.tensors import LazyTensor, from_values

Numbers = npt.NDArray[np.float64]
Axis = Literal["rows", "columns"]
TensorPort = Literal["ffn", "kv_group", "vo", "qk"]
Unit = Literal["channel", "head", "query_heads", "shared"]


class Member(NamedTuple):
    """How a role takes part in a port. unit: what a part of the port is on the axis: a channel; or it lies in the one head of each KV
    group, in all query heads of each, or in a head that stands for all ("shared"). linear: under a linear map M, the axis is multiplied
    by M ("direct"), by its inverse transposed ("dual"), or must stay as it is (None).
    """

    axis: Axis
    unit: Unit
    linear: Literal["direct", "dual"] | None


PORTS: Mapping[TensorPort, Mapping[str, Member]] = {
    "ffn": {
        "gate": Member("rows", "channel", None),  # goes through the activation
        "up": Member("rows", "channel", "direct"),
        "down": Member("columns", "channel", "dual"),
    },
    "kv_group": {
        "wq": Member("rows", "query_heads", None),
        "wk": Member("rows", "head", None),
        "wv": Member("rows", "head", None),
        "wo": Member("columns", "query_heads", None),
    },
    "vo": {
        "wv": Member("rows", "head", "direct"),
        "wo": Member("columns", "query_heads", "dual"),
    },
    "qk": {
        "wq": Member("rows", "query_heads", "direct"),
        "wk": Member("rows", "head", "dual"),
        "q_norm": Member("rows", "shared", "direct"),
        "k_norm": Member("rows", "shared", "dual"),
    },
}


@dataclass(frozen=True)
class Order:
    """Parts in a new order, by their old numbers. ffn (n,), kv_group (n,), vo (n_kv_heads, n), qk (n,) for all heads or (n_kv_heads, n)
    for those of each KV head: pairs, those that turn first.
    """

    index: Index


@dataclass(frozen=True)
class Scale:
    """Parts times numbers other than 0. ffn (n_ff,), vo (n_kv_heads, head_dim), qk (n_kv_heads, head_dim / 2) by which keys are divided."""

    factors: Numbers


@dataclass(frozen=True)
class Rotation:
    """vo: the values of each KV head times an invertible matrix, (n_kv_heads, head_dim, head_dim). Row i makes the new dimension i."""

    matrices: Numbers


@dataclass(frozen=True)
class Turn:
    """qk: every pair of queries and keys turned by an angle in rad, (n_kv_heads, head_dim / 2)."""

    angles: Numbers


@dataclass(frozen=True)
class Shift:
    """vo: numbers added to the values of each KV head, (n_kv_heads, head_dim), and taken off again behind the output projection."""

    values: Numbers


Change = Order | Scale | Rotation | Turn

_LINEAR: Mapping[TensorPort, tuple[type[Change], ...]] = {"ffn": (Scale,), "kv_group": (), "vo": (Scale, Rotation), "qk": (Scale, Turn)}
_REASONS: Mapping[TensorPort, str] = {
    "ffn": "channels are multiplied one by one, so that none may be mixed with another",
    "kv_group": "a group is heads of its own, which can only be moved or left out",
    "vo": "values do not rotate with the position; mix them by a matrix",
    "qk": "pairs rotate with the position, each on its own",
}
NORMED = "{} normalises queries and keys over the whole head, with a weight for each dimension: {}."


Moves = dict[str, tuple[Axis, AxisMap]]


def moves(spec: ModelSpec, block: Block, port: TensorPort, change: Change) -> Moves:
    """By role, which axis changes how. Roles that the family does not have, or that stay as they are, are left out.

    Raises ShapeError for a change of another shape than the port, UnsupportedError for one that would change the model's function. An
    `Order` of qk is right only if the rotary frequencies take it too (`ports.order_pairs`, `ports.order_pairs_by_head`).
    """
    roles = {role: member for role, member in PORTS[port].items() if role in family(spec.family).roles}
    if (port == "ffn") != isinstance(block, Mlp):
        raise ShapeError(f"layer {block.layer}: {type(block).__name__} has no port {port}.")
    if isinstance(change, Order):
        return {role: (member.axis, _take(spec, block, port, change.index, member)) for role, member in roles.items()}
    linear = _linear_roles(spec, block, port, change, roles)
    if isinstance(change, Scale):
        return {role: (member.axis, _multiply(spec, block, port, change.factors, member)) for role, member in linear.items()}
    assert isinstance(block, Attention)
    matrices = change.matrices if isinstance(change, Rotation) else _turns(spec, block, change.angles)
    return {role: (member.axis, _mix(block, matrices, member)) for role, member in linear.items()}


def transformed(
    spec: ModelSpec, tensors: Mapping[str, LazyTensor], block: Block, port: TensorPort, change: Change
) -> dict[str, LazyTensor]:
    """All tensors, with one port of one block changed; nothing is read yet. Raises as `moves`.

    Rows that are taken stay in their grid; anything else is float32.
    """
    return _moved(tensors, block, moves(spec, block, port, change))


def selected(tensors: Mapping[str, LazyTensor], block: Block, parts: Index) -> dict[str, LazyTensor]:
    """All tensors, with the channels or KV groups of a block in another order, which is legal in every family. Raises ShapeError."""
    port: TensorPort = "ffn" if isinstance(block, Mlp) else "kv_group"
    return _moved(tensors, block, {role: (m.axis, _take_parts(block, port, parts, m)) for role, m in PORTS[port].items()})


def _moved(tensors: Mapping[str, LazyTensor], block: Block, moves: Moves) -> dict[str, LazyTensor]:
    changed = dict(tensors)
    for role, (axis, move) in moves.items():
        for name in stored(tensors, block.layer, role, axis):
            changed[name] = axes.rows(tensors[name], move) if axis == "rows" else axes.columns(tensors[name], move)
    return changed


def stored(tensors: Mapping[str, LazyTensor], layer: int, role: str, axis: Axis) -> tuple[str, ...]:
    """Names of a role's tensors that have the axis and are there: the weight, and the bias for rows."""
    kinds = ("weight", "bias") if axis == "rows" else ("weight",)
    return tuple(name for kind in kinds if (name := f"layers.{layer}.{role}.{kind}") in tensors)


def shifted(spec: ModelSpec, tensors: Mapping[str, LazyTensor], block: Attention, shift: Shift) -> dict[str, LazyTensor]:
    """Values plus a constant, which attention passes on as it is because its weights add up to 1, and the output's bias less its image.

    The other ports have no such freedom: what is added to an MLP channel is multiplied, and what is added to a key turns with its
    position. Raises UnsupportedError when values or output have no bias to take it, ShapeError for another shape.
    """
    missing = sorted({"wv", "wo"} - spec.biases)
    if missing:
        raise UnsupportedError(f"layer {block.layer}: values cannot be shifted, since this model has no biases of {' and '.join(missing)}.")
    _check_shape(block, "vo", shift.values.shape, (block.n_kv_heads, block.head_dim))
    name = f"layers.{block.layer}"
    wo, bv, bo = (tensors[f"{name}.{key}"] for key in ("wo.weight", "wv.bias", "wo.bias"))
    constant = np.repeat(shift.values, block.n_heads // block.n_kv_heads, axis=0).reshape(-1)
    image = np.concatenate([wo.decode(i, min(i + 256, wo.n_rows)) @ constant for i in range(0, wo.n_rows, 256)])
    return {
        **tensors,
        f"{name}.wv.bias": from_values(bv.decode() + shift.values.reshape(-1), origin=bv.origin),
        f"{name}.wo.bias": from_values(bo.decode() - image, origin=bo.origin),
    }


def pairs(head_dim: int, rope_dim: int) -> Index:
    """Dimensions of each pair of a head, (head_dim / 2, 2): those that turn, then neighbours among the others.

    Raises UnsupportedError when dimensions do not come in pairs.
    """
    if head_dim % 2:
        raise UnsupportedError(f"heads of {head_dim} dimensions do not divide into pairs.")
    turning = np.arange(rope_dim).reshape(2, -1).T
    return np.concatenate([turning, np.arange(rope_dim, head_dim).reshape(-1, 2)])


def _places(block: Block, unit: Unit) -> Index:
    """Places on an axis: (n_ff,) by channel; (groups, heads, head_dim) by KV group, head within it and dimension."""
    if isinstance(block, Mlp):
        return np.arange(block.n_ff)
    groups, heads = 1 if unit == "shared" else block.n_kv_heads, block.n_heads // block.n_kv_heads if unit == "query_heads" else 1
    return np.arange(groups * heads * block.head_dim).reshape(groups, heads, block.head_dim)


def _check_shape(block: Block, port: TensorPort, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise ShapeError(f"layer {block.layer}: a change of {port} has shape {list(found)}, expected {list(expected)}.")


def _take(spec: ModelSpec, block: Block, port: TensorPort, index: Index, member: Member) -> Take:
    if port in ("ffn", "kv_group"):
        return _take_parts(block, port, index, member)
    assert isinstance(block, Attention)
    places, n_parts = _places(block, member.unit), block.head_dim // (1 if port == "vo" else 2)
    if port == "qk" and index.ndim == 1:
        _check_parts(block, port, index, n_parts)
        halves = pairs(block.head_dim, spec.rope_dim(block))[index].T.reshape(-1)  # first dimensions of all pairs, then second ones
        return Take(places[..., halves].reshape(-1))
    if member.unit == "shared":
        raise UnsupportedError(f"layer {block.layer}: " + NORMED.format(spec.family, "all heads share them and turn the same pairs"))
    _check_shape(block, port, index.shape[:1], (block.n_kv_heads,))
    for parts in index:
        _check_parts(block, port, parts, n_parts)
    if port == "qk":
        index = pairs(block.head_dim, spec.rope_dim(block))[index].swapaxes(1, 2).reshape(block.n_kv_heads, -1)
    return Take(np.take_along_axis(places, index[:, None], axis=2).reshape(-1))


def _take_parts(block: Block, port: TensorPort, index: Index, member: Member) -> Take:
    """Of channels or whole KV groups."""
    _check_parts(block, port, index, block.n_ff if isinstance(block, Mlp) else block.n_kv_heads)
    return Take(_places(block, member.unit)[index].reshape(-1))


def _check_parts(block: Block, port: TensorPort, parts: Index, n_parts: int) -> None:
    numbers = parts.tolist()
    if parts.ndim != 1 or len(set(numbers)) != len(numbers) or not all(0 <= part < n_parts for part in numbers):
        raise ShapeError(f"layer {block.layer}: {port} has parts 0 to {n_parts - 1}, each at most once; got {numbers}")


def _linear_roles(
    spec: ModelSpec, block: Block, port: TensorPort, change: Scale | Rotation | Turn, roles: Mapping[str, Member]
) -> dict[str, Member]:
    """Roles that a linear map changes. Raises UnsupportedError where it would change the model's function."""
    if not isinstance(change, _LINEAR[port]):
        raise UnsupportedError(f"layer {block.layer}: a {type(change).__name__} cannot be done to {port}: {_REASONS[port]}.")
    linear = {role: member for role, member in roles.items() if member.linear is not None}
    if port != "qk" or not family(spec.family).qk_norm:
        return linear
    if isinstance(change, Turn):
        raise UnsupportedError(f"layer {block.layer}: " + NORMED.format(spec.family, "pairs cannot be turned"))
    if isinstance(change, Scale) and (change.factors != change.factors[:1]).any():
        raise UnsupportedError(f"layer {block.layer}: " + NORMED.format(spec.family, "all heads share them and must be scaled alike"))
    return {role: member for role, member in linear.items() if member.unit == "shared"}  # behind the norm


def _multiply(spec: ModelSpec, block: Block, port: TensorPort, factors: Numbers, member: Member) -> Multiply:
    if not np.isfinite(factors).all() or not factors.all():
        raise UnsupportedError(f"layer {block.layer}: a scale of {port} is 0 or not finite, which nothing could undo.")
    numbers = factors if member.linear == "direct" else 1 / factors
    if isinstance(block, Mlp):
        _check_shape(block, port, factors.shape, (block.n_ff,))
        return Multiply(numbers)
    places = _places(block, member.unit)
    full = np.empty(places.shape)
    if port == "qk":
        _check_shape(block, port, factors.shape, (block.n_kv_heads, block.head_dim // 2))
        full[..., pairs(block.head_dim, spec.rope_dim(block))] = numbers[: len(places), None, :, None]
    else:
        _check_shape(block, port, factors.shape, (block.n_kv_heads, block.head_dim))
        full[:] = numbers[:, None]
    return Multiply(full.reshape(-1))


def _turns(spec: ModelSpec, block: Attention, angles: Numbers) -> Numbers:
    """One rotation matrix for the heads of each group, (n_kv_heads, head_dim, head_dim)."""
    _check_shape(block, "qk", angles.shape, (block.n_kv_heads, block.head_dim // 2))
    first, second = pairs(block.head_dim, spec.rope_dim(block)).T
    matrices = np.zeros((block.n_kv_heads, block.head_dim, block.head_dim))
    matrices[:, first, first] = matrices[:, second, second] = np.cos(angles)
    matrices[:, second, first] = np.sin(angles)
    matrices[:, first, second] = -np.sin(angles)
    return matrices


def _mix(block: Attention, matrices: Numbers, member: Member) -> Mix:
    _check_shape(block, "vo", matrices.shape, (block.n_kv_heads, block.head_dim, block.head_dim))
    if member.linear == "dual":
        try:
            matrices = np.linalg.inv(matrices.astype(np.float64)).swapaxes(1, 2)
        except np.linalg.LinAlgError as err:
            raise UnsupportedError(f"layer {block.layer}: a matrix for the values has no inverse, so that nothing could undo it.") from err
    return Mix(np.repeat(matrices, _places(block, member.unit).shape[1], axis=0))
