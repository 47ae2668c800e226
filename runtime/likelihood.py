"""Log-likelihoods from logits, in numpy: exact enough that nothing measured here is noise of its own.

Logits are float32 rows over the vocabulary. Sums over a row are taken in float64, a few rows at a time, so that temporaries stay
small whatever the vocabulary. Non-finite logits give non-finite results: who averages them has to look first.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

CHUNK_VALUES = 1 << 20  # values in float64 at once: 8 MiB per temporary


def row_chunks(n_rows: int, n_cols: int) -> Iterator[slice]:
    """Runs of rows of at most CHUNK_VALUES values, at least one row each."""
    step = max(1, CHUNK_VALUES // n_cols)
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def log_sum_exp(rows: Doubles) -> Doubles:
    """log(sum(exp(row))) of each row: (n, n_vocab) to (n,). NaN where a row holds NaN or +inf."""
    with np.errstate(invalid="ignore"):
        top = rows.max(axis=1, keepdims=True)
        return top[:, 0] + np.log(np.exp(rows - top).sum(axis=1))


def negative_log_likelihood(logits: Floats, targets: npt.NDArray[np.integer]) -> Doubles:
    """-log p(target) under the softmax of each row: logits (n, n_vocab), targets (n,), to (n,) in nats."""
    nll = np.empty(len(targets), dtype=np.float64)
    for part in row_chunks(*logits.shape):
        rows = logits[part].astype(np.float64)
        nll[part] = log_sum_exp(rows) - rows[np.arange(len(rows)), targets[part]]
    return nll
