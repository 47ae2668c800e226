"""Choosing the next token in numpy, as llama.cpp's sampler chain chooses it: the same seed draws the same tokens from the same logits.

Order: top-k, top-p, min-p, temperature, then a draw from a Mersenne twister (Matsumoto and Nishimura 1998) that the seed starts as
std::mt19937 is started; each draw takes two of its numbers. Candidates are in order of ids until top-k or top-p sorts them, likeliest
first, because a draw walks through them in their order. Facts from llama-sampler.cpp of llama.cpp.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgeq.runtime.likelihood import Floats

Ids = npt.NDArray[np.int64]


class Twister:
    """std::mt19937 with std::uniform_real_distribution<double>(0, 1)."""

    def __init__(self, seed: int) -> None:
        self._words = np.random.RandomState(seed)  # only the legacy generator starts its state as C++ does

    def uniform(self) -> float:
        low, high = self._words.randint(0, 1 << 32, 2, dtype=np.uint32).tolist()
        return min((low + high * 2.0**32) / 2.0**64, np.nextafter(1.0, 0.0))


def candidates(logits: Floats, *, top_k: int | None, top_p: float | None, min_p: float | None) -> tuple[Ids, Floats]:
    """Tokens that may be drawn, in the order in which a draw goes through them, and their logits: (n_vocab,) to (n,) twice."""
    ids, kept = np.arange(len(logits)), logits
    if top_k is not None:
        ids = likeliest(logits, top_k)
        kept = logits[ids]
    if top_p is not None and top_p < 1:
        if top_k is None:
            ids = likeliest(logits, len(logits))
            kept = logits[ids]
        shares = _softmax(kept)
        n = 1 + int(np.searchsorted(np.cumsum(shares, dtype=np.float32), np.float32(top_p)))
        ids, kept = ids[:n], kept[:n]
    if min_p is not None and min_p > 0:
        enough = kept >= kept.max() + np.log(np.float32(min_p))
        ids, kept = ids[enough], kept[enough]
    return ids, kept


def likeliest(logits: Floats, k: int) -> Ids:
    """The k tokens with the largest logits, largest first."""
    if k < len(logits):
        ids = np.argpartition(-logits, k - 1)[:k]
        return ids[np.argsort(-logits[ids], kind="stable")]
    return np.argsort(-logits, kind="stable")


def draw(ids: Ids, logits: Floats, uniform: float) -> int:
    """The candidate at which the running sum of probabilities reaches `uniform`."""
    sums = np.cumsum(np.exp(logits - logits.max()), dtype=np.float64)
    return int(ids[min(np.searchsorted(sums, sums[-1] * uniform), len(ids) - 1)])


def _softmax(logits: Floats) -> Floats:
    shares = np.exp(logits - logits.max())
    return shares / shares.sum(dtype=np.float32)
