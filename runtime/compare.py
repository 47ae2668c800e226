"""An artifact's predictions against a reference's, window by window of one text: KL and top-1 agreement of `edgeq.runtime.quality`.

Windows are the units of the standard errors (`edgeq.runtime.estimates`); the 99th percentile of the KL is over all positions and has none.
Ties count for the artifact only where the reference's two logits are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgeq.errors import UsageError
from edgeq.runtime.child import ignore
from edgeq.runtime.estimates import Estimate, mean_of, without_error
from edgeq.runtime.likelihood import Floats
from edgeq.runtime.quality import Comparison
from edgeq.runtime.worker import ScoringWorker


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """nll_reference, nll_artifact: means over scored tokens; the others as in the module docstring."""

    kl_mean: Estimate
    kl_p99: Estimate
    top1_agreement: Estimate
    nll_reference: Estimate
    nll_artifact: Estimate


def compare_windows(
    reference: Callable[[int], Floats],
    worker: ScoringWorker,
    windows: Sequence[Sequence[int]],
    *,
    on_windows: Callable[[int], None] = ignore,
) -> Likeness:
    """Compare over windows of one length. reference: logits of window i, (n_tokens, n_vocab).

    Raises UsageError when the vocabularies differ in size, RuntimeFailure for logits that are no numbers.
    """
    found, kl = [], []
    for i, ids in enumerate(windows):
        comparison, expected, given = Comparison(tie_margin=0.0), reference(i), worker.logits(ids)
        if expected.shape[1] != given.shape[1]:
            raise UsageError(
                f"{worker.artifact} has {given.shape[1]:,} tokens in its vocabulary, the reference has {expected.shape[1]:,}. "
                "KL compares models of one vocabulary; leave out --reference."
            )
        comparison.add(ids, expected, given)
        found.append(comparison.agreement())
        kl.append(comparison.kl)
        on_windows(i + 1)
    n_tokens, n_scored = sum(map(len, kl)), sum(len(ids) - 1 for ids in windows)
    return Likeness(
        kl_mean=mean_of([one.kl_mean for one in found], n=n_tokens),
        kl_p99=without_error(float(np.quantile(np.concatenate(kl), 0.99)), n=n_tokens),
        top1_agreement=mean_of([one.top1_agreement for one in found], n=n_tokens),
        nll_reference=mean_of([one.nll_reference for one in found], n=n_scored),
        nll_artifact=mean_of([one.nll_artifact for one in found], n=n_scored),
    )


def check_same_tokens(reference: ScoringWorker, worker: ScoringWorker, text: str, windows: Sequence[Sequence[int]]) -> None:
    """Raises UsageError when the reference's tokenizer makes other tokens of the text than the windows have."""
    ids, ctx = reference.tokenize(text), len(windows[0])
    if any(ids[i * ctx : (i + 1) * ctx] != list(window) for i, window in enumerate(windows)):
        raise UsageError(
            f"{reference.artifact} makes other tokens of the text than {worker.artifact}. KL compares models of one tokenizer; "
            "leave out --reference."
        )
