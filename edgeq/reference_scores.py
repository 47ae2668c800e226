"""The reference model's logits, window by window, as the gate asks for them.

Weights are streamed once for all windows; what stays is the final hidden states, from which a window's logits are made when asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from edgeq.errors import UsageError
from edgeq.progress import Progress, silent
from edgeq.reference import Reference

CONTEXT_STEP = 256  # llama.cpp rounds a context up to a multiple of this, and LongRoPE goes by the length of the context


class TorchScores:
    """`edgeq.gate.ReferenceScores` of a torch reference. Nothing runs before the first `logits`.

    n_ctx: context length to give the artifact; by default the longest window's, rounded up as llama.cpp does.
    """

    def __init__(
        self, reference: Reference, windows: Sequence[Sequence[int]], *, n_ctx: int | None = None, progress: Progress = silent
    ) -> None:
        if not windows:
            raise UsageError("no windows to score: give at least one")
        longest = max(len(window) for window in windows)
        self.windows = tuple(tuple(window) for window in windows)
        self.n_ctx = longest + -longest % CONTEXT_STEP if n_ctx is None else n_ctx
        self._reference, self._progress = reference, progress
        self._hidden: list[torch.Tensor] | None = None

    def logits(self, i: int) -> npt.NDArray[np.float32]:
        """Logits of window i, float32 (n_tokens, n_vocab)."""
        if self._hidden is None:
            self._hidden = self._reference.hidden(self.windows, n_ctx=self.n_ctx, step="gate reference", progress=self._progress)
        return self._reference.logits(self._hidden[i]).to(torch.float32).cpu().numpy()
