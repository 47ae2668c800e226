"""Token ids as callers give them, checked before C code sees them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import UsageError

TokenIds = Sequence[int] | npt.NDArray[np.integer[Any]]


def checked_ids(tokens: TokenIds, *, n_vocab: int, path: Path) -> npt.NDArray[np.int32]:
    """Token ids as int32, every one within the vocabulary of the model at `path`. Raises UsageError naming the first that is not."""
    ids = np.asarray(tokens)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise UsageError(f"token ids must be a flat sequence of integers, not {ids.dtype} of shape {list(ids.shape)}")
    outside = np.flatnonzero((ids < 0) | (ids >= n_vocab))
    if outside.size:
        i = int(outside[0])
        raise UsageError(f"token {i} is {ids[i]}, but the vocabulary of {path.name} has ids 0 to {n_vocab - 1}")
    return np.ascontiguousarray(ids, dtype=np.int32)
