"""Sorting: in which order the parts of a model may go, and what makes up for them.

1. `edgeq.sensitivity` measures every MLP channel and KV group in nats per token.
2. Within a layer, the least sensitive goes first.
3. Between layers, what is lost per parameter decides, with a layer's sensitivities divided by the square root of their mean.
   Sensitivities predict the first parts that go, one at a time; when many go, errors of neighbours add up and a layer loses more than
   their sum, so that taking them at face value empties a few layers. On SmolLM2-135M with least-squares compensation (perplexity on
   held-out WikiText in windows of 512, full model 29.3), removing 15 / 25 % of block parameters gave 36.0 / 42.5 with a mixture of
   60 % face value and 40 % equal widths, and 35.6 / 41.7 with the square root; equal widths at 15 % gave 37.6.
4. A factor model of the hidden activations is kept for each layer; the device compensates any cut from it (`edgeq.compensation`).

Layers are streamed: what stays is an order, a few numbers and `rank` columns for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from edgeq import ports
from edgeq.compensation import Floats, HiddenModel
from edgeq.elastic import MAX_RATE, Ladder, Port, Step
from edgeq.errors import UnsupportedError
from edgeq.ports import Index
from edgeq.progress import Progress, silent
from edgeq.reference import Reference
from edgeq.sensitivity import layer_statistics
from edgeq.spec import Mlp, ModelSpec
from edgeq.tensors import LazyTensor

# A channel keeps at least this share of its variance as noise of its own, so that no regression weight grows without bound.
_LEAST_NOISE = 0.05
_SWEEPS = 6


@dataclass(frozen=True, kw_only=True)
class Sorting:
    """orders: for each block of the spec, its parts from the most important one down. hidden: by layer, in the sorted order."""

    orders: tuple[Index, ...]
    ladder: Ladder
    hidden: Mapping[int, HiddenModel]


def sort(reference: Reference, windows: Sequence[Sequence[int]], *, channel_step: int, rank: int, progress: Progress = silent) -> Sorting:
    """Measure a model on calibration windows of one length and decide in which order its parts go.

    channel_step: channels that go at once, a multiple of what the grid of down_proj can be cut by. rank: columns of each factor
    model, at most n_ff; 0 for none. Raises UnsupportedError when steps of this size do not lead to MAX_RATE.
    """
    spec = reference.spec
    sensitivity: dict[tuple[Port, int], Floats] = {}
    hidden: dict[int, HiddenModel] = {}
    for found in layer_statistics(reference, windows, progress=progress):
        sensitivity["ffn", found.layer] = found.channels.cpu().numpy()
        sensitivity["kv_group", found.layer] = found.groups.cpu().numpy()
        if len(found.channels):
            order = torch.from_numpy(_order(sensitivity["ffn", found.layer])).to(found.channels.device)
            hidden[found.layer] = hidden_model(found.mean[order], found.second[order][:, order], rank=rank)
    steps = ladder(spec, reference.tensors, sensitivity, channel_step=channel_step)
    return Sorting(orders=tuple(_order(sensitivity[ports.port_of(b), b.layer]) for b in spec.blocks), ladder=steps, hidden=hidden)


def apply(spec: ModelSpec, tensors: Mapping[str, LazyTensor], orders: Sequence[Index]) -> dict[str, LazyTensor]:
    """The model in sorted order: the same function, its parts moved. orders: as in `Sorting`."""
    moved = dict(tensors)
    for block, order in zip(spec.blocks, orders, strict=True):
        moved = ports.select(moved, block, order)
    return moved


def ladder(
    spec: ModelSpec, tensors: Mapping[str, LazyTensor], sensitivity: Mapping[tuple[Port, int], Floats], *, channel_step: int
) -> Ladder:
    """One order of steps over all layers and ports, up to the first that reaches MAX_RATE.

    sensitivity: of every part, by port and layer, nats per token, in any order. Every block keeps at least one step of channels or
    one group. Tensors are asked for their shapes only. Raises UnsupportedError when that leaves more than 1 - MAX_RATE.
    """
    candidates: list[tuple[float, Step]] = []
    for block in spec.blocks:
        port, at_once = ports.port_of(block), channel_step if isinstance(block, Mlp) else 1
        values = -np.sort(-sensitivity[port, block.layer].astype(np.float64))
        part, scale = ports.parameters(tensors, block), _scale(sensitivity["ffn", block.layer])
        highest = 0.0  # within a layer a later step never comes before an earlier one
        start = len(values)
        for stop in range((start - 1) // at_once * at_once, 0, -at_once):
            damage = float(values[stop:start].sum())
            step = Step(layer=block.layer, port=port, start=start, stop=stop, removed=(start - stop) * part, damage=damage)
            start = stop
            highest = max(highest, damage / step.removed / scale)
            candidates.append((highest, step))
    candidates.sort(key=lambda candidate: candidate[0])  # stable: ties in the order of blocks
    total = ports.block_params(tensors)
    steps, removed = [], 0
    for _, step in candidates:
        steps.append(step)
        removed += step.removed
        if removed >= MAX_RATE * total:
            widths = {b.layer: ports.size(b) for b in spec.mlps}
            groups = {b.layer: ports.size(b) for b in spec.attention}
            return Ladder(
                n_ff=tuple(widths.get(i, 0) for i in range(spec.n_layers)),
                n_kv=tuple(groups.get(i, 0) for i in range(spec.n_layers)),
                block_params=total,
                steps=tuple(steps),
            )
    raise UnsupportedError(
        f"cutting {channel_step} MLP channels at a time, down to one step of each layer, removes {removed:,} of {total:,} block "
        f"parameters, less than the {MAX_RATE:.0%} of an elastic package. Export this model with --fixed, or in a type with smaller blocks."
    )


def hidden_model(mean: torch.Tensor, second: torch.Tensor, *, rank: int) -> HiddenModel:
    """Factor model of hidden activations with this mean (n_ff,) and these second moments (n_ff, n_ff).

    Principal factors of the correlation matrix: eigenvectors of it less its noise, and the noise from them, in turns. The eigenvectors
    come from subspace iteration, started at random with a fixed seed, so that no (n_ff, n_ff) decomposition is needed.
    """
    covariance = second - torch.outer(mean, mean)
    deviation = covariance.diagonal().clamp_min(0).sqrt()
    n_ff, rank = len(mean), min(rank, len(mean))
    noise, factors = torch.ones_like(mean), mean.new_zeros(n_ff, rank)
    if rank:
        unit = torch.where(deviation > 0, 1 / deviation, 0)
        correlation = covariance * unit[:, None] * unit
        generator = torch.Generator().manual_seed(0)
        basis = torch.randn(n_ff, min(rank + 8, n_ff), generator=generator).to(mean)
        noise = noise / 2
        for sweep in range(_SWEEPS):
            for _ in range(4 if sweep == 0 else 2):
                basis = torch.linalg.qr(correlation @ basis - noise[:, None] * basis)[0]
            values, vectors = torch.linalg.eigh(basis.T @ (correlation @ basis - noise[:, None] * basis))
            factors = (basis @ vectors)[:, -rank:] * values[-rank:].clamp_min(0).sqrt()
            noise = (1 - factors.square().sum(1)).clamp(_LEAST_NOISE, 1)
    return HiddenModel(
        mean=mean.cpu().numpy(), factors=(factors * deviation[:, None]).cpu().numpy(), noise=(noise * deviation.square()).cpu().numpy()
    )


def _order(values: Floats) -> Index:
    """Positions from the largest value down; equal ones keep their order."""
    return np.argsort(-values, kind="stable")


def _scale(channels: Floats) -> float:
    """What a layer's sensitivities are divided by before layers are compared."""
    return float(np.sqrt(channels.mean(dtype=np.float64))) if len(channels) and channels.any() else 1.0
