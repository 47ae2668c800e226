"""How well a model predicts text, and how far one model's predictions are from another's. Every metric is defined here, once.

Negative log-likelihood (nll): -log p(token | those before it in its window), natural logarithm, under the softmax of the logits.
Perplexity: exp of the mean nll over the scored tokens. A window of n tokens has n - 1 scored ones: its first has nothing before it.
KL: sum over the vocabulary of p * (log p - log q) at one position, p from the reference, q from the artifact, in nats. Zero when
both agree, and the nats per token that coding with q instead of p costs.
Top-1 agreement: share of positions where the artifact's likeliest token is the reference's, or one that the reference has within
`tie_margin` nats of its likeliest: between those two the reference has no opinion, and rounding may decide.

NaN and infinite logits are counted and make the whole measurement an error; they never enter a mean.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import RuntimeFailure, UsageError
from edgeq.progress import Progress, silent
from edgeq.runtime.likelihood import Doubles, Floats, log_sum_exp, row_chunks
from edgeq.runtime.worker import ScoringWorker

Window = tuple[Sequence[int], Floats, Floats]  # token ids (n,), reference logits and artifact logits (n, n_vocab)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Perplexity of a text. tokens: scored ones, chunks * (ctx - 1); ctx: tokens per window; chunks: windows scored."""

    perplexity: float
    nll_mean: float
    tokens: int
    ctx: int
    chunks: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """An artifact against its reference over the same windows.

    tokens: positions compared, every one of every window. kl_p99: the KL that 1 % of them exceed (linear between neighbours).
    nll_reference, nll_artifact: mean over the scored tokens, at least one of which there must be.
    """

    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    nll_reference: float
    nll_artifact: float
    tokens: int


def perplexity(
    artifact: Path,
    text: str,
    *,
    adapter: Path | None = None,
    ctx: int = 1024,
    chunks: int | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Perplexity of a GGUF file or a model.onnx on a text, with a GGUF adapter beside it or without.

    The text's token ids, by the artifact's own tokenizer and without added specials, are split into windows of ctx; a last, shorter
    window is dropped. Each of the first `chunks` windows (all if None) is scored alone, positions 1..ctx-1.
    Raises UsageError when the text is shorter than one window, RuntimeFailure when the runtime fails or scores come out non-finite,
    AdapterError for an adapter that is broken or for another model.
    """
    if ctx < 2 or (chunks is not None and chunks < 1):
        raise UsageError(f"ctx is {ctx} and chunks is {chunks}; expected at least 2 and 1")
    with ScoringWorker(artifact, adapter=adapter, n_ctx=ctx, threads=threads) as worker:
        windows = text_windows(worker, text, ctx=ctx, chunks=chunks)
        nll = window_nll(worker, windows, progress=progress)
    mean = float(nll.mean())
    return Evaluation(perplexity=perplexity_of(mean), nll_mean=mean, tokens=nll.size, ctx=ctx, chunks=len(nll))


def text_windows(worker: ScoringWorker, text: str, *, ctx: int, chunks: int | None) -> list[list[int]]:
    """The windows of a text that are scored, by the worker's tokenizer; see `perplexity`. Raises UsageError for a text without one."""
    ids = worker.tokenize(text)
    if len(ids) < ctx:
        raise UsageError(f"the text has {len(ids):,} tokens, but one window needs {ctx:,}. Use a longer text or a smaller --ctx.")
    if ctx > worker.facts.n_ctx_train:
        logger.warning("%s was trained on %d tokens; windows of %d ask for more", worker.artifact, worker.facts.n_ctx_train, ctx)
    n_windows = min(len(ids) // ctx, chunks or len(ids))
    return [ids[start : start + ctx] for start in range(0, n_windows * ctx, ctx)]


def window_nll(worker: ScoringWorker, windows: Sequence[Sequence[int]], *, progress: Progress = silent) -> Doubles:
    """Negative log-likelihoods, (n_windows, ctx - 1). Raises RuntimeFailure for those that are no numbers."""
    ctx = len(windows[0])
    nll = np.empty((len(windows), ctx - 1))
    for i, window in enumerate(windows):
        nll[i] = worker.nll(window, on_tokens=partial(_progress_after, progress, i * ctx, len(windows) * ctx))
    broken = int(np.count_nonzero(~np.isfinite(nll)))
    if broken:
        raise RuntimeFailure(
            f"{worker.artifact}: {broken:,} of {nll.size:,} scored tokens have NaN or infinite likelihoods. "
            "The weights are damaged or overflow in this number format; export the model again."
        )
    return nll


def _progress_after(progress: Progress, before: int, total: int, done: int) -> None:
    progress("eval", before + done, total)


def perplexity_of(nll_mean: float) -> float:
    """exp(nll_mean). Raises RuntimeFailure where that is no finite number."""
    try:
        return math.exp(nll_mean)
    except OverflowError:
        message = f"the mean negative log-likelihood is {nll_mean:.4g}, too large for a perplexity. The model's weights are damaged."
        raise RuntimeFailure(message) from None


def compare(windows: Iterable[Window], *, tie_margin: float = 0.0) -> Agreement:
    """Agreement of two models over windows, which are taken one at a time and dropped. Raises what `Comparison` raises."""
    comparison = Comparison(tie_margin=tie_margin)
    for ids, reference, artifact in windows:
        comparison.add(ids, reference, artifact)
    return comparison.agreement()


class Totals:
    """A few numbers per position of a comparison, and what they come to."""

    def __init__(self) -> None:
        self._kl: list[Doubles] = []
        self._agree = self._scored = 0
        self._nll_reference = self._nll_artifact = 0.0
        self._broken: Counter[str] = Counter()

    def count_broken(self, **sides: Doubles) -> bool:
        """Count rows of logits that hold NaN or infinities, by side; whether there were any so far, in which case all is lost."""
        for side, rows in sides.items():
            with np.errstate(invalid="ignore"):
                self._broken[side] += int(np.count_nonzero(~np.isfinite(rows.sum(axis=1))))
        return self._broken.total() > 0

    def add(self, *, kl: Doubles, agree: npt.NDArray[np.bool_], nll_reference: Doubles, nll_artifact: Doubles) -> None:
        """Positions by KL and whether the likeliest tokens agree, and the nll of those that are scored."""
        self._kl.append(np.maximum(kl, 0.0))  # rounding may leave -1e-17
        self._agree += int(np.count_nonzero(agree))
        self._scored += len(nll_reference)
        self._nll_reference += float(nll_reference.sum())
        self._nll_artifact += float(nll_artifact.sum())

    @property
    def kl(self) -> Doubles:
        """KL of every position so far."""
        return np.concatenate(self._kl)

    def agreement(self) -> Agreement:
        for side, count in self._broken.items():
            if count:
                raise RuntimeFailure(f"{count:,} positions have NaN or infinite logits in the {side}")
        if not self._scored:
            raise RuntimeFailure("there is nothing to compare; give at least one window of two tokens")
        kl = self.kl
        return Agreement(
            kl_mean=float(kl.mean()),
            kl_p99=float(np.quantile(kl, 0.99)),
            kl_max=float(kl.max()),
            top1_agreement=self._agree / kl.size,
            nll_reference=self._nll_reference / self._scored,
            nll_artifact=self._nll_artifact / self._scored,
            tokens=kl.size,
        )


class Comparison:
    """Two models' logits, window by window; nothing of a window is kept but a few numbers per position."""

    def __init__(self, *, tie_margin: float) -> None:
        self._tie_margin, self._totals = tie_margin, Totals()

    def add(self, ids: Sequence[int], reference: Floats, artifact: Floats) -> None:
        """Logits of both models, (n_tokens, n_vocab), for one window. Raises RuntimeFailure when the shapes differ."""
        if reference.shape != artifact.shape or len(ids) != len(reference):
            raise RuntimeFailure(
                f"cannot compare logits of shape {list(artifact.shape)} with the reference's {list(reference.shape)} for {len(ids)} tokens"
            )
        targets = np.asarray(ids, dtype=np.int64)[1:]
        for part in row_chunks(*reference.shape):
            self._add_rows(reference[part], artifact[part], targets[part])

    def _add_rows(self, reference: Floats, artifact: Floats, targets: npt.NDArray[np.int64]) -> None:
        """Rows of one chunk; targets are the tokens that followed, one fewer at the end of a window."""
        p, q = reference.astype(np.float64), artifact.astype(np.float64)
        if self._totals.count_broken(reference=p, artifact=q):
            return
        every = np.arange(len(p))
        agree = p.max(axis=1) - p[every, q.argmax(axis=1)] <= self._tie_margin
        p -= log_sum_exp(p)[:, None]
        q -= log_sum_exp(q)[:, None]
        scored = every[: len(targets)]
        nll_reference, nll_artifact = -p[scored, targets], -q[scored, targets]
        q -= p
        self._totals.add(kl=-np.einsum("ij,ij->i", np.exp(p), q), agree=agree, nll_reference=nll_reference, nll_artifact=nll_artifact)

    @property
    def kl(self) -> Doubles:
        """KL of every position so far."""
        return self._totals.kl

    def agreement(self) -> Agreement:
        """Raises RuntimeFailure when there was nothing to compare, or when logits were NaN or infinite."""
        return self._totals.agreement()
