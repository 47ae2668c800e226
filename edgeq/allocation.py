"""Allocation: in which order the parts of all layers and ports go, decided once. The result is a ladder (`edgeq.elastic`).

Every layer and port offers a chain of moves, from its least important parts up; a move removes some parameters at some cost. To remove
enough parameters at the least total cost is a knapsack with one choice from every chain. The ladder adds that a higher rate may never keep
more of anything. Both are had at once:

- Moves are ordered by the slope (cost per parameter) of the lower convex hull of their chain's curve of cost against parameters removed.
  Hull slopes rise along a chain, so each chain is walked in its own order, and every rate takes a prefix of one list.
- Where the last move taken completes an edge of a hull, the prefix is an optimum: let `a` be that edge's slope. On every chain the prefix
  minimises cost - a * removed, as the edges it took are no steeper than `a` and those it left are no flatter. A cheaper choice that
  removes as much would have a smaller sum of cost - a * removed, which is impossible.
- So a prefix that just reaches what was asked costs at most the optimum plus its last edge, nearly always one move: sorted parts make
  chains that are convex as they are. Exact solutions for each rate would gain less than that and not be nested.

Costs are predicted losses, with a layer's divided by the square root of its mean channel sensitivity. Sensitivities predict the first
parts that go, one at a time; when many go, errors of neighbours add up and a layer loses more than their sum, so that taking them at face
value empties a few layers. On SmolLM2-135M with least-squares compensation (perplexity on held-out WikiText in windows of 512, full model
29.3), removing 15 / 25 % of block parameters gave 36.0 / 42.5 with a mixture of 60 % face value and 40 % equal widths, and 35.6 / 41.7
with the square root; equal widths at 15 % gave 37.6.

Heads that lose dimensions and groups that go have parameters in common. Moves are ordered as if they had not: whichever comes first, what
the other costs and what it removes shrink together. Steps state what is really removed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgeq import ports
from edgeq.elastic import MAX_RATE, Ladder, Port, Step
from edgeq.errors import ShapeError, UnsupportedError
from edgeq.spec import Block, ModelSpec
from edgeq.tensors import Floats, LazyTensor

Freedom = Literal["per layer", "all layers alike", "no"]


@dataclass(frozen=True, kw_only=True)
class Move:
    """A step that may be taken: `layer` (None: all layers alike) goes from `start` parts of `port` to `stop`.

    removed: parameters, if no other port lost any. damage: nats per token, by layer. cost: what moves are compared by.
    """

    layer: int | None
    port: Port
    start: int
    stop: int
    removed: int
    damage: Mapping[int, float]
    cost: float


def build_ladder(
    spec: ModelSpec,
    tensors: Mapping[str, LazyTensor],
    sensitivity: Mapping[tuple[Port, int], Floats],
    *,
    freedom: Mapping[str, Freedom],
    channel_step: int,
    head_sizes: Sequence[int] = (),
) -> Ladder:
    """One order of steps over all layers and ports, up to the first that reaches MAX_RATE.

    sensitivity, nats per token, by port and layer: "ffn" (n_ff,) and "kv_group" (n_kv_heads,), each part's own, in any order; "head"
    (head_dim / 2,), of two dimensions of all its heads each, in the order in which they are stored; "layer" (1,), the whole layer's. A port
    without them, or one that `freedom` names "no" or not at all, is not cut. Layers go only where nothing else is cut in all layers alike,
    and never the first or the last. channel_step: channels that go at once. head_sizes: sizes that heads may be cut to.

    Every block that stays keeps at least one step of channels or one group. Tensors are asked for their shapes only. Raises ShapeError for
    sensitivities of another length than their port; UnsupportedError when all steps leave more than 1 - MAX_RATE, or when what is
    to be cut in all layers alike differs between them.
    """
    costs = _Costs(spec, tensors, sensitivity)
    chains: dict[int | None, list[list[Move]]] = {None: []}
    for block in spec.blocks:
        port = ports.port_of(block)
        if freedom.get(port) == "per layer" and (port, block.layer) in sensitivity:
            chains.setdefault(block.layer, []).append(costs.chain([block], channel_step if port == "ffn" else 1, layer=block.layer))
    for port, at_once in (("ffn", channel_step), ("kv_group", 1)):
        blocks = [b for b in spec.blocks if ports.port_of(b) == port]
        if blocks and freedom.get(port) == "all layers alike" and all((port, b.layer) in sensitivity for b in blocks):
            chains[None].append(costs.chain(blocks, at_once, layer=None))
    if freedom.get("head", "no") != "no" and head_sizes and (measured := [layer for port, layer in sensitivity if port == "head"]):
        if freedom["head"] == "per layer":
            for layer in sorted(measured):
                chains.setdefault(layer, []).append(costs.head_chain(head_sizes, layer))
        else:
            chains[None].append(costs.head_chain(head_sizes, None))
    if freedom.get("layer") == "per layer" and "all layers alike" not in (freedom.get("ffn"), freedom.get("kv_group")):
        for layer in range(1, spec.n_layers - 1):
            if ("layer", layer) in sensitivity:
                chains[layer] = [_with_whole(in_order(chains.get(layer, [])), costs.whole(layer))]
    steps = _replay(costs, in_order([chain for own in chains.values() for chain in own]))
    total = ports.block_params(tensors)
    steps = _to_last_rate(steps, total, channel_step)
    return Ladder(
        n_ff=tuple(costs.sizes["ffn"]),
        n_kv=tuple(costs.sizes["kv_group"]),
        head_dim=next((step.start for step in steps if step.port == "head"), None),
        block_params=total,
        steps=tuple(steps),
    )


def in_order(chains: Sequence[Sequence[Move]]) -> list[Move]:
    """All moves by the slope of their chain's lower hull, each chain's in its own order. Among equals, chains go down side by side."""
    ranked = [pair for chain in chains for pair in zip(_ranks(chain), chain, strict=True)]
    return [move for _, move in sorted(ranked, key=lambda pair: pair[0])]


def _ranks(chain: Sequence[Move]) -> list[tuple[float, float]]:
    """Of each move, the slope of the hull's edge that it lies on or above, and the share of the chain in front of that edge."""
    edges: list[tuple[float, int, int]] = []  # cost, removed, moves
    for move in chain:
        cost, removed, n_moves = move.cost, move.removed, 1
        while edges and edges[-1][0] / edges[-1][1] > cost / removed:  # steeper than what follows: both are below one edge
            before = edges.pop()
            cost, removed, n_moves = before[0] + cost, before[1] + removed, before[2] + n_moves
        edges.append((cost, removed, n_moves))
    total, ranks, gone = sum(move.removed for move in chain), [], 0
    for cost, removed, n_moves in edges:
        ranks += [(cost / removed, gone / total)] * n_moves
        gone += removed
    return ranks


def _with_whole(chain: Sequence[Move], whole: Move) -> list[Move]:
    """The moves of a layer up to where it costs less, per parameter, to take all that is left at once; then that.

    chain: one that is its own hull, as those of sorted parts are. whole: the layer's removal from its full size.
    """
    kept: list[Move] = []
    last = whole
    for move, (slope, _) in zip(chain, _ranks(chain), strict=True):
        if last.cost / last.removed <= slope:
            break
        kept.append(move)
        last = dataclasses.replace(last, removed=last.removed - move.removed, cost=max(last.cost - move.cost, 0.0))
    return [*kept, last]


class _Costs:
    """What moves of one model remove and cost.

    sizes: by port and layer. per_channel, per_dim: parameters that go with an MLP channel, and with one dimension of the heads of a KV
    group. total: parameters of a layer.
    """

    def __init__(self, spec: ModelSpec, tensors: Mapping[str, LazyTensor], sensitivity: Mapping[tuple[Port, int], Floats]) -> None:
        self.spec, self.sensitivity = spec, sensitivity
        self.sizes: dict[Port, list[int]] = {"ffn": [0] * spec.n_layers, "kv_group": [0] * spec.n_layers}
        for block in spec.blocks:
            self.sizes[ports.port_of(block)][block.layer] = ports.size(block)
        self.head_dims = {b.layer: b.head_dim for b in spec.attention}
        self.per_channel = {b.layer: ports.parameters(tensors, b) for b in spec.mlps}
        self.per_dim = {b.layer: ports.parameters(tensors, b) // b.head_dim for b in spec.attention}
        self.total = [ports.block_params({n: t for n, t in tensors.items() if n.startswith(f"layers.{i}.")}) for i in range(spec.n_layers)]
        channels = {layer: values for (port, layer), values in sensitivity.items() if port == "ffn" and values.any()}
        scales = {layer: math.sqrt(values.mean(dtype=np.float64)) for layer, values in channels.items()}
        typical = sum(scales.values()) / len(scales) if scales else 1.0  # of layers that have no channels to tell
        self.scales = [scales.get(layer, typical) for layer in range(spec.n_layers)]

    def chain(self, blocks: Sequence[Block], at_once: int, *, layer: int | None) -> list[Move]:
        """Moves of one port, all these blocks together, down to the last `at_once` parts."""
        port, start = ports.port_of(blocks[0]), ports.size(blocks[0])
        if layer is None and self.sizes[port] != [start] * self.spec.n_layers:
            raise UnsupportedError(_unlike(port, self.sizes[port]))
        values = {b.layer: -np.sort(-self._values(port, b.layer, start)) for b in blocks}
        per_part = sum(self.per_channel[b] if port == "ffn" else self.per_dim[b] * self.head_dims[b] for b in values)
        stops = range((start - 1) // at_once * at_once, 0, -at_once)
        return self._moves(port, layer, (start, *stops), values, per_part, part=1)

    def head_chain(self, head_sizes: Sequence[int], layer: int | None) -> list[Move]:
        """Moves of all heads of a layer, or of all layers, together, to each smaller size in turn."""
        layers = list(self.head_dims) if layer is None else [layer]
        start = self.head_dims[layers[0]]
        if set(self.head_dims.values()) != {start}:
            raise UnsupportedError(_unlike("head", list(self.head_dims.values())))
        values = {i: self._values("head", i, start // 2) for i in layers}
        per_dim = sum(self.per_dim[i] * self.sizes["kv_group"][i] for i in layers)
        return self._moves("head", layer, sorted({start, *(s for s in head_sizes if s < start)}, reverse=True), values, per_dim, part=2)

    def whole(self, layer: int) -> Move:
        """A layer's removal from its full size. Where the model is better without it, its damage is negative and it goes first."""
        damage = float(self._values("layer", layer, 1)[0])
        cost = damage / self.scales[layer]
        return Move(layer=layer, port="layer", start=1, stop=0, removed=self.total[layer], damage={layer: damage}, cost=cost)

    def _moves(
        self,
        port: Port,
        layer: int | None,
        sizes: Sequence[int],
        values: Mapping[int, npt.NDArray[np.float64]],
        per_size: int,
        *,
        part: int,
    ) -> list[Move]:
        """From each size to the next. values: by layer, of `part` units of size each; per_size: parameters of one unit."""
        moves = []
        for start, stop in itertools.pairwise(sizes):
            damage = {i: float(own[stop // part : start // part].sum()) for i, own in values.items()}
            cost = math.fsum(loss / self.scales[i] for i, loss in damage.items())
            removed = (start - stop) * per_size
            moves.append(Move(layer=layer, port=port, start=start, stop=stop, removed=removed, damage=damage, cost=cost))
        return moves

    def _values(self, port: Port, layer: int, n_values: int) -> npt.NDArray[np.float64]:
        values = self.sensitivity[port, layer].astype(np.float64)
        if values.shape != (n_values,):
            raise ShapeError(f"layer {layer}: sensitivities of port {port} have shape {values.shape}, expected ({n_values},)")
        return values


def _unlike(port: Port, sizes: Sequence[int]) -> str:
    return f"{port}: layers have {sorted(set(sizes))} parts, which cannot be cut alike. Export this model with --fixed."


def _to_last_rate(steps: Sequence[Step], total: int, channel_step: int) -> list[Step]:
    """The first steps, up to MAX_RATE of `total` parameters. Raises UnsupportedError when all are not enough."""
    removed = 0
    for n_steps, step in enumerate(steps, 1):
        removed += step.removed
        if removed / total >= MAX_RATE:  # as `Ladder.removed_fraction` rounds it
            return list(steps[:n_steps])
    names: dict[Port, str] = {
        "ffn": f"{channel_step} channels of MLPs at a time",
        "kv_group": "KV groups",
        "head": "heads",
        "layer": "layers",
    }
    cut = [name for port, name in names.items() if any(step.port == port for step in steps)]
    raise UnsupportedError(
        f"cutting {' and '.join(cut) or 'nothing'} as far as it goes removes {removed:,} of {total:,} block parameters, less than the "
        f"{MAX_RATE:.0%} of an elastic package. Export this model with --fixed, or in a type with smaller blocks."
    )


def _replay(costs: _Costs, moves: Sequence[Move]) -> list[Step]:
    """The steps that moves come to when each is taken from what those before it left."""
    n_kv, head_dims, left = list(costs.sizes["kv_group"]), dict(costs.head_dims), list(costs.total)
    spent = [0.0] * len(left)
    steps = []
    for move in moves:
        removed, damage = 0, 0.0
        for layer, loss in move.damage.items():
            if move.port == "ffn":
                gone = (move.start - move.stop) * costs.per_channel[layer]
            elif move.port == "kv_group":
                gone = (move.start - move.stop) * costs.per_dim[layer] * head_dims[layer]
                n_kv[layer] = move.stop
            elif move.port == "head":
                gone = (move.start - move.stop) * costs.per_dim[layer] * n_kv[layer]
                loss *= n_kv[layer] / costs.sizes["kv_group"][layer]
                head_dims[layer] = move.stop
            else:
                gone, loss = left[layer], max(loss - spent[layer], 0.0)
                n_kv[layer] = 0
            left[layer] -= gone
            spent[layer] += loss
            removed, damage = removed + gone, damage + loss
        steps.append(Step(layer=move.layer, port=move.port, start=move.start, stop=move.stop, removed=removed, damage=damage))
    return steps
