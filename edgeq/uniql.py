"""UniQL's way of cutting, for comparison (arXiv:2512.03383, section 3; rates as in the authors' compress/get_layer_ratio.py).

MLP channels by ridge leverage of down_proj's input; value dimensions of each KV group by the principal directions of its values; query
and key RoPE pairs of each head by the product of their root mean squares. All ports of a layer lose the same share. Layers lose
n_layers * rate * softmax(-importance / 0.1), at most 0.85 each, what is above that being lost to no other layer; or all the same.
A layer's importance is 1 - cos(what enters it, what leaves it), on the last token of each window.

Stock GGUF cannot store per-head pairs, so a cut is given as tensors of full size whose removed directions are zero (`masked`): the same
function as the smaller model, for the float reference to run. What stock GGUF can store of it is a sorted file cut in its MLP channels
alone (`sort`), in which whole heads stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from edgeq import ports
from edgeq.errors import PlanError, UnsupportedError
from edgeq.families import family
from edgeq.progress import Progress, silent
from edgeq.reference import Point, Reference
from edgeq.sorting import Sorting
from edgeq.spec import Attention, Mlp
from edgeq.tensors import Floats, LazyTensor, from_values, map_values
from edgeq.width_ladder import width_ladder

Moments = Mapping[tuple[int, Point], torch.Tensor]

EPSILON = 0.1  # of the softmax: the authors' default
MOST = 0.85  # of a layer
_BATCH_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """moments: E[x x^T] of the input of attention ("attn_in", with a 1 appended for biases) and of down_proj ("mlp_hidden"), by layer.

    importance: of each layer, 0 to 2.
    """

    moments: Moments
    importance: tuple[float, ...]


def measure(
    reference: Reference,
    windows: Sequence[Sequence[int]],
    *,
    points: Sequence[Point] = ("attn_in", "mlp_hidden"),
    progress: Progress = silent,
) -> Measurement:
    """One pass over windows of one length. points: those whose moments are wanted."""
    sums: dict[tuple[int, Point], torch.Tensor] = {}
    importance = []

    def add(layer: int | None, point: Point, x: torch.Tensor) -> None:
        if layer is None or point not in points:
            return
        x = x.flatten(0, -2)
        if point == "attn_in":
            x = torch.nn.functional.pad(x, (0, 1), value=1.0)
        known = sums.get((layer, point))
        sums[layer, point] = x.T @ x if known is None else known.addmm_(x.T, x)

    states, n_layers = reference.embed(windows), reference.spec.n_layers
    batch = max(1, _BATCH_TOKENS // states.shape[1])
    for layer, blocks in reference.spec.layers():
        progress("calibrate", layer, n_layers)
        run = reference.layer(blocks)
        with torch.no_grad():
            behind = torch.cat([run(part, add) for part in states.split(batch)])
        importance.append(1 - float(torch.cosine_similarity(states[:, -1], behind[:, -1], dim=-1).mean()))
        states = behind
    progress("calibrate", n_layers, n_layers)
    n_tokens = sum(len(window) for window in windows)
    return Measurement(moments={key: total / n_tokens for key, total in sums.items()}, importance=tuple(importance))


def layer_rates(importance: Sequence[float], rate: float) -> tuple[float, ...]:
    """What each layer loses when the model is to lose `rate`; their mean is less than that when a layer reaches MOST.

    >>> [round(r, 3) for r in layer_rates([0.2, 0.1, 0.3], 0.2)]
    [0.147, 0.399, 0.054]
    """
    shares = torch.tensor([-s / EPSILON for s in importance], dtype=torch.float64).softmax(0)
    return tuple((len(shares) * rate * shares).clamp(max=MOST).tolist())


def sort(
    reference: Reference, windows: Sequence[Sequence[int]], *, channel_step: int, alike: bool = False, progress: Progress = silent
) -> Sorting:
    """What stock GGUF can store of the published way: MLP channels by leverage, cut at the published layer rates, nothing compensated.

    alike: all layers lose the same. Raises UnsupportedError as `width_ladder`.
    """
    spec, found = reference.spec, measure(reference, windows, points=("mlp_hidden",), progress=progress)
    ladder = width_ladder(
        spec, reference.tensors, channel_step=channel_step, alike=alike, shares=layer_rates(found.importance, 1 / spec.n_layers), most=MOST
    )
    orders = [
        leverage(found.moments[b.layer, "mlp_hidden"]).argsort(descending=True, stable=True).cpu().numpy()
        if isinstance(b, Mlp)
        else np.arange(ports.size(b))
        for b in spec.blocks
    ]
    return Sorting(orders=tuple(orders), ladder=ladder, hidden={})


def masked(reference: Reference, moments: Moments, rate: float | Sequence[float]) -> dict[str, LazyTensor]:
    """The reference's tensors with a fraction `rate` (of all layers, or of each) of every port zeroed, counts rounded to the nearest.

    Raises PlanError for a rate outside [0, 1), UnsupportedError where norms on queries and keys mix their dimensions.
    """
    spec, tensors = reference.spec, dict(reference.tensors)
    rates = [rate] * spec.n_layers if isinstance(rate, float | int) else list(rate)
    wrong = next((r for r in rates if not 0 <= r < 1), None)
    if wrong is not None:
        raise PlanError(f"rate {wrong:g} is outside 0 to 1: a rate is the fraction of every port to remove.")
    if family(spec.family).qk_norm:
        raise UnsupportedError(f"{spec.family} normalizes queries and keys over all dimensions; mode uniql has no rule for that.")
    for block in spec.blocks:
        name, rate = f"layers.{block.layer}", rates[block.layer]
        if isinstance(block, Mlp):
            lost = channels_lost(moments[block.layer, "mlp_hidden"], round(block.n_ff * rate)).cpu().numpy()
            tensors[f"{name}.down.weight"] = map_values(tensors[f"{name}.down.weight"], _zero_columns(lost))
        else:
            second = moments[block.layer, "attn_in"].double()
            weights = {role: _with_bias(tensors, f"{name}.{role}").to(second) for role in ("wq", "wk", "wv")}
            weights["wv"] = _project_values(weights["wv"], second, block, round(block.head_dim * rate))
            if block.rope != "none":
                rope = spec.rope if block.rope == "main" or spec.rope_local is None else spec.rope_local
                weights["wq"] = _drop_pairs(weights["wq"], weights["wk"], second, block, rope.dim // 2, round(rope.dim // 2 * rate))
            for role in ("wq", "wv"):
                _put(tensors, f"{name}.{role}", weights[role].float().cpu().numpy())
    return tensors


def channels_lost(second: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` channels of least ridge leverage."""
    return leverage(second).argsort(stable=True)[:count]


def leverage(second: torch.Tensor) -> torch.Tensor:
    """Ridge leverage diag(C (C + l I)^-1) of the channels whose second moments are C, l being the mean of C's diagonal."""
    ridge = second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype, device=second.device)
    return torch.linalg.solve(second + ridge, second).diagonal()


def _project_values(wv: torch.Tensor, second: torch.Tensor, block: Attention, count: int) -> torch.Tensor:
    """Values of each KV group without their `count` weakest principal directions. wv (n_kv_heads * head_dim, n_embd + 1)."""
    heads = wv.unflatten(0, (block.n_kv_heads, block.head_dim))
    weak = torch.linalg.eigh(heads @ second @ heads.mT)[1][..., :count]  # eigenvalues ascend
    return (heads - weak @ (weak.mT @ heads)).flatten(0, 1)


def _drop_pairs(wq: torch.Tensor, wk: torch.Tensor, second: torch.Tensor, block: Attention, n_pairs: int, count: int) -> torch.Tensor:
    """Queries without the `count` RoPE pairs (j, j + n_pairs) of least rms(q) * rms(k) in each head. Rotation keeps a pair's norm."""
    group = block.n_heads // block.n_kv_heads
    energy_q, energy_k = (((w @ second) * w).sum(1).unflatten(0, (-1, block.head_dim))[:, : 2 * n_pairs] for w in (wq, wk))
    pairs_q, pairs_k = (energy[:, :n_pairs] + energy[:, n_pairs:] for energy in (energy_q, energy_k))
    weak = (pairs_q * pairs_k.repeat_interleave(group, 0)).argsort(1)[:, :count]
    heads = wq.unflatten(0, (block.n_heads, block.head_dim)).clone()
    for head, pairs in zip(heads, weak, strict=True):
        head[pairs] = 0
        head[pairs + n_pairs] = 0
    return heads.flatten(0, 1)


def _zero_columns(index: np.ndarray) -> Callable[[Floats], Floats]:
    def zero(values: Floats) -> Floats:
        values[:, index] = 0
        return values

    return zero


def _with_bias(tensors: Mapping[str, LazyTensor], name: str) -> torch.Tensor:
    """(n_out, n_in + 1): the bias, or zeros, is the last column."""
    weight = torch.from_numpy(tensors[f"{name}.weight"].decode())
    bias = tensors.get(f"{name}.bias")
    column = torch.zeros(len(weight)) if bias is None else torch.from_numpy(bias.decode())
    return torch.cat((weight, column[:, None]), 1)


def _put(tensors: dict[str, LazyTensor], name: str, values: Floats) -> None:
    tensors[f"{name}.weight"] = from_values(values[:, :-1], origin=f"{name}.weight")
    if f"{name}.bias" in tensors:
        tensors[f"{name}.bias"] = from_values(values[:, -1], origin=f"{name}.bias")
