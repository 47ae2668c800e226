"""The elastic part of an export: what of a model can be cut and in which grids, its sorted form, and its cut form before it is quantized.

Grids. A cut copies whole blocks, so MLP channels go in steps that divide into the blocks of every down projection, and KV groups can go
where the columns of one divide into the blocks of the output projection. Where they do not, the output projection gets the grid of
smaller blocks, and no fewer bits, that llama-quantize falls back to for odd rows: Q5_0 in place of Q4_K makes a file 1 to 2 % larger,
and without it models with a head of 64 or 128 dimensions for each query could lose no attention at all.

Sorting moves columns of down and output projections. In blocks that are quantized along rows this regroups what shares a scale, so these
two are encoded again whatever grid they come in; every other matrix moves in whole rows, as bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgeq import ports, sorting, uniql
from edgeq.allocation import build_ladder
from edgeq.axes import Index
from edgeq.calibration import Importance
from edgeq.compensation import Regression, regression
from edgeq.converters.gguf.cuttable import Cuttable, Freedom, cuttable, head_sizes
from edgeq.converters.gguf.lowering import Lowered
from edgeq.converters.gguf.mixes import finer_grid
from edgeq.elastic import Kept, Ladder, Port, steps_for_rate
from edgeq.elastic_files import SortMode
from edgeq.grids import Grid
from edgeq.listening import Listening
from edgeq.model import Model
from edgeq.progress import Progress, silent
from edgeq.sorting import Sorting
from edgeq.spec import Attention, ModelSpec
from edgeq.tensors import Floats, LazyTensor, from_values, map_values
from edgeq.width_ladder import width_ladder

RANK = 64  # columns of a layer's model of hidden activations
LEAST_STEP = 32  # MLP channels: the block of most grids, and what kernels like


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """What can be cut of a model in the grids of one plan.

    ports: how freely, and why not more freely. channel_step: MLP channels that go at once. head_sizes: dimensions that heads may be cut to.
    """

    ports: Mapping[str, Cuttable]
    channel_step: int
    head_sizes: tuple[int, ...] = ()

    @property
    def freedom(self) -> dict[str, Freedom]:
        return {port: found.freedom for port, found in self.ports.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        """What is not free, and why; ports of one reason in one sentence."""
        by_reason: dict[Cuttable, list[str]] = {}
        for port, cut in self.ports.items():
            by_reason.setdefault(cut, []).append(port)
        return tuple(f"cutting {', '.join(names)}: {c.freedom}; {c.reason}" for c, names in by_reason.items() if c.freedom != "per layer")

    def to_json(self) -> dict[str, Any]:
        return {port: {"freedom": found.freedom, "reason": found.reason} for port, found in self.ports.items()}


def ready_to_sort(model: Model) -> Model:
    """The model with the tensors that sorting will hand on as floats, in the order it has: what a plan is made from."""
    spec, tensors = ports.apply(model.spec, model.tensors, _as_they_are(model.spec))
    return replace(model, spec=spec, tensors=tensors)


def cutting_grids(lowered: Lowered, grids: Mapping[str, Grid]) -> dict[str, Grid]:
    """The same grids, but for output projections whose KV groups do not divide into their blocks where a finer grid's would do."""
    columns = _group_columns(lowered.spec)
    chosen = dict(grids)
    for t in lowered.tensors:
        if t.role == "wo" and t.layer in columns and (finer := finer_grid(grids[t.name], columns[t.layer])) is not None:
            chosen[t.name] = finer
    return chosen


def find_cuts(lowered: Lowered, grids: Mapping[str, Grid]) -> Cuts:
    """What of the model can be cut in a file of these grids."""
    spec, found = lowered.spec, dict(cuttable(lowered.spec))
    blocks = [grids[t.name].block_size for t in lowered.tensors if t.role == "down"]
    columns = _group_columns(spec)
    for t in lowered.tensors:
        if t.role == "wo" and t.layer in columns and found["kv_group"].freedom != "no" and not grids[t.name].fits(columns[t.layer]):
            found["kv_group"] = Cuttable(
                "no",
                f"the query heads of one kv head read {columns[t.layer]} columns of {t.name}, which do not divide into "
                f"{grids[t.name].name} blocks of {grids[t.name].block_size}.",
            )
    wo_block = math.lcm(*(grids[t.name].block_size for t in lowered.tensors if t.role == "wo"))
    sizes = head_sizes(spec, wo_block)
    if not sizes and found["head"].freedom != "no":
        head_dim = spec.attention[0].head_dim
        why = Cuttable("no", f"no smaller size for heads of {head_dim} divides, as they do, into the blocks of {wo_block} of attn_output.")
        found |= dict.fromkeys(("head", "vo", "qk"), why)
    return Cuts(ports=found, channel_step=math.lcm(LEAST_STEP, *blocks), head_sizes=sizes)


def _group_columns(spec: ModelSpec) -> dict[int | None, int]:
    """Columns of the output projection that belong to one KV group, by layer; empty where layers have one group only."""
    if all(b.n_kv_heads == 1 for b in spec.attention):
        return {}
    return {b.layer: b.n_heads // b.n_kv_heads * b.head_dim for b in spec.attention}


def even_ladder(model: Model, cuts: Cuts, mode: SortMode) -> Ladder:
    """A ladder as if all parts of the model mattered the same: its sizes are near those that sorting will lead to.

    Raises UnsupportedError when cuts of this kind do not reach MAX_RATE; sorting would not either.
    """
    spec = model.spec
    if mode != "edgeq":
        return width_ladder(spec, model.tensors, channel_step=cuts.channel_step, alike=cuts.freedom["ffn"] != "per layer")
    same: dict[tuple[Port, int], Floats] = {(ports.port_of(b), b.layer): np.ones(ports.size(b), dtype=np.float32) for b in spec.blocks}
    return build_ladder(spec, model.tensors, same, freedom=cuts.freedom, channel_step=cuts.channel_step)


def sort_model(
    model: Model,
    cuts: Cuts,
    mode: SortMode,
    windows: Sequence[Sequence[int]],
    held_back: Sequence[Sequence[int]],
    *,
    progress: Progress = silent,
) -> tuple[Sorting, Importance | None]:
    """In which order the parts of a model go; and the importance of the sorted model's inputs, if sorting has come by it on its way.

    held_back: windows to check on what the others taught.
    """
    reference, alike = Listening(model.spec, model.tensors), cuts.freedom["ffn"] != "per layer"
    if mode == "edgeq":
        found = sorting.sort(
            reference,
            windows,
            channel_step=cuts.channel_step,
            rank=RANK,
            freedom=cuts.freedom,
            head_sizes=cuts.head_sizes,
            held_back=held_back,
            progress=progress,
        )
    elif mode == "uniql":
        found = uniql.sort(reference, windows, channel_step=cuts.channel_step, alike=alike, progress=progress)
    else:
        found = Sorting(orders=_as_they_are(model.spec), ladder=even_ladder(model, cuts, mode), hidden={})
    heard = reference.importance()
    return found, None if heard is None else _moved(heard, model.spec, found)


def _moved(heard: Importance, spec: ModelSpec, found: Sorting) -> Importance | None:
    """Importance of a model's inputs in sorted order: those of down and output projections have moved. None where values were mixed."""
    if found.rotations is not None:
        return None
    moved = dict(heard)
    for block, order in zip(spec.blocks, found.orders, strict=True):
        role = "wo" if isinstance(block, Attention) else "down"
        name = f"layers.{block.layer}.{role}"
        moved[name] = heard[name].reshape(ports.size(block), -1)[order].reshape(-1)
    return moved


def _as_they_are(spec: ModelSpec) -> tuple[Index, ...]:
    return tuple(np.arange(ports.size(block)) for block in spec.blocks)


def sorted_model(model: Model, found: Sorting, kept: Kept | None = None) -> Model:
    """The model in sorted order: the same function. kept: what of it will stay; heads that lose nothing keep their order."""
    pair_orders, rotations = found.pair_orders, found.rotations
    if pair_orders is not None and rotations is not None and kept is not None:
        smaller = {b.layer for b in model.spec.attention if kept.head_dims is not None and kept.head_dims[b.layer] < b.head_dim}
        pair_orders = {layer: order for layer, order in pair_orders.items() if layer in smaller}
        rotations = {layer: own for layer, own in rotations.items() if layer in smaller}
    spec, tensors = ports.apply(
        model.spec, model.tensors, found.orders, pair_order=found.pair_order, pair_orders=pair_orders, rotations=rotations
    )
    return replace(model, spec=spec, tensors=tensors)


def pruned_model(model: Model, found: Sorting, rate: float, *, down_bias: bool) -> tuple[Model, float]:
    """The sorted model cut to a rate and compensated in float, and the fraction of block parameters that went.

    down_bias: whether the file to come has biases for what lost channels do on average. Raises PlanError for a rate that the ladder does
    not reach.
    """
    n_steps = steps_for_rate(found.ladder, rate)
    kept = found.ladder.kept(n_steps)
    whole = sorted_model(model, found, kept)
    spec, tensors = ports.cut(whole.spec, whole.tensors, kept)
    adds_bias = down_bias and any(block.layer in found.hidden for block in spec.mlps)
    for block in spec.mlps:
        name = f"layers.{block.layer}.down"
        whole_down, hidden = whole.tensors[f"{name}.weight"], found.hidden.get(block.layer)
        lost = None
        if hidden is not None and block.n_ff < len(hidden.mean):
            lost = regression(hidden, block.n_ff, intercept=adds_bias)
            tensors[f"{name}.weight"] = map_values(whole_down, lost.columns, shape=(whole_down.n_rows, block.n_ff))
        if adds_bias:
            tensors[f"{name}.bias"] = _with_mean(tensors.get(f"{name}.bias"), whole_down, lost, block.n_ff)
    if adds_bias:
        spec = replace(spec, biases=spec.biases | {"down"})
    metadata = {key: value for key, value in model.metadata.items() if key != "size_label"}
    return replace(model, spec=spec, tensors=tensors, metadata=metadata), found.ladder.removed_fraction(n_steps)


def _with_mean(bias: LazyTensor | None, down: LazyTensor, lost: Regression | None, n_ff: int) -> LazyTensor:
    """The bias of a cut down projection: what it had, and what lost channels come to beside the kept ones."""
    values = np.zeros(down.n_rows, dtype=np.float32) if bias is None else bias.decode()
    if lost is not None:
        values = values + lost.bias(down.decode()[:, n_ff:])
    return from_values(values, origin=down.origin)
