"""Sorting: in which order the parts of a model may go, and what makes up for them.

1. `edgeq.sensitivity` measures every MLP channel, KV group, head dimension and layer in nats per token.
2. Within a layer, the least sensitive goes first.
3. Between layers and ports, what is lost per parameter decides (`edgeq.allocation`).
4. A factor model of the hidden activations is kept for each layer (`edgeq.hidden_fit`); the device compensates any cut from it
   (`edgeq.compensation`).

Layers are streamed: what stays is an order, a few numbers and `rank` columns for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from edgeq import ports
from edgeq.allocation import Freedom, build_ladder
from edgeq.compensation import Floats, HiddenModel
from edgeq.elastic import Ladder, Port
from edgeq.hidden_fit import UNCHECKED_NOISE, held_back_noise, hidden_model, with_noise
from edgeq.ports import Index
from edgeq.progress import Progress, silent
from edgeq.reference import Reference
from edgeq.sensitivity import HeadStatistics, LayerStatistics, Moments, layer_statistics
from edgeq.transforms import Numbers

# How much more a KV group costs than its sensitivity says. A group is a large part of its layer, beyond where the second order holds, and
# nothing makes up for it. SmolLM2-135M, 25 % of parameters removed, perplexity on WikiText (full model 29.3): with 1, 13 groups of 90 go
# and it is 63.3; with 4, one goes and it is 51.6; with 10, none and 52.0. Calibrated on WikiText itself 5 go with 1, and it is 41.6, or
# 42.0 when none may.
_GROUP_COST = 4.0


# The same for dimensions of heads, where each layer and KV head has its own. SmolLM2-135M in float, perplexity at 15 / 25 / 35 %, of
# WikiText (eight windows of 1024 tokens, full model 23.7) and of Python source (three, 6.4), calibrated on other WikiText: heads left
# whole 28.5 / 34.0 / 43.0 and 13.5 / 20.2 / 29.9; with 6, 28.3 / 33.6 / 42.2 and 13.3 / 19.8 / 30.1; with 8, 28.4 / 33.8 / 42.5 and
# 13.5 / 20.3 / 29.9. On the default text: whole 30.4 / 38.0 / 53.4 and 11.0 / 17.7 / 31.0; with 4, 30.5 / 38.9 / 56.4 and 11.0 / 16.6 /
# 28.1; with 8, 30.3 / 38.2 / 53.3 and 11.1 / 17.3 / 30.2: a little is gained where calibration fits the text, and as good as nothing lost.
_HEAD_COST = 8.0


@dataclass(frozen=True, kw_only=True)
class Sorting:
    """orders: for each block of the spec, its parts from the most important one down. hidden: by layer, in the sorted order.

    Where heads may be cut: pair_order, the RoPE pairs of the whole model from the most important one down, or where each layer is cut for
    itself pair_orders, those of its KV heads; and rotations, by layer, the principal directions of each KV head's values, strongest first.
    All are as `ports.apply` takes them.
    """

    orders: tuple[Index, ...]
    ladder: Ladder
    hidden: Mapping[int, HiddenModel]
    pair_order: Index | None = None
    pair_orders: Mapping[int, Index] | None = None
    rotations: Mapping[int, Numbers] | None = None


def sort(
    reference: Reference,
    windows: Sequence[Sequence[int]],
    *,
    channel_step: int,
    rank: int,
    freedom: Mapping[str, Freedom],
    head_sizes: Sequence[int] = (),
    held_back: Sequence[Sequence[int]] = (),
    progress: Progress = silent,
) -> Sorting:
    """Measure a model on calibration windows of one length and decide in which order its parts go.

    channel_step: channels that go at once, a multiple of what the grid of down_proj can be cut by. rank: columns of each factor
    model, at most n_ff; 0 for none. freedom: by port, as for `build_ladder`. head_sizes: smaller heads to prepare for; none leaves
    heads as they are. held_back: windows, of the same length, that tell how far compensation can be trusted. The same input gives the
    same result. Raises UnsupportedError when steps of this size do not lead to MAX_RATE, UsageError for windows of other shapes,
    SourceError when the model computes NaN.
    """
    spec, with_heads = reference.spec, bool(head_sizes) and freedom.get("head", "no") != "no"
    sensitivity: dict[tuple[Port, int], Floats] = {}
    hidden: dict[int, HiddenModel] = {}
    heads: dict[int, HeadStatistics] = {}
    for found in layer_statistics(reference, windows, held_back, heads=with_heads, progress=progress):
        sensitivity |= _sensitivities(found)
        if found.taught is not None:
            order = _order(sensitivity["ffn", found.layer])
            hidden[found.layer] = _hidden(reference, found, order, rank)
        if found.heads is not None:
            heads[found.layer] = found.heads
    pair_order = pair_orders = None
    if heads and freedom["head"] == "per layer":
        pair_orders = {layer: np.stack([_order(own) for own in its.group_pairs.cpu().numpy()]) for layer, its in heads.items()}
        sensitivity |= {("head", layer): _own_head_sensitivity(its) for layer, its in heads.items()}
    elif heads:
        pair_order = _order(sum(statistics.pairs.cpu().double() for statistics in heads.values()).numpy())
        sensitivity |= {("head", layer): _head_sensitivity(statistics, pair_order) for layer, statistics in heads.items()}
    return Sorting(
        orders=tuple(_order(sensitivity[ports.port_of(b), b.layer]) for b in spec.blocks),
        ladder=build_ladder(
            spec, reference.tensors, sensitivity, freedom=freedom, channel_step=channel_step, head_sizes=head_sizes if with_heads else ()
        ),
        hidden=hidden,
        pair_order=pair_order,
        pair_orders=pair_orders,
        rotations={layer: statistics.rotations.cpu().numpy() for layer, statistics in heads.items()} if heads else None,
    )


def _sensitivities(found: LayerStatistics) -> dict[tuple[Port, int], Floats]:
    """Those of one layer by port."""
    values: dict[tuple[Port, int], Floats] = {("layer", found.layer): found.whole.cpu().numpy()}
    if len(found.channels):
        values["ffn", found.layer] = found.channels.cpu().numpy()
    if len(found.groups):
        values["kv_group", found.layer] = _GROUP_COST * found.groups.cpu().numpy()
    return values


def _head_sensitivity(statistics: HeadStatistics, pair_order: Index) -> Floats:
    """(head_dim / 2,): the j-th pair in this order together with the value dimensions 2j and 2j + 1."""
    values = statistics.values.cpu().numpy().reshape(-1, 2).sum(1)
    return statistics.pairs.cpu().numpy()[pair_order] + values


def _own_head_sensitivity(statistics: HeadStatistics) -> Floats:
    """(head_dim / 2,): of every KV head its own j-th pair, from the most important one down, with the value dimensions 2j and 2j + 1."""
    pairs = -np.sort(-statistics.group_pairs.cpu().numpy(), axis=1)
    values = statistics.group_values.cpu().numpy()
    return _HEAD_COST * (pairs + values.reshape(len(values), -1, 2).sum(2)).sum(0)


def _hidden(reference: Reference, found: LayerStatistics, order: Index, rank: int) -> HiddenModel:
    """The factor model of a layer, its channels in this order."""
    assert found.taught is not None
    taught = _in_order(found.taught, order)
    model = hidden_model(taught.mean, taught.second, rank=rank)
    if found.checked is None:
        return with_noise(model, UNCHECKED_NOISE)
    down = torch.from_numpy(reference.tensors[f"layers.{found.layer}.down.weight"].decode()[:, order]).to(taught.second)
    return held_back_noise(model, down, _in_order(found.checked, order))


def _in_order(moments: Moments, order: Index) -> Moments:
    index = torch.from_numpy(order).to(moments.mean.device)
    return Moments(moments.mean[index], moments.second[index[:, None], index])


def _order(values: Floats) -> Index:
    """Positions from the largest value down; equal ones keep their order."""
    return np.argsort(-values, kind="stable")
