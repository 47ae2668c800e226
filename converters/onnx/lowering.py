"""Which operators an attention layer becomes, chosen from its sizes alone, and why. Neither onnx nor a weight is needed for it.

    A   GroupQueryAttention, which rotates queries and keys itself, or a layer that does not rotate
    B   RotaryEmbedding, then GroupQueryAttention
    C   RotaryEmbedding, then Attention of ai.onnx

GroupQueryAttention writes new keys and values where the old ones lie; Attention copies the whole cache at every step, and takes any sizes.
What GroupQueryAttention takes was measured on the CPU kernels of onnxruntime 1.32: heads of a multiple of 8 dimensions, keys as long as
values; to rotate as well, heads of a multiple of 16, of which a multiple of 16 turn, by the same pairs in all KV heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from edgeq.errors import PlanError, ShapeError
from edgeq.rope import RopeSpec
from edgeq.spec import Attention, ModelSpec
from edgeq.tensors import LazyTensor

Operator = Literal["GroupQueryAttention", "Attention"]
Rotation = Literal["none", "inside", "before", "by_head"]

HEAD_STEP, ROTARY_STEP = 8, 16


@dataclass(frozen=True)
class Turning:
    """How the heads of a layer rotate: pairs[h] numbers the pairs of `rope` that KV head h has, in its order, queries with their keys.

    A head's own pairs are (j, j + n_pairs) of its first 2 * n_pairs dimensions; the rest passes through.
    """

    rope: RopeSpec
    pairs: tuple[tuple[int, ...], ...]

    @property
    def n_pairs(self) -> int:
        return len(self.pairs[0])

    @property
    def alike(self) -> bool:
        """Whether all KV heads turn the same pairs."""
        return len(set(self.pairs)) == 1


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """What one attention layer becomes. value_dim: dimensions of a head's values; keys have the block's head_dim.

    rotation: "inside" the operator, "before" it, before it with pairs of each KV head's own ("by_head"), or "none".
    """

    layer: int
    operator: Operator
    rotation: Rotation
    value_dim: int
    reason: str
    turning: Turning | None = field(default=None, repr=False)

    @property
    def kind(self) -> Literal["A", "B", "C"]:
        if self.operator == "Attention":
            return "C"
        return "A" if self.rotation in ("inside", "none") else "B"

    @property
    def in_place(self) -> bool:
        """Whether past and present keys and values may share one buffer."""
        return self.operator == "GroupQueryAttention"

    @property
    def takes_joined(self) -> bool:
        """Whether the operator takes queries, keys and values side by side in one value."""
        return self.kind == "A"

    def to_json(self) -> dict[str, Any]:
        names = ("layer", "kind", "operator", "rotation", "value_dim", "in_place", "reason")
        return {name: getattr(self, name) for name in names}


def lowerings(
    spec: ModelSpec, *, value_dims: Mapping[int, int] | None = None, turnings: Mapping[int, Turning] | None = None, in_place: bool = False
) -> tuple[Lowering, ...]:
    """One choice per attention block, in order.

    value_dims, turnings: of layers, by number, whose values are not as long as keys, or that do not turn as the spec says (pairs of their
    own). in_place: every layer must write its cache in place, for runtimes that share one buffer between past and present. Raises PlanError
    with the remedy where a layer cannot, ShapeError for a turning that does not fit its layer.
    """
    return tuple(
        _lowering(block, (turnings or {}).get(block.layer, _turning(spec, block)), (value_dims or {}).get(block.layer), in_place)
        for block in spec.attention
    )


def value_dims(spec: ModelSpec, tensors: Mapping[str, LazyTensor]) -> dict[int, int]:
    """Dimensions of a head's values by layer, as `wv` has rows. Raises ShapeError when they do not divide into KV heads."""
    found = {}
    for block in spec.attention:
        wv = tensors.get(f"layers.{block.layer}.wv.weight")
        if wv is None:
            continue
        if wv.n_rows % block.n_kv_heads:
            raise ShapeError(f"{wv.origin}: {wv.n_rows} rows of values do not divide into {block.n_kv_heads} KV heads")
        found[block.layer] = wv.n_rows // block.n_kv_heads
    return found


def describe(choices: Iterable[Lowering]) -> list[str]:
    """One line for each kind of layer: "layers 0-11, 14: GroupQueryAttention that rotates (A): ..."."""
    layers: dict[tuple[str, str, Rotation, str], list[int]] = {}
    for choice in choices:
        layers.setdefault((choice.kind, choice.operator, choice.rotation, choice.reason), []).append(choice.layer)
    how = {
        "none": "{} without rotation",
        "inside": "{} that rotates",
        "before": "RotaryEmbedding, then {}",
        "by_head": "RotaryEmbedding by KV head, then {}",
    }
    return [
        f"{'layer' if len(found) == 1 else 'layers'} {_spans(found)}: {how[rotation].format(operator)} ({kind}): {reason}"
        for (kind, operator, rotation, reason), found in layers.items()
    ]


def _lowering(block: Attention, turning: Turning | None, value_dim: int | None, in_place: bool) -> Lowering:
    if turning is not None:
        _check(block, turning)
    value_dim = block.head_dim if value_dim is None else value_dim
    obstacle = _no_gqa(block, value_dim)
    if obstacle is not None and in_place:
        raise PlanError(
            f"layer {block.layer}: {obstacle}, so its keys and values cannot be written in place, which was asked for. "
            f"{_remedy(block, value_dim)}, or let the runtime copy its cache at every step."
        )
    made: Rotation = "none" if turning is None else "before" if turning.alike else "by_head"
    if obstacle is not None:
        return Lowering(
            layer=block.layer,
            operator="Attention",
            rotation=made,
            value_dim=value_dim,
            turning=turning,
            reason=f"{obstacle}; Attention takes any",
        )
    outside = None if turning is None else _no_rotation(block, turning)
    if turning is None:
        reason = f"nothing turns, and heads of {block.head_dim} are a multiple of {HEAD_STEP}"
    elif outside is None:
        made = "inside"
        reason = f"{2 * turning.n_pairs} of {block.head_dim} dimensions turn, in all KV heads alike"
    else:
        reason = outside
    return Lowering(layer=block.layer, operator="GroupQueryAttention", rotation=made, value_dim=value_dim, turning=turning, reason=reason)


def _no_gqa(block: Attention, value_dim: int) -> str | None:
    """Why GroupQueryAttention cannot compute a layer."""
    if value_dim != block.head_dim:
        return f"keys have {block.head_dim} dimensions and values {value_dim}, and GroupQueryAttention wants both alike"
    if block.head_dim % HEAD_STEP:
        return f"heads have {block.head_dim} dimensions, and GroupQueryAttention takes multiples of {HEAD_STEP}"
    return None


def _no_rotation(block: Attention, turning: Turning) -> str | None:
    """Why GroupQueryAttention cannot rotate a layer that it can compute."""
    if not turning.alike:
        return "KV heads turn pairs of their own, and GroupQueryAttention has one table for all heads"
    if block.head_dim % ROTARY_STEP:
        return f"heads have {block.head_dim} dimensions, and GroupQueryAttention rotates multiples of {ROTARY_STEP}"
    if 2 * turning.n_pairs % ROTARY_STEP:
        return f"{2 * turning.n_pairs} of {block.head_dim} dimensions turn, and GroupQueryAttention turns multiples of {ROTARY_STEP}"
    return None


def _remedy(block: Attention, value_dim: int) -> str:
    if value_dim != block.head_dim:
        return "Keep as many dimensions of values as of keys"
    below = block.head_dim // HEAD_STEP * HEAD_STEP
    return f"Keep {' or '.join(str(size) for size in (below, below + HEAD_STEP) if size)} dimensions"


def _turning(spec: ModelSpec, block: Attention) -> Turning | None:
    rope = spec.rope_of(block)
    return None if rope is None else Turning(rope, spec.pairs_of(block))


def _check(block: Attention, turning: Turning) -> None:
    where = f"layer {block.layer}"
    if len(turning.pairs) != block.n_kv_heads:
        raise ShapeError(f"{where}: RoPE pairs of {len(turning.pairs)} KV heads are given, and it has {block.n_kv_heads}")
    counts = {len(pairs) for pairs in turning.pairs}
    if len(counts) > 1 or not 0 < 2 * turning.n_pairs <= block.head_dim:
        raise ShapeError(
            f"{where}: its KV heads have {sorted(counts)} RoPE pairs; expected one number of them, from 1 to {block.head_dim // 2}"
        )
    if not all(0 <= pair < turning.rope.dim // 2 for pairs in turning.pairs for pair in pairs):
        raise ShapeError(f"{where}: a RoPE pair is not one of 0 to {turning.rope.dim // 2 - 1}")


def _spans(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)
