"""How much the loss depends on every part that could go, and how MLP channels go together: one forward and one backward sweep.

The sensitivity of a part is half the mean over tokens of (x . dL/dx)^2, x being what the part adds to its linear's input and L the
negative log-likelihood: the second-order rise of the loss if the part were zero, under the Fisher matrix (Theis et al. 2018,
arXiv:1801.05787). All parts of all layers come out in nats per token. Parts that go in several heads at once are added up before they
are squared, as their errors are made together.

Two things make the result hold for other text than it was measured on. The next token is drawn from the model, not taken from the text
(the true Fisher matrix, not the empirical one), so that text which surprises the model does not outweigh all other. And the channels of
a layer share its sensitivity out by the mean of their shares in each window, so that every window has the same say. SmolLM2-135M, MLPs
cut to remove 25 % of block parameters and compensated at rank 64, calibrated on 64 windows of 256 tokens of a text in many languages and
notations, perplexity on WikiText in windows of 512 (full model 29.3):

    tokens of the text           58.6    drawn tokens, shares by window     50.8    the same, 32 windows           53.2
    the same, windows weighted   56.0    the same, power 0.5 of shares      62.3    the same, 24 windows           54.1
    drawn tokens, weighted       52.1    the same, power 1.5 of shares      52.5    the same, 64 windows of 128    54.4

A tenth of each layer's sensitivity is then spread evenly over its channels: some matter for texts of one kind alone, and most of those
sit in the last layer. Two channels of SmolLM2's last layer are all but silent in ordinary text and carry an eighth of its sensitivity in
WikiText, whose punctuation has spaces around it. Calibrated on 28 windows of the default text, with 0 / 0.1 / 0.2 spread, cuts of 15 %
came to 39.7 / 38.9 / 37.3 and cuts of 25 % to 48.9 / 49.1 / 51.9; on another part of WikiText (full model 26.2) 25 % came to 50.3 with
0 and 49.2 with 0.1.

Above, "weighted" divides a window's squares by their sum over all layers. What did not help: absolute values in place of squares (72),
a mean with activation energy times down_proj's norm (55.2 against 54.1), or with text labels (56.8 against 54.1).

Memory: states in front of every layer, 4 * n_embd bytes per layer and token, and one layer with its gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from edgeq.errors import SourceError, UsageError
from edgeq.progress import Progress, silent
from edgeq.reference import Observer, Point, Reference
from edgeq.spec import Attention, Block
from edgeq.transforms import pairs

# Tokens that go through a layer and back together; the graph of one SmolLM2 layer takes 60 MiB for 1024 tokens.
_BATCH_TOKENS = 1024
EVEN = 0.1  # of a layer's sensitivity, that of text unlike the calibration text
_STRIPS = 6  # of a matrix of second moments, so that 58 % of it are computed and the rest mirrored
_WATCHED: tuple[Point, ...] = ("queries", "attn_out", "mlp_hidden")

_Seen = dict[Point, torch.Tensor]
Layer = Callable[[torch.Tensor, Observer], torch.Tensor]


@dataclass(frozen=True)
class Moments:
    """Of hidden activations x: their mean (n_ff,) and E[x x^T] (n_ff, n_ff)."""

    mean: torch.Tensor
    second: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class HeadStatistics:
    """Of the attention of one layer: sensitivities of what all its heads lose at once, or those of one KV head.

    rotations: for each KV head the principal directions of what its query heads read, strongest first, as rows: (n_kv_heads, head_dim,
    head_dim). values (head_dim,): of that direction in every head. pairs (head_dim / 2,): of a RoPE pair of the queries of every head.
    group_values (n_kv_heads, head_dim), group_pairs (n_kv_heads, head_dim / 2): the same of each KV head's query heads.
    """

    rotations: torch.Tensor
    values: torch.Tensor
    pairs: torch.Tensor
    group_values: torch.Tensor
    group_pairs: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """Of one layer: sensitivities of MLP channels (n_ff,), of KV groups (n_kv_heads,), and of all that the layer adds ().

    taught and checked: moments of hidden activations over the windows to calibrate on, and over those held back, if there are any.
    A layer without MLP has empty channels and no moments, one without attention empty groups. heads: if asked for.
    """

    layer: int
    channels: torch.Tensor
    groups: torch.Tensor
    whole: torch.Tensor
    taught: Moments | None
    checked: Moments | None
    heads: HeadStatistics | None


def layer_statistics(
    reference: Reference,
    windows: Sequence[Sequence[int]],
    held_back: Sequence[Sequence[int]] = (),
    *,
    heads: bool = False,
    step: str = "calibrate",
    progress: Progress = silent,
) -> Iterator[LayerStatistics]:
    """Statistics of every layer, from the last to the first. All windows have one length, of at least two tokens.

    Sensitivities are of windows and held_back together. heads: whether statistics of heads are wanted. Raises UsageError for windows of
    other shapes, SourceError when what a layer computes, or its gradient, is not finite.
    """
    lengths = {len(window) for window in (*windows, *held_back)}
    if not windows or len(lengths) != 1 or min(lengths) < 2:
        raise UsageError(f"sorting wants calibration windows of one length of at least 2 tokens, got {sorted(lengths) or 'none'}")
    batch = max(1, _BATCH_TOKENS // lengths.pop())
    sizes = [*_batches(len(windows), batch), *_batches(len(held_back), batch)]  # none is of both
    layers = list(reference.spec.layers())
    inputs: list[torch.Tensor] = []
    rotations: list[torch.Tensor | None] = []
    states = reference.embed([*windows, *held_back])
    for done, (number, blocks) in enumerate(layers):
        progress(step, done, 2 * len(layers))
        inputs.append(states)
        run, values = reference.layer(blocks), _ValueMoments(blocks if heads else ())
        with torch.no_grad():
            states = torch.cat([run(part, values) for part in states.split(sizes)])
        _check(number, states, "output")
        rotations.append(values.rotations())
        del run  # before the next layer is decoded
    gradient = _loss_gradient(reference, states)
    for done, (number, blocks) in enumerate(reversed(layers)):
        progress(step, len(layers) + done, 2 * len(layers))
        sums = _Sums(reference, blocks, rotations.pop(), n_taught=len(windows))
        gradient = sums.through(reference.layer(blocks), inputs.pop(), gradient, sizes)
        _check(number, gradient, "gradient")
        yield sums.statistics(number)
    progress(step, 2 * len(layers), 2 * len(layers))


def _batches(n_windows: int, batch: int) -> list[int]:
    """Sizes of batches that n_windows windows run in."""
    return [min(batch, n_windows - start) for start in range(0, n_windows, batch)]


def _check(layer: int, values: torch.Tensor, what: str) -> None:
    if not torch.isfinite(values).all():
        raise SourceError(
            f"layer {layer}: its {what} is NaN or infinite in calibration, so one of its weights is broken. Get a sound checkpoint."
        )


def _loss_gradient(reference: Reference, states: torch.Tensor) -> torch.Tensor:
    """Gradient, by the states behind the last layer, of the negative log-likelihood of next tokens drawn from the model, by window."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for part in states.split(1):
        with torch.no_grad():
            slope = reference.logits(reference.final_norm(part)[0, :-1]).softmax(-1)
            drawn = draw(slope, generator)
            slope.scatter_add_(1, drawn, torch.full_like(slope[:, :1], -1))
            back = F.pad(reference.head_transposed(slope), (0, 0, 0, 1))[None]
        with torch.enable_grad():
            part = part.detach().requires_grad_()
            reference.final_norm(part).backward(back)
        assert part.grad is not None
        parts.append(part.grad)
    return torch.cat(parts)


def draw(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One column of each row of probabilities (n, n_vocab), drawn by them: (n, 1). Seven times as fast as torch.multinomial."""
    upto = probabilities.cumsum(-1)
    at = torch.rand(len(upto), 1, generator=generator, dtype=torch.float64).to(upto) * upto[:, -1:]
    return torch.searchsorted(upto, at, right=True).clamp_(max=upto.shape[1] - 1)


class _ValueMoments:
    """An observer that sums E[x x^T] of the heads' outputs by KV group, for the attention among `blocks`, if there is one."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.attention = next((b for b in blocks if isinstance(b, Attention)), None)
        self.second: torch.Tensor | None = None

    def __call__(self, layer: int | None, point: Point, x: torch.Tensor) -> None:
        if point == "attn_out" and self.attention is not None:
            heads = _by_group(x, self.attention).transpose(0, 1).flatten(1, 2)  # (n_kv_heads, tokens * query heads, head_dim)
            second = (heads.mT @ heads).double()
            self.second = second if self.second is None else self.second + second

    def rotations(self) -> torch.Tensor | None:
        return None if self.second is None else torch.linalg.eigh(self.second)[1].mT.flip(1)  # eigenvalues ascend


def _by_group(x: torch.Tensor, block: Attention) -> torch.Tensor:
    """(windows, tokens, n_heads * head_dim) as (windows * tokens, n_kv_heads, query heads of each, head_dim)."""
    return x.flatten(0, 1).unflatten(-1, (block.n_kv_heads, -1, block.head_dim))


class _HiddenSums:
    """Running sums of hidden activations."""

    def __init__(self) -> None:
        self.n_tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Of x (n_tokens, n_ff)."""
        if not self.n_tokens:
            self.mean, self.second = x.new_zeros(x.shape[1], dtype=torch.float64), x.new_zeros(x.shape[1], x.shape[1])
        self.n_tokens += len(x)
        self.mean += x.sum(0)
        for start, stop in self._strips():  # the lower triangle is enough
            self.second[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])

    def moments(self) -> Moments | None:
        """Of what was added, once: the sums are used up."""
        if not self.n_tokens:
            return None
        for start, stop in self._strips():
            self.second[:start, start:stop] = self.second[start:stop, :start].T
        return Moments((self.mean / self.n_tokens).float(), self.second.div_(self.n_tokens))

    def _strips(self) -> list[tuple[int, int]]:
        """Rows that are summed together."""
        n_ff = len(self.second)
        step = max(1, n_ff // _STRIPS)
        return [(start, min(start + step, n_ff)) for start in range(0, n_ff, step)]


class _Sums:
    """Running sums over the tokens of one layer."""

    def __init__(self, reference: Reference, blocks: Sequence[Block], rotations: torch.Tensor | None, *, n_taught: int) -> None:
        self.attention = next((b for b in blocks if isinstance(b, Attention)), None)
        self.rope_dim, self.rotations = reference.spec.rope.dim, rotations
        self.n_tokens, self.n_windows, self.n_taught = 0, 0, n_taught
        self.squares: dict[str, torch.Tensor] = {}
        self.taught, self.checked = _HiddenSums(), _HiddenSums()

    def through(self, run: Layer, states: torch.Tensor, behind: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """The gradient by the states in front of a layer from that by those behind it, adding up what is seen on the way."""
        parts = []
        for part, slope in zip(states.split(sizes), behind.split(sizes), strict=True):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                seen: _Seen = {}
                out = run(part, lambda layer, point, x, seen=seen: _keep_gradient(seen, point, x))
                out.backward(slope)
            assert part.grad is not None
            parts.append(part.grad)
            with torch.no_grad():
                self._add(seen)
                self._square("whole", ((out - part) * slope).sum(-1, keepdim=True).flatten(0, 1))
            self.n_tokens += part.shape[0] * part.shape[1]
            self.n_windows += len(part)
        return torch.cat(parts)

    def _add(self, seen: _Seen) -> None:
        if "mlp_hidden" in seen:
            x, slope = _with_gradient(seen["mlp_hidden"])
            squares = (x * slope).square_().sum(1, dtype=torch.float64)  # (windows, n_ff)
            total = squares.sum(1, keepdim=True)
            self._sum("mlp", total.sum(0))
            self._sum("shares", torch.where(total > 0, squares / total, 0).sum(0))
            (self.taught if self.n_windows < self.n_taught else self.checked).add(x.flatten(0, 1))
        if self.attention is not None and "attn_out" in seen:
            x, slope = (_by_group(t, self.attention) for t in _with_gradient(seen["attn_out"]))
            self._square("groups", (x * slope).sum((2, 3)))
            if self.rotations is not None:
                turned, slope = (torch.einsum("tgqd,ged->tgqe", t, self.rotations.to(t)) for t in (x, slope))
                self._square_by_group("values", (turned * slope).sum(2))
                x, slope = (t.flatten(0, 1) for t in _with_gradient(seen["queries"]))
                places = torch.from_numpy(pairs(self.attention.head_dim, self.rope_dim)).to(x.device)
                by_group = (x * slope).unflatten(1, (self.attention.n_kv_heads, -1)).sum(2)
                self._square_by_group("pairs", by_group[:, :, places].sum(-1))

    def _square(self, name: str, terms: torch.Tensor) -> None:
        """Add the squares of terms (n_tokens, n) to the sums under this name."""
        self._sum(name, terms.square().sum(0, dtype=torch.float64))

    def _square_by_group(self, name: str, terms: torch.Tensor) -> None:
        """The same of terms (n_tokens, n_kv_heads, n), and of their sums over KV heads."""
        self._square(name, terms.sum(1))
        self._square(f"group_{name}", terms)

    def _sum(self, name: str, terms: torch.Tensor) -> None:
        self.squares[name] = terms if name not in self.squares else self.squares[name] + terms

    def statistics(self, layer: int) -> LayerStatistics:
        found = {name: (squares / (2 * self.n_tokens)).float() for name, squares in self.squares.items()}
        none, heads = torch.zeros(0), None
        if self.rotations is not None:
            heads = HeadStatistics(
                rotations=self.rotations, **{name: found[name] for name in ("values", "pairs", "group_values", "group_pairs")}
            )
        return LayerStatistics(
            layer=layer,
            channels=_shared_out(found["mlp"], self.squares["shares"]) if "mlp" in found else none,
            groups=found.get("groups", none),
            whole=found["whole"],
            taught=self.taught.moments(),
            checked=self.checked.moments(),
            heads=heads,
        )


def _shared_out(total: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """A layer's sensitivity (1,) by channel, (n_ff,): by sums of shares over windows; live channels share EVEN of it alike."""
    alive = shares > 0
    known = shares / shares.sum().clamp_min(torch.finfo(shares.dtype).tiny)
    return (total * ((1 - EVEN) * known + EVEN * alive / alive.sum().clamp_min(1))).float()


def _keep_gradient(seen: _Seen, point: Point, x: torch.Tensor) -> None:
    if point in _WATCHED:
        x.retain_grad()
        seen[point] = x


def _with_gradient(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    assert x.grad is not None
    return x.detach(), x.grad
