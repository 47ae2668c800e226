"""How much the loss depends on every MLP channel and KV group, and how channels go together: one forward and one backward sweep.

The sensitivity of a part is the mean over tokens of (x . dL/dx)^2, x being what the part adds to its linear's input and L the
negative log-likelihood of the calibration text: the second-order rise of the loss if the part were zero, under the empirical Fisher
matrix (Theis et al. 2018, arXiv:1801.05787). All parts of all layers come out in the same unit.

Memory: states in front of every layer, 4 * n_embd bytes per layer and token, and one layer with its gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from edgeq.errors import SourceError, UsageError
from edgeq.progress import Progress, silent
from edgeq.reference import Point, Reference
from edgeq.spec import Attention

# Windows that go through a layer and back together; the graph of one SmolLM2 layer takes 60 MiB for 1024 tokens.
_BATCH_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """Of one layer: channel sensitivity and mean hidden activation (n_ff,), second moments (n_ff, n_ff), group sensitivity (n_kv_heads,).

    Sensitivities are halved squares, in nats per token. A layer without MLP has empty channels, one without attention empty groups.
    """

    layer: int
    channels: torch.Tensor
    mean: torch.Tensor
    second: torch.Tensor
    groups: torch.Tensor


def layer_statistics(
    reference: Reference, windows: Sequence[Sequence[int]], *, step: str = "calibrate", progress: Progress = silent
) -> Iterator[LayerStatistics]:
    """Statistics of every layer, from the last to the first. All windows have one length, of at least two tokens.

    Raises UsageError for windows of other shapes, SourceError when a layer's gradients are not finite.
    """
    lengths = {len(window) for window in windows}
    if len(lengths) != 1 or min(lengths) < 2:
        raise UsageError(f"sorting wants calibration windows of one length of at least 2 tokens, got {sorted(lengths)}")
    batch = max(1, _BATCH_TOKENS // lengths.pop())
    layers = [blocks for _, blocks in reference.spec.layers()]
    inputs, states = [], reference.embed(windows)
    for done, blocks in enumerate(layers):
        progress(step, done, 2 * len(layers))
        inputs.append(states)
        run = reference.layer(blocks)
        with torch.no_grad():
            states = torch.cat([run(part, _ignore) for part in states.split(batch)])
        del run
    gradient = _loss_gradient(reference, states, torch.tensor([list(w) for w in windows], device=reference.device))
    for done, (number, blocks) in enumerate(reversed(list(reference.spec.layers()))):
        progress(step, len(layers) + done, 2 * len(layers))
        sums = _Sums({b.layer: b.n_kv_heads for b in blocks if isinstance(b, Attention)}.get(number, 0))
        run, states = reference.layer(blocks), inputs.pop()
        parts = []
        for part, behind in zip(states.split(batch), gradient.split(batch), strict=True):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                seen: dict[Point, torch.Tensor] = {}
                out = run(part, lambda layer, point, x, seen=seen: _keep_gradient(seen, point, x))
                out.backward(behind)
            assert part.grad is not None
            parts.append(part.grad)
            sums.add(seen)
        gradient = torch.cat(parts)
        if not torch.isfinite(gradient).all():
            raise SourceError(
                f"layer {number}: its gradient is NaN or infinite, so a weight from here on is broken. Get a sound checkpoint."
            )
        yield sums.statistics(number, states.shape[0] * states.shape[1])
    progress(step, 2 * len(layers), 2 * len(layers))


def _ignore(layer: int | None, point: Point, x: torch.Tensor) -> None:
    pass


def _keep_gradient(seen: dict[Point, torch.Tensor], point: Point, x: torch.Tensor) -> None:
    if point in ("attn_out", "mlp_hidden"):
        x.retain_grad()
        seen[point] = x


def _loss_gradient(reference: Reference, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Gradient, by the states behind the last layer, of each token's negative log-likelihood summed over windows."""
    parts = []
    for part, targets in zip(states.split(1), ids.split(1), strict=True):
        with torch.no_grad():
            logits = reference.logits(reference.final_norm(part)[0, :-1])
            slope = logits.softmax(-1)
            slope[torch.arange(len(slope)), targets[0, 1:]] -= 1
            back = F.pad(reference.head_transposed(slope), (0, 0, 0, 1))[None]
        with torch.enable_grad():
            part = part.detach().requires_grad_()
            reference.final_norm(part).backward(back)
        assert part.grad is not None
        parts.append(part.grad)
    return torch.cat(parts)


class _Sums:
    """Running sums over batches of one layer."""

    def __init__(self, n_groups: int) -> None:
        self.n_groups = n_groups
        self.channels: torch.Tensor | None = None
        self.groups: torch.Tensor | None = None

    def add(self, seen: dict[Point, torch.Tensor]) -> None:
        with torch.no_grad():
            if "mlp_hidden" in seen:
                x, slope = (t.flatten(0, 1) for t in (seen["mlp_hidden"], seen["mlp_hidden"].grad))
                if self.channels is None:
                    n_ff = x.shape[1]
                    self.channels, self.mean = (x.new_zeros(n_ff, dtype=torch.float64) for _ in range(2))
                    self.second = x.new_zeros(n_ff, n_ff)
                self.channels += (x * slope).square().sum(0)
                self.mean += x.sum(0)
                self.second.addmm_(x.T, x)
            if "attn_out" in seen:
                x, slope = (t.flatten(0, 1).unflatten(-1, (self.n_groups, -1)) for t in (seen["attn_out"], seen["attn_out"].grad))
                squares = (x * slope).sum(-1).square().sum(0, dtype=torch.float64)
                self.groups = squares if self.groups is None else self.groups + squares

    def statistics(self, layer: int, n_tokens: int) -> LayerStatistics:
        none = torch.zeros(0)
        return LayerStatistics(
            layer=layer,
            channels=none if self.channels is None else (self.channels / (2 * n_tokens)).float(),
            mean=none if self.channels is None else (self.mean / n_tokens).float(),
            second=none[:, None] if self.channels is None else self.second / n_tokens,
            groups=none if self.groups is None else (self.groups / (2 * n_tokens)).float(),
        )
