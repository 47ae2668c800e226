"""Ladders that cut MLP widths alone, all layers by the same share or each by its own. What is lost decides nothing here.

Used for the published order and for none (`--sort uniql`, `--sort none`), and to foretell sizes before anything is sorted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgeq import ports
from edgeq.elastic import MAX_RATE, Ladder, Step
from edgeq.errors import UnsupportedError
from edgeq.spec import Mlp, ModelSpec
from edgeq.tensors import LazyTensor


def width_ladder(
    spec: ModelSpec,
    tensors: Mapping[str, LazyTensor],
    *,
    channel_step: int,
    alike: bool = False,
    shares: Sequence[float] | None = None,
    most: float = 1.0,
) -> Ladder:
    """Steps of `channel_step` channels, in the order in which layers come to lose that much of their width.

    alike: all layers take a step together. shares: how much faster each layer loses width than others, by layer; the same by default.
    most: of a layer's width. Every layer keeps at least one step. Steps say nothing of damage: it is 0. Raises UnsupportedError
    when all that leaves more than 1 - MAX_RATE of the block parameters, or when layers of several widths are to lose alike.
    """
    pace = [1.0] * spec.n_layers if shares is None or alike else list(shares)
    groups = [spec.mlps] if alike else [(block,) for block in spec.mlps]
    due: list[tuple[float, Step]] = []
    for blocks in groups:
        due += _steps(spec, tensors, blocks, channel_step, alike=alike, pace=pace[blocks[0].layer], most=most)
    due.sort(key=lambda pair: pair[0])  # stable: ties in the order of layers
    total = ports.block_params(tensors)
    steps: list[Step] = []
    removed = 0
    for _, step in due:
        steps.append(step)
        removed += step.removed
        if removed >= MAX_RATE * total:
            break
    else:
        raise UnsupportedError(
            f"cutting {channel_step} MLP channels at a time removes {removed:,} of {total:,} block parameters, less than the "
            f"{MAX_RATE:.0%} of an elastic package. Export this model with --fixed, or in a type with smaller blocks."
        )
    widths, groups_of = {b.layer: b.n_ff for b in spec.mlps}, {b.layer: b.n_kv_heads for b in spec.attention}
    return Ladder(
        n_ff=tuple(widths.get(layer, 0) for layer in range(spec.n_layers)),
        n_kv=tuple(groups_of.get(layer, 0) for layer in range(spec.n_layers)),
        block_params=total,
        steps=tuple(steps),
    )


def _steps(
    spec: ModelSpec, tensors: Mapping[str, LazyTensor], blocks: Sequence[Mlp], channel_step: int, *, alike: bool, pace: float, most: float
) -> list[tuple[float, Step]]:
    """Steps of MLPs that are cut together, each with the rate at which it is due."""
    widths = sorted({block.n_ff for block in blocks})
    layer = None if alike else blocks[0].layer
    if len(widths) > 1 or (alike and len(blocks) < spec.n_layers):
        raise UnsupportedError(
            f"{len(blocks)} of {spec.n_layers} layers have MLPs, of widths {widths}, which cannot be cut alike. Use --fixed."
        )
    [width] = widths
    part = sum(ports.parameters(tensors, block) for block in blocks)
    found, start = [], width
    for stop in range((width - 1) // channel_step * channel_step, 0, -channel_step):
        lost = (width - stop) / width
        if lost > most:
            break
        found.append((lost / pace, Step(layer=layer, port="ffn", start=start, stop=stop, removed=(start - stop) * part, damage=0.0)))
        start = stop
    return found
